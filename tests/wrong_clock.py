"""A wrong and jumping wall clock for a process and all that it starts: libfaketime, told by a file.

The kernel has no wall clock per process (time namespaces hold the monotonic ones), and this machine's is not
touched. What asks the kernel through a C library sees the wrong clock: Python, ``date``, and a static
executable of another architecture, for whom the emulator asks. Monotonic clocks and files' times stay right.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_PLACES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1")
DAY_NS = 86_400 * 10**9


class WrongClock:
    """``environment``: what makes a process see it."""

    def __init__(self, file: Path, days: int) -> None:
        found = [path for place in _PLACES for path in Path("/").glob(place.lstrip("/"))]
        if not found:
            pytest.skip("needs libfaketime (Debian package faketime)")
        self._file = file
        self.set(days)
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, days: int) -> None:
        """From now on it is so many days ahead of the true one."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{days:+d}d\n")
        partial.replace(self._file)
