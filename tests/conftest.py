"""Settings every test shares."""

import os

# Before torch is imported: two test processes and their children share few cores, and OpenMP threads
# that spin for each other there stand still.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from hypothesis import settings

# Deadlines measure the machine, not the code.
settings.register_profile("zoetrope", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("zoetrope")
