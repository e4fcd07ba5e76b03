"""Requests in, results out."""
