"""What makes a prompt's keys and values fewer before a cache stores them. Knows no cache."""
