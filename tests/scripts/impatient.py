"""``impatient.py <seconds> <script> <flags>``: the script, with less patience for other processes and for disks."""

import runpy
import sys
from datetime import timedelta

from util import distributed, files

_, seconds, *sys.argv = sys.argv
files.PATIENCE = float(seconds)
distributed.STEP_TIMEOUT = timedelta(seconds=files.PATIENCE)
distributed.TIMEOUT = 2 * distributed.STEP_TIMEOUT
runpy.run_path(sys.argv[0], run_name="__main__")
