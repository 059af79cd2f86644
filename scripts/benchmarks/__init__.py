"""The tables of `scripts/benchmark.py`, one a file: `tables(rounds, device)` yields them."""
