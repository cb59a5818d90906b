"""Command-line tools beside the main scripts: ``python -m tools.<name>`` from the project root."""
