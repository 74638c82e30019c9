"""What every driver does: create the engine, answer requests one after the other, report as one line of JSON.

``began_ns`` (engine creation begins) and ``logits_ns`` (the first request's logits are there) are times of
CLOCK_MONOTONIC; ``steady_ns`` are the later requests' durations; ``peak_bytes`` is VmHWM after the first
request; ``logits`` [requests, labels]. Imports happen before ``began_ns``: they are the interpreter's price.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Infer = Callable[[Ids], Logits]
"""Token ids [1, L] → logits [1, labels]."""


def peak_bytes() -> int:
    """VmHWM of this process."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def drive(create: Callable[[str, int], Infer]) -> None:
    """Run a driver: argv is MODEL THREADS ROWS_FILE TOKENS REQUESTS. ``create`` takes model and threads."""
    model, threads, rows_file, tokens, requests = sys.argv[1:]
    ids = np.fromfile(rows_file, "<i4").reshape(-1, int(tokens)).astype(np.int64)
    began_ns = time.monotonic_ns()
    infer = create(model, int(threads))
    first, *later = (ids[request % len(ids)][None] for request in range(int(requests)))
    logits = [infer(first)[0].tolist()]
    logits_ns, peak = time.monotonic_ns(), peak_bytes()
    steady_ns = []
    for row in later:
        start = time.monotonic_ns()
        logits.append(infer(row)[0].tolist())
        steady_ns.append(time.monotonic_ns() - start)
    print(
        json.dumps(
            {
                "began_ns": began_ns,
                "logits_ns": logits_ns,
                "steady_ns": steady_ns,
                "peak_bytes": peak,
                "logits": logits,
            }
        ),
        flush=True,
    )
