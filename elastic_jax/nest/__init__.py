"""Nesting: slices, masks, importance, ordering, budgets, the router."""
