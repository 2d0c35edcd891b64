"""Held-out scores, the final table, and the report."""
