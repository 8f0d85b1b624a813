"""Fewer experts: similarity, grouping, alignment, merging, and the plan that applies them."""
