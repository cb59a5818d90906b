"""Checkpoint files and the models in them."""
