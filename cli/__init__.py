"""The `curate` command: parse, call, print. No logic."""
