"""Near duplicates: the join that finds pairs, the forests that hold them, and who stays."""
