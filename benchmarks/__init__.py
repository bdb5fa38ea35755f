"""One script per claim about speed and memory; see README.md beside this file."""

import os

# Before torch is imported: its profiler, which `memory.tensor_peak` uses, prints two lines at every use otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
