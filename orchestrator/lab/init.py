"""The first process of a virtual device: ``python -I -S init.py CONFIG``. Uses the standard library only.

It says ``here`` on its output when it runs in the device's namespaces, waits for a line on its input (end of
file: whoever started it is gone, so it goes too), mounts what CONFIG names, starts the device's services and
says ``ready``, or ``failed`` with the reason. Then it reaps what the device leaves behind until it is killed;
as the first of its process namespace it takes every process of the device with it.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from typing import Any

_SET_SUBREAPER = 36
"""Source: prctl(2), PR_SET_CHILD_SUBREAPER: detached processes become ours where we are not pid 1."""

_LIMIT_S = 60


class StepError(Exception):
    """A step of the start failed; the text says which and why."""


def main(path: str) -> int:
    """Run the device; returns when it could not be started or its first service ended."""
    ctypes.CDLL(None).prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    say("here")
    if not sys.stdin.readline():
        return 1
    with open(path) as stream:  # noqa: PTH123 - pathlib would cost start-up time
        config = json.load(stream)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        if config["hostname"]:
            name = config["hostname"].encode()
            ctypes.CDLL(None).sethostname(name, len(name))
        for argv in config["steps"]:
            step(argv)
        services = [start(service, null) for service in config["services"]]
    except StepError as error:
        say(f"failed {error}")
        return 1
    say("ready")
    for standard in (0, 1):
        os.dup2(null, standard)
    while True:
        pid, _ = os.wait()
        if pid == services[0].pid:
            return 1


def say(line: str) -> None:
    """A line to whoever started us."""
    os.write(1, f"{line}\n".encode())


def step(argv: list[str]) -> None:
    """Run one command of the start."""
    try:
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepError(f"{argv[0]}: {error}") from error
    if done.returncode != 0:
        raise StepError(f"{' '.join(argv)}: {done.stderr.decode(errors='replace').strip()}")


def start(service: dict[str, Any], null: int) -> subprocess.Popen[bytes]:
    """Start a service in a session of its own; its output goes to the device's log, our standard error."""
    environment = {**os.environ, **service.get("env", {})}
    try:
        return subprocess.Popen(
            service["argv"], stdin=null, stdout=2, env=environment, start_new_session=True
        )
    except OSError as error:
        raise StepError(f"{service['argv'][0]}: {error}") from error


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1]))
