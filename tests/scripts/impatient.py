"""``impatient.py <seconds> <script> <flags>``: the script, with less patience for other processes."""

import runpy
import sys
from datetime import timedelta

from util import misc

_, seconds, *sys.argv = sys.argv
misc.STEP_PATIENCE = timedelta(seconds=float(seconds))
misc.PATIENCE = 2 * misc.STEP_PATIENCE
runpy.run_path(sys.argv[0], run_name="__main__")
