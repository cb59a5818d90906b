"""Name the environment to activate if this Python lacks the packages.

Every command imports this module first. It needs nothing but the standard library.
"""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    print(
        f"error: {sys.executable} has no PyTorch: activate the project's environment with `source "
        ".venv/bin/activate`, or with `make shell`, which creates it if necessary",
        file=sys.stderr,
    )
    sys.exit(2)
