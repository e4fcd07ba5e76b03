"""Eager PyTorch: the oracle that every export is compared with."""
