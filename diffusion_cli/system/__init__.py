"""What a computer needs: files, locks, signals, processes, untrusted input."""
