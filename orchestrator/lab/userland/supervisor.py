"""What keeps a phone switched on: ``python -m orchestrator.lab.userland.supervisor FOLDER [--plain]``.

Boots the phone, notes in its folder what runs (STATE_FILE), and boots it again whenever its processes end,
each time under a new boot id, as a phone whose power or kernel fails does. SIGTERM switches it off. When
this process is killed the phone goes off by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from orchestrator.lab.userland.spec import BOOT_ID_FILE, DELAY_FILE, STATE_FILE, load_spec

READY_LIMIT_S = 120.0
_FAILURES_CAP = 3
"""Boots in a row that may fail before the phone stays off."""
_RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Off(BaseException):
    """The phone is to be switched off."""


def start_ticks(pid: int) -> int:
    """When a process started. Source: proc_pid_stat(5), field 22. Raises: OSError."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])


class Supervisor:
    """Boots one phone again and again."""

    def __init__(self, folder: Path, *, plain: bool) -> None:
        self._folder = folder
        self._plain = plain
        self._machine_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._boots = 0
        self._boot: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until switched off (0), or the phone does not come up (1)."""
        failures = 0
        try:
            while failures < _FAILURES_CAP:
                if self._one_boot():
                    failures = 0
                    time.sleep(self._delay_s())
                else:
                    failures += 1
                    time.sleep(_RETRY_S)
        except Off:
            return 0
        finally:
            self._end_boot()
            (self._folder / STATE_FILE).unlink(missing_ok=True)
        _log.error("the phone does not come up; it stays off")
        return 1

    def _one_boot(self) -> bool:
        """One boot from its beginning to its end; False when the phone never got ready."""
        boot_id = self._machine_boot if self._plain else str(uuid.uuid4())
        (self._folder / BOOT_ID_FILE).write_text(f"{boot_id}\n")
        argv = [sys.executable, "-P", "-m", "orchestrator.lab.userland.boot", str(self._folder)]
        options = ["--plain"] if self._plain else []
        self._boot = subprocess.Popen([*argv, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        said = _Lines(self._boot)
        first, ready = said.expect("init "), said.expect("listening on ")
        if first is not None and ready is not None:
            self._boots += 1
            self._write_state(int(first), int(ready), boot_id)
            self._boot.wait()
            _log.info("boot %d has ended with %d", self._boots, self._boot.returncode)
        self._end_boot()
        (self._folder / STATE_FILE).unlink(missing_ok=True)
        return first is not None and ready is not None

    def _end_boot(self) -> None:
        if self._boot is not None:
            # The first process of the phone dies with the one that waits for it, and all others with it.
            self._boot.kill()
            self._boot.wait()
            if self._boot.stdout is not None:
                self._boot.stdout.close()

    def _delay_s(self) -> float:
        """How long the phone stays off now; said by whoever had it end, else not at all."""
        path = self._folder / DELAY_FILE
        with contextlib.suppress(OSError, ValueError):
            delay_s = float(path.read_text())
            path.unlink()
            return max(delay_s, 0.0)
        return 0.0

    def _write_state(self, first: int, port: int, boot_id: str) -> None:
        state = {
            "supervisor": self._identity(os.getpid()),
            "first": self._identity(first),
            "port": port,
            "boot_id": boot_id,
            "boots": self._boots,
            "plain": self._plain,
        }
        path = self._folder / STATE_FILE
        replacement = path.with_suffix(".new")
        replacement.write_text(json.dumps(state))
        replacement.replace(path)

    def _identity(self, pid: int) -> dict[str, int | str]:
        return {"pid": pid, "start_ticks": start_ticks(pid), "boot": self._machine_boot}


class _Lines:
    """Lines that a boot prints, in time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._fd = process.stdout.fileno()
        self._data = b""
        self._deadline = time.monotonic() + READY_LIMIT_S

    def expect(self, start: str) -> str | None:
        """The rest of the next line, which starts so; None when it does not come."""
        while b"\n" not in self._data:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._fd], [], [], left_s)[0]:
                return None
            block = os.read(self._fd, 4096)
            if not block:
                return None
            self._data += block
        line, _, self._data = self._data.partition(b"\n")
        text = line.decode(errors="replace")
        return text.removeprefix(start) if text.startswith(start) else None


def _switch_off(number: int, frame: FrameType | None) -> None:
    raise Off


def main(argv: Sequence[str]) -> int:
    """Supervise until switched off."""
    logging.basicConfig(level=logging.INFO, format="phone: %(message)s")
    folder = Path(argv[0]).absolute()
    signal.signal(signal.SIGTERM, _switch_off)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    load_spec(folder)
    return Supervisor(folder, plain="--plain" in argv).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
