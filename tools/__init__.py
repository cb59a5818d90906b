"""Command-line tools beside the main scripts: ``python -m tools.<name>`` from the project root."""

import util.interpreter  # noqa: F401, before all packages
