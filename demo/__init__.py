"""`make demo`: a small real web on loopback, curated by the installed `curate` command and marked against the truth."""
