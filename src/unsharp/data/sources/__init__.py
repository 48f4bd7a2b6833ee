"""Data sources by name: a new one is one file here with one registered function."""
