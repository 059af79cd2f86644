"""Feature networks of metrics."""
