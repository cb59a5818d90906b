"""The check of util/location.py for the modules of ``models``, whatever the package ``util`` is."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "util" / "location.py"))
