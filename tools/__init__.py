"""What one types beside the pipeline: ``python -m tools.<name>`` from the project's root."""
