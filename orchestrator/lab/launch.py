"""Starting a process of the lab so that it is written down before it does anything.

The programs started so (``init``, ``link``) say ``here`` and wait for a line on their input; whoever dies
before it has recorded them closes that input, and they end.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.errors import LabError
from orchestrator.processes import ProcessId, identify

START_LIMIT_S = 120.0
"""A board with little of a CPU starts slowly, more so beside others."""

_LINE_CAP_BYTES = 4096


class Launch:
    """A started program, in its handshake. Leaving the block closes the pipes; the program goes on."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        with log.open("ab") as stream:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self._log = log
        self._what = log.parent.name
        found = identify(self._popen.pid)
        if found is None:
            raise self._failed("it ended at once")
        self.process: ProcessId = found

    def expect(self, word: str) -> str:
        """Wait for a line that starts with ``word``; returns the rest. Raises: LabError."""
        line = self._line()
        first, _, rest = line.partition(" ")
        if first == "failed":
            raise self._failed(rest)
        if first != word:
            raise self._failed(f"it said {line!r} instead of {word}" if line else "it ended")
        return rest

    def tell(self, text: str = "go") -> None:
        """Let it go on. Raises: LabError when it is gone."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(text.encode() + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed("it ended") from error

    def _line(self) -> str:
        assert self._popen.stdout is not None
        handle, data, deadline = self._popen.stdout.fileno(), b"", time.monotonic() + START_LIMIT_S
        while not data.endswith(b"\n") and len(data) < _LINE_CAP_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise self._failed(f"it said nothing in {START_LIMIT_S:g} s")
            block = os.read(handle, 1)
            if not block:
                break
            data += block
        return data.decode(errors="replace").strip()

    def _failed(self, why: str) -> LabError:
        return LabError(f"{self._what} cannot be started: {why}.{log_end(self._log)}", f"See {self._log}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            stream.close()
        self._popen.returncode = 0  # it outlives us: nobody here waits for it


def log_end(log: Path, limit: int = 500) -> str:
    """The end of a log for a message, after a space; empty when there is none."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f" {text[-limit:]}" if text else ""
