"""How many cards hold many conversations, what stops them, and what a token costs: on paper, from measured figures."""
