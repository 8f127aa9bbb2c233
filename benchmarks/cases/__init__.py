"""One module per question; `python -m benchmarks` finds them here."""
