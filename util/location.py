"""Refuse to run if Python takes the packages ``models`` or ``util`` from another project.

Where a folder of such a name, as MAR's, is imported before this installed project, Python looks for
each module in both: without this check it would run a mixture of the two.
"""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

for name in ("models", "util"):
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    place = places[0] if places else str(spec and spec.origin)
    if Path(place).resolve() != ROOT / name:
        raise ImportError(
            f"TokenBridge in {ROOT} needs its own package {name}, but {name} was imported from "
            f"{place}, another project's: import from TokenBridge first, with its folder first in "
            "sys.path, or run it in a process of its own"
        )
