"""Measurements beside peers, on data from real training; see README.md in this folder."""
