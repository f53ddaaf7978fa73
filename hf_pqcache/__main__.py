"""`python -m hf_pqcache` is the `pqcache` command."""

from hf_pqcache.cli import main

if __name__ == "__main__":
    main()
