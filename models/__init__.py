"""The mathematics of TokenBridge: tokenizer, quantizer, backbone, channel head, sampling."""

from pathlib import Path

import util

ROOT = Path(__file__).resolve().parents[1]
folders = [Path(folder).resolve() for folder in getattr(util, "__path__", [])]
if ROOT / "util" not in folders:
    raise ImportError(
        f"the package models of {ROOT} needs the package util beside it, but util was imported "
        f"from {', '.join(map(str, folders)) or util.__file__}, another project's: import from "
        "TokenBridge first, with its folder first in sys.path, or run it in a process of its own"
    )
