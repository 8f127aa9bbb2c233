"""T15: seeded bugs that the suite must notice; run with `python -m tests.mutants`."""
