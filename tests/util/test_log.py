"""Progress bars in files."""

import io
import sys

from util.log import progress_bar


def test_every_state_of_a_bar_in_a_file_is_a_line(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar(range(3), unit="step", desc="training", mininterval=0) as bar:
        for _ in bar:
            pass
    lines = [line for line in file.getvalue().splitlines() if line]
    assert "\r" not in file.getvalue() and len(lines) >= 4
    assert lines[0].startswith("training:   0%") and "3/3" in lines[-1]
