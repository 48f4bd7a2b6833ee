"""The tables and figures that the documentation shows, each one file that makes it."""
