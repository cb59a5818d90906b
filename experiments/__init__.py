"""The paper's findings at sizes that can be rerun: experiments as data, their runner, measures and report."""
