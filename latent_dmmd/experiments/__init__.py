"""Measurements that the docs report: comparisons, costs, diagnosis, two dimensions."""
