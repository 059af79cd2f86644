"""Tables of `scripts/benchmark.py`, one module each: `tables(rounds, device)` yields them."""
