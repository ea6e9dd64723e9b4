"""`prorl eval`: a model answers benchmarks, its answers are graded, the figures are written."""
