"""The STI runtime and the vocabulary that devices and controller share."""

import os

# OpenMP reads this when PyTorch loads it. Its default is to spin between parallel regions, which takes the
# CPU from the IO thread and from other processes; waiting passively costs some microseconds per region.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
