"""Metrics of images, and the folders and plots of results."""
