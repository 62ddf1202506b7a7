"""Programs that measure; their results are committed as JSON in benchmarks/results/."""
