"""Fake devices: an agent that computes its journal from the wall clock, behind a link that delays and fails.

They load everything between inventory and store as so many devices would, and are marked emulated wherever
their records go. What they "measured" says nothing of any device.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import LinkError, MissingFileError, StableError
from orchestrator.transports.base import OUTPUT_CAP_BYTES, Completed, Plain, Progress
from orchestrator.transports.fake_agent import FakeAgent, FakeSpec, said
from sti_runtime.errors import StifarmError

if TYPE_CHECKING:
    from orchestrator.inventory import Device

_ATTEMPT_FILE = re.compile(r".*/jobs/([a-z0-9-]+)/([0-9]+)/([a-z.-]+)")
_START_TICKS = 1
_FAILED, _NOT_FOUND = 1, 127


def connect(device: Device) -> FakeDevice:
    """The transport of a fake device."""
    return FakeDevice(device.name, device.fake or FakeSpec())


class FakeDevice(Plain):
    """A fake device. What it holds ends with this process; see ``base.Transport`` for the methods."""

    poll_pause_s = 0.5

    def __init__(self, device: str, spec: FakeSpec) -> None:
        self._device, self._spec = device, spec
        self._agent = FakeAgent(device, spec, time.time_ns)
        self._faults = random.Random(f"link of {spec.seed}/{device}")
        self._lock = threading.Lock()
        self.agent_argv: tuple[str, ...] = ("fake-agent",)

    @property
    def device(self) -> str:
        """The device's name, for messages."""
        return self._device

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        output_cap_bytes: int = OUTPUT_CAP_BYTES,
        stdin: Iterable[bytes] | None = None,
        stdin_file: str | None = None,
    ) -> Completed:
        """The agent's answer; no other command is there."""
        data = b"" if stdin is None else b"".join(stdin)
        with self._link():
            self.answered = True
            known = len(self.agent_argv)
            if tuple(argv[:known]) != self.agent_argv:
                return Completed(tuple(argv), _NOT_FOUND, b"", b"a fake device has no shell", truncated=False)
            try:
                answer = self._agent.verb(argv[known], argv[known + 1 :], data)
            except StifarmError as error:
                return Completed(tuple(argv), _FAILED, said(error), b"", truncated=False)
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return Completed(tuple(argv), 0, text, b"", truncated=False)

    def streams_input(self) -> bool:
        """Always."""
        return True

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Raises: StableError: it keeps no files."""
        raise self._without_files()

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Raises: StableError: it keeps no files."""
        raise self._without_files()

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Of the files of an attempt, and of a process what tells whether it lives."""
        with self._link():
            data = self._file(path)
        if data is None:
            raise MissingFileError(f"{path} is not there.", device=self._device)
        return data[offset : offset + limit]

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start the agent on a job."""
        found = _ATTEMPT_FILE.fullmatch(log)
        with self._link():
            if found is None:
                raise StableError(
                    f"no program {argv[0]} is there.", "It runs its agent only.", device=self._device
                )
            try:
                return self._agent.start(found[1], int(found[2]))
            except StifarmError as error:
                raise StableError(error.what, error.remedy, device=self._device) from error

    def default_workdir(self) -> str:
        """A folder that nothing is written to."""
        return "/fake"

    def _file(self, path: str) -> bytes | None:
        found = _ATTEMPT_FILE.fullmatch(path)
        if found is not None and found[3] == "journal.log":
            return self._agent.journal(found[1], int(found[2]))
        if found is not None and found[3] == "pid":
            pid = self._agent.process(found[1], int(found[2]))
            ticks = _START_TICKS
            return None if pid is None else b'{"boot_id":"","pid":%d,"start_ticks":%d}' % (pid, ticks)
        if path.startswith("/proc/"):
            pid = int(path.split("/")[2])
            alive = self._agent.alive(pid)
            return b"%d (agent) S%s %d" % (pid, b" 0" * 18, _START_TICKS) if alive else None
        return None

    @contextmanager
    def _link(self) -> Iterator[None]:
        """One call over the link: its delay, and whether it is lost before or behind what it asks."""
        fault = self._faults.random() * 1e6 < self._spec.link_faults_ppm
        before = fault and self._faults.random() < 0.5
        if self._spec.delay_ns:
            time.sleep(self._spec.delay_ns / 1e9)
        if before:
            raise self._lost()
        with self._lock:
            yield
        if fault:
            raise self._lost()

    def _lost(self) -> LinkError:
        return LinkError("its link failed, as its inventory says.", "Try again.", device=self._device)

    def _without_files(self) -> StableError:
        return StableError("a fake device keeps no files.", "Give it probe jobs.", device=self._device)
