"""Files, locks, signals, processes and untrusted input."""
