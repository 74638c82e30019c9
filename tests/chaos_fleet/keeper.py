"""Processes that are started again whenever they end, as a service manager does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.agent_data import REPO

RESTART_S = 1.0
"""So long after its end is a process started again."""

END_LIMIT_S = 120.0
_LOOK_S = 0.2


@dataclass
class Kept:
    """One command. ``held``: it is not started, until it is let go."""

    argv: Sequence[str]
    folder: Path
    log: Path
    held: bool = False
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    again_at: float = 0.0
    exits: list[int] = field(default_factory=list)


class Keeper:
    """Keeps commands running until the end of the block."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for name in list(self._kept):
            self.end(name)

    def keep(self, name: str, argv: Sequence[str], folder: Path) -> None:
        """Keep a command running from now on."""
        with self._lock:
            self._kept[name] = Kept(argv, folder, folder / f"{name}.log")

    def change(self, name: str, argv: Sequence[str]) -> None:
        """Start it by another command from its next start on."""
        with self._lock:
            self._kept[name].argv = argv

    def process(self, name: str) -> psutil.Process | None:
        """The command's process, if it runs."""
        with self._lock:
            running = self._kept[name].process if name in self._kept else None
            if running is None or running.poll() is not None:
                return None
            with suppress(psutil.NoSuchProcess):
                return psutil.Process(running.pid)
            return None

    @contextmanager
    def killed(self, name: str, number: signal.Signals) -> Iterator[None]:
        """Send a signal that ends a command; it is not started again before the end of the block."""
        with self._lock:
            kept = self._kept[name]
            kept.held = True
            running = kept.process
        try:
            if running is not None and running.poll() is None:
                running.send_signal(number)
                _wait(running, name)
            yield
        finally:
            kept.held = False

    def end(self, name: str) -> None:
        """End a command, by SIGTERM, and keep it no more."""
        with self._lock:
            kept = self._kept.pop(name, None)
        if kept is None or kept.process is None:
            return
        with suppress(ProcessLookupError):
            kept.process.send_signal(signal.SIGTERM)
        _wait(kept.process, name)

    def said(self, name: str) -> str:
        """What a command has said since it was first started."""
        with self._lock:
            path = self._kept[name].log
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def exits(self) -> Mapping[str, list[int]]:
        """Exit codes of what ended and was started again."""
        with self._lock:
            return {name: list(kept.exits) for name, kept in self._kept.items()}

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            with self._lock:
                for kept in self._kept.values():
                    self._look(kept)

    def _look(self, kept: Kept) -> None:
        if kept.process is not None:
            code = kept.process.poll()
            if code is None:
                return
            kept.exits.append(code)
            kept.process, kept.again_at = None, time.monotonic() + RESTART_S
        if not kept.held and time.monotonic() >= kept.again_at:
            with kept.log.open("ab") as log:
                log.write(f"\n==== start {kept.starts + 1} at {time.time():.1f}\n".encode())
                log.flush()
                kept.process = subprocess.Popen(
                    kept.argv, cwd=kept.folder, env=environment(), stdout=log, stderr=log
                )
            kept.starts += 1


def environment() -> dict[str, str]:
    """The caller's, without what it says of farms and Ray."""
    kept = {name: value for name, value in os.environ.items() if not re.match("RAY_|STIFARM_", name)}
    return {**kept, "PYTHONPATH": str(REPO)}


def _wait(process: subprocess.Popen[bytes], name: str) -> None:
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_LIMIT_S)
        raise AssertionError(f"{name} did not end within {END_LIMIT_S:g} s of being asked to") from None
