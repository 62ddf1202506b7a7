"""The audit server: `curate serve RUN`. Its pages and its API read an index beside the run, never whole tables."""
