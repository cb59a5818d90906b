"""The paper's experiments on small data sets: definitions, runner, measures and report."""
