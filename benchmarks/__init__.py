"""Speed and memory benchmarks. Run ``python -m benchmarks.<name>`` from the project's root."""
