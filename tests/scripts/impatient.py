"""``impatient.py <seconds> <script> <flags>``: the script, with less patience for other processes and for disks."""

import runpy
import sys
from datetime import timedelta

from util import files, misc

_, seconds, *sys.argv = sys.argv
files.PATIENCE = float(seconds)
misc.STEP_PATIENCE = timedelta(seconds=files.PATIENCE)
misc.PATIENCE = 2 * misc.STEP_PATIENCE
runpy.run_path(sys.argv[0], run_name="__main__")
