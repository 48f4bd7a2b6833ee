"""Pools: many networks of one kind, each trained on a random subset, kept for whatever needs them."""
