"""The paper's experiments on small data sets: definitions, runner, measures and report."""

import util.interpreter  # noqa: F401, before all packages
