"""Scoring systems on recordings: corpus word error rate, coverage, speed and sparsity."""
