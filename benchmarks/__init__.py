"""Measurements of the package: a file for each claim, and what came out in results/."""
