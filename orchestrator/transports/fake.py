"""A transport for tests and examples: commands go to a handler, files live in a folder of the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from orchestrator.transports.base import OUTPUT_CAP_BYTES, Completed, Plain, Progress
from orchestrator.transports.local import LocalTransport

Handler = Callable[[tuple[str, ...], Mapping[str, str]], Completed]
"""Answers a command from its argv and its added environment; may raise a DeviceError."""


class FakeTransport(Plain):
    """A device without a machine. Device path "/a/b" is the file ``root / "a/b"``.

    ``handler`` answers every ``run`` and is called for every ``start_detached``, whose process ids are
    counted from 1. ``commands`` lists all argvs so far; the agent's begin with ``agent_argv``.
    """

    poll_pause_s = 0.1

    def __init__(self, root: Path, handler: Handler, *, device: str = "fake") -> None:
        self._root, self._handler = root, handler
        self._files = LocalTransport(device)
        self._lock = threading.Lock()
        self._started = 0
        self.commands: list[tuple[str, ...]] = []
        self.inputs: list[tuple[tuple[str, ...], bytes]] = []
        self.agent_argv: tuple[str, ...] = ("agent",)

    @property
    def device(self) -> str:
        """The device's name, for messages."""
        return self._files.device

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
        """Ask the handler; its outputs are cut to the cap. Input is kept in ``inputs``, beside its argv."""
        with self._lock:
            self.commands.append(tuple(argv))
            if stdin is not None:
                self.inputs.append((tuple(argv), b"".join(stdin)))
        answer = self._handler(tuple(argv), env or {})
        self.answered = True
        cut = max(len(answer.stdout), len(answer.stderr)) > output_cap_bytes
        return Completed(
            tuple(argv),
            answer.exit_code,
            answer.stdout[:output_cap_bytes],
            answer.stderr[:output_cap_bytes],
            cut or answer.truncated,
        )

    def streams_input(self) -> bool:
        """Always."""
        return True

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Copy into the folder."""
        self._files.push(source, str(self.path(destination)), progress=progress)

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Copy out of the folder."""
        self._files.pull(str(self.path(source)), destination, progress=progress)

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Read a file of the folder."""
        return self._files.read_from(str(self.path(path)), offset, limit)

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Ask the handler once; what it said is appended to ``log``."""
        answer = self.run(argv, timeout_s=0, env=env)
        path = self.path(log)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(answer.stdout + answer.stderr)
        with self._lock:
            self._started += 1
            return self._started

    def default_workdir(self) -> str:
        """A folder below the root."""
        return "/data/local/tmp/stifarm"

    def path(self, device_path: str) -> Path:
        """The host file behind a device path."""
        return self._root / device_path.lstrip("/")
