"""Data, checkpoints, metrics and the utilities of training and evaluation."""
