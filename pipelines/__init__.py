"""How work is spread: stages, the run directory, resume, Ray. The only package that imports ray."""
