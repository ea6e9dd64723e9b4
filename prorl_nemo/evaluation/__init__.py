"""Scores of a model on benchmarks: items, estimators, and the numbers others reported."""
