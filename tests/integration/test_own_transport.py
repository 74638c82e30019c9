"""Transports that the farm does not ship, made and registered as docs/adding-a-transport.md says.

What is done with their devices goes by their methods, before jobs and in recovery too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from orchestrator.errors import CommandTimeoutError, DeviceError, LinkError, StableError
from orchestrator.health.ladder import Budgets, Past, Reachable, next_step
from orchestrator.inventory import Device, RecoverySpec, parse_inventory
from orchestrator.recovering import Stepped
from orchestrator.settings import load_settings
from orchestrator.transports import TRANSPORTS, TransportKind
from orchestrator.transports.base import OUTPUT_CAP_BYTES, Completed
from orchestrator.transports.local import LocalTransport
from orchestrator.worker import HostWorker
from sti_runtime.messages import Job, Lease, ProbeUnit
from tests.agent_data import OPEN_GATES

MADE: dict[str, Console] = {}
"""Transports by device."""


class Console(LocalTransport):
    """This machine behind a console that boots, is switched off and on, and has a server in between."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.boot, self.off_for, self.boots_for = 1, 0, 0
        self.asked: list[str] = []
        self.answer: DeviceError | None = None
        """What the console answers to a reboot and to a new server."""

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
        if self.off_for > 0:
            self.off_for -= 1
            raise LinkError("the console is silent.", "Wait.", device=self.device)
        if list(argv) == ["cat", "/proc/sys/kernel/random/boot_id"]:
            return Completed(tuple(argv), 0, b"boot-%d\n" % self.boot, b"", truncated=False)
        return super().run(argv, timeout_s=timeout_s, env=env, output_cap_bytes=output_cap_bytes, stdin=stdin)

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        self.asked.append("start")
        return super().start_detached(argv, log=log, env=env)

    def not_yet(self) -> str:
        self.asked.append("not yet" if self.boots_for > 0 else "ready")
        if self.boots_for == 0:
            return ""
        self.boots_for -= 1
        return "its console shows no prompt yet"

    def reconnect(self) -> None:
        self.asked.append("reconnect")

    def replace_server(self) -> bool:
        self.asked.append("replace server")
        if self.answer is not None:
            raise self.answer
        return True

    def reboot(self) -> None:
        self.asked.append("reboot")
        self.boot, self.off_for, self.boots_for = self.boot + 1, 2, 1
        if self.answer is not None:
            raise self.answer


class Bare(LocalTransport):
    """One with nothing but what every transport has."""


def connect(device: Device) -> LocalTransport:
    """What a transport's module has."""
    if device.name == "bare":
        return Bare(device.name)
    return made(device.name)


def made(name: str) -> Console:
    """The transport of a device, which may be told how to behave before it is first used."""
    return MADE.setdefault(name, Console(name))


KINDS = {
    "console": TransportKind(__name__, server=True),
    "bare": TransportKind(__name__),
    "fixed": TransportKind(__name__, reboots=False),
}
"""The lines in the registry."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, kind in KINDS.items():
        monkeypatch.setitem(cast(dict[str, TransportKind], TRANSPORTS), name, kind)
    MADE.clear()
    yield
    MADE.clear()


@contextmanager
def reached(folder: Path, name: str, transport: str, *, reboot: bool = True) -> Iterator[HostWorker]:
    """A worker with one device over one of these transports."""
    text = f"version: 1\ndevices: [{{name: {name}, transport: local, threads: 1, workdir: {folder}/work}}]"
    (device,) = parse_inventory(text.encode(), folder / "inventory.yaml").devices
    device = replace(device, transport=transport, recovery=RecoverySpec(reboot=reboot))
    worker = HostWorker(load_settings(environ={}, cwd=folder), [device])
    try:
        yield worker
    finally:
        worker.close()


def a_job(worker: HostWorker, name: str, folder: Path) -> Job:
    facts = worker.facts(name)
    return Job(
        format="stifarm-job",
        version=1,
        id="job-1",
        attempt=1,
        lease=Lease(store="test", counter=1, takeover=False),
        device=facts.identity,
        bundle=None,
        task_data=None,
        engine=facts.engines[0],
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=str(folder / "machine.lock"),
        emulation=None,
        gates=OPEN_GATES,
        units=(ProbeUnit(number=0, kind="probe"),),
    )


def test_a_job_is_started_once_the_transport_says_that_the_device_is_ready(tmp_path: Path) -> None:
    with reached(tmp_path, "box", "console") as worker:
        job = a_job(worker, "box", tmp_path)
        console = MADE["box"]
        console.boots_for = 2
        assert worker.start_job("box", job)
        assert console.asked == ["not yet", "not yet", "ready", "start"]
        assert worker.progress("box").waits == ""
        for _ in range(100):
            polled = worker.poll("box", job.id, job.attempt, 0, 5.0)
            if polled.state != "running":
                break
        assert polled.state == "ended"
        worker.clean("box")


@pytest.mark.parametrize("answer", [None, LinkError, CommandTimeoutError])
def test_a_reboot_is_the_transports_and_ends_when_the_device_has_booted(
    tmp_path: Path, answer: type[DeviceError] | None
) -> None:
    with reached(tmp_path, "box", "console") as worker:
        console = made("box")
        console.answer = None if answer is None else answer("it was gone before it answered.", device="box")
        assert worker.recover("box", "reboot") == Stepped("recovered", "it has rebooted")
        assert console.asked == ["reboot", "not yet", "ready"]


def test_a_reboot_that_is_refused_or_not_to_be_had_says_why(tmp_path: Path) -> None:
    with reached(tmp_path, "box", "console") as worker:
        made("box").answer = StableError("the switch is locked.", "Unlock it.", device="box")
        assert worker.recover("box", "reboot") == Stepped("failed", "the switch is locked.")
    with reached(tmp_path, "bare", "bare") as worker:
        assert worker.recover("bare", "reboot") == Stepped("failed", "it is not rebooted from here.")
    with reached(tmp_path, "box", "console", reboot=False) as worker:
        assert worker.recover("box", "reboot").outcome == "skipped"


def test_the_lower_rungs_are_the_transports_too(tmp_path: Path) -> None:
    with reached(tmp_path, "box", "console") as worker:
        assert worker.recover("box", "reconnect").outcome == "recovered"
        assert worker.recover("box", "fresh-server").outcome == "recovered"
        console = MADE["box"]
        assert console.asked == ["reconnect", "replace server"]
        console.answer = StableError("no server can be started.", "Install one.", device="box")
        assert worker.recover("box", "fresh-server") == Stepped("failed", "no server can be started.")
    with reached(tmp_path, "bare", "bare") as worker:
        assert worker.recover("bare", "reconnect").outcome == "recovered"
        assert worker.recover("bare", "fresh-server").outcome == "skipped"


@pytest.mark.parametrize(
    ("transport", "rungs"),
    [
        ("console", ["reconnect", "fresh-server", "reboot", "quarantine"]),
        ("bare", ["reconnect", "reboot", "quarantine"]),
        ("fixed", ["reconnect", "quarantine"]),
    ],
)
def test_the_ladder_has_the_rungs_of_the_registry(transport: str, rungs: list[str]) -> None:
    budgets = Budgets({"reconnect": 1, "fresh-server": 1, "reboot": 1})
    past: list[Past] = []
    while not past or past[-1].step != "quarantine":
        step = next_step(past, 0, Reachable(transport, may_reboot=True), budgets)
        past.append(Past(step.step, "failed", 0))
    assert [each.step for each in past] == rungs
