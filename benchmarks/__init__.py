"""Speed and memory benchmarks. Run ``python -m benchmarks.<name>`` from the project's root."""

import util.interpreter  # noqa: F401, before all packages
