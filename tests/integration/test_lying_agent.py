"""Agents that lie to their host: every answer is refused with a reason, and the other devices go on."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import fleet
from orchestrator.agent_push import MACHINES, AgentFile, agent_file
from orchestrator.errors import DeviceError, StableError
from orchestrator.inventory import load_inventory
from orchestrator.settings import load_settings
from orchestrator.tailing import agent_runs, parse_journal_paths, read_journal
from orchestrator.transports.local import LocalTransport
from orchestrator.worker import HostWorker
from sti_runtime.journal_format import PROTOCOL_VERSION
from tests.agent_data import tiny_bundle
from tests.farm_world import open_world, write_inventory

MESSAGE_CAP = 10_000
"""No message about a device is longer, whatever the device said."""


class Liar:
    """A device of this machine in whose agent's place a script answers what the test has it answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spool = folder, folder / "spool"
        (folder / "answers").mkdir(parents=True)
        agent = agent_file(MACHINES[platform.machine()], "liar")
        self._states = {
            "agent": "stifarm-agent",
            "agent_digest": agent.digest,
            "protocol": PROTOCOL_VERSION,
            "identity": "1" * 16,
        }
        self.says("version", {})
        self.says("has", {"bundles": [], "incoming": [], "partial": {}, "tasks": []})
        self._install(agent)

    def _install(self, agent: AgentFile) -> None:
        path = Path(agent.place(str(self.spool)))
        path.parent.mkdir(parents=True)
        path.write_text(
            f'#!/bin/sh\ncat > /dev/null\ncat "{self.folder}/answers/$1"\n'
            f'[ ! -e "{self.folder}/answers/$1.fails" ]\n'
        )
        path.chmod(0o755)

    def says(self, verb: str, answer: dict[str, Any] | bytes, *, fails: bool = False) -> None:
        """What a verb answers; an object gets what every agent states of itself."""
        said = answer if isinstance(answer, bytes) else json.dumps({**self._states, **answer}).encode()
        (self.folder / f"answers/{verb}").write_bytes(said)
        mark = self.folder / f"answers/{verb}.fails"
        mark.touch() if fails else mark.unlink(missing_ok=True)


@pytest.fixture
def liar(tmp_path: Path) -> Liar:
    return Liar(tmp_path / "liar")


@pytest.fixture
def worker(tmp_path: Path, liar: Liar) -> Iterator[HostWorker]:
    """The liar, and an honest device behind it."""
    write_inventory(
        tmp_path,
        f"{{name: liar, transport: local, threads: 1, workdir: {liar.spool}}}",
        "{name: desk, transport: local, threads: 1, workdir: work}",
    )
    devices = load_inventory(tmp_path / "inventory.yaml").devices
    started = HostWorker(load_settings(environ={}, cwd=tmp_path), devices)
    yield started
    started.close()


def refused(caught: pytest.ExceptionInfo[DeviceError]) -> str:
    text = str(caught.value)
    assert text.startswith("liar: ")
    assert len(text) < MESSAGE_CAP
    return text


def test_facts(worker: HostWorker, liar: Liar) -> None:
    honest = worker.facts("desk").to_json()
    changes: list[dict[str, Any]] = [
        {"memory_bytes": -1},
        {"memory_bytes": 1 << 200},
        {"identity": "\x1b[2J"},
        {"identity": "../../etc"},
        {"agent_digest": "0" * 63},
        {"cpus": [10**30]},
        {"kernel": "x" * 600},
        {"cpu_features": "x"},
        {"wall_ns": float("nan")},
        {"unheard_of": 1},
    ]
    lies = [
        b"",
        b"x" * 10_000_000,
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b"[]",
        b"9" * 100_000,
        honest + b"{}",
        *(json.dumps({**json.loads(honest), **change}).encode() for change in changes),
    ]
    for lie in lies:
        liar.says("facts", lie)
        with pytest.raises(StableError) as caught:
            worker.facts("liar")
        refused(caught)
    liar.says("facts", honest)
    assert worker.facts("liar").to_json() == honest


def test_errors(worker: HostWorker, liar: Liar) -> None:
    error = {"type": "x" * 100_000, "what": "\x1b[2J" * 100_000, "remedy": "y" * 100_000}
    for lie in ({"error": error}, {"error": 1}, b"x" * 10_000_000, b"[" * 1_000_000, b""):
        liar.says("facts", lie, fails=True)
        with pytest.raises(StableError, match="the agent's facts failed") as caught:
            worker.facts("liar")
        refused(caught)


def test_deploys(worker: HostWorker, liar: Liar, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundles")

    def require_refused(reason: str) -> None:
        with pytest.raises(StableError, match=reason) as caught:
            worker.deploy("liar", bundle)
        refused(caught)

    holdings: list[dict[str, Any]] = [{"bundles": 1}, {"bundles": [1]}, {"bundles": [], "incoming": []}]
    for held in holdings:
        liar.says("has", held)
        require_refused("does not say what the device holds")
    liar.says("has", {"bundles": [], "incoming": [], "partial": {}, "tasks": []})
    for missing in (
        [-1],
        [10**9],
        [True],
        [0, 0],
        ["../x"],
        "all",
        {"0": 0},
        None,
        [0.0],
        list(range(100_000)),
    ):
        liar.says("missing", {"missing": missing, "complete": "yes"})
        require_refused("names chunks that the bundle has not")
    liar.says("missing", {"missing": [0], "complete": False})
    outcomes: list[dict[str, Any]] = [
        {"rejected": [0]}, {"rejected": [10**9]}, {"rejected": []}, {"state": "committed"}, {},
        {"rejected": [1], "state": "incoming", "remaining": 9},
    ]  # fmt: skip
    for accepted in outcomes:
        liar.says("accept", accepted)
        require_refused("arrived damaged twice|names chunks that|took every chunk and still lacks")
    liar.says("accept", {"rejected": [], "state": "committed"})
    assert (
        worker.deploy("liar", bundle)[0].chunks_sent == 1
    )  # it is believed as far as it can be; then asked:
    liar.says("verify", {"state": "damaged", "damaged": ["\x1b[2J" * 10_000]})
    with pytest.raises(StableError, match="was damaged on its storage") as caught:
        worker.verify("liar", bundle.name)
    refused(caught)


def test_the_other_devices_of_a_fleet_go_on(worker: HostWorker, liar: Liar, tmp_path: Path) -> None:
    liar.says("facts", b"[" * 1_000_000)
    bundle = tiny_bundle(tmp_path / "bundles")
    with open_world(tmp_path) as farm:
        first, second = fleet.deploy(farm, worker, farm.inventory.devices, bundle, ())
    assert (first.device, second.device) == ("liar", "desk")
    assert "gave no JSON" in str(first.error) or "the agent's facts" in str(first.error)
    assert second.error is None
    assert second.reports[0].chunks_sent > 0


# ------------------------------------------------------------------ files


def line(body: str, seq: int = 0) -> bytes:
    return b"%d %08x %s\n" % (seq, zlib.crc32(body.encode()), body.encode())


def record(**changes: Any) -> str:
    payload = {"type": "failure", "unit": 0, "error": "E", "what": "w", "remedy": ""}
    whole = {"seq": 0, "boot_id": "b", "wall_ns": 1, "payload": payload}
    return json.dumps({**whole, **changes}, separators=(",", ":"), sort_keys=True)


def test_journals(tmp_path: Path) -> None:
    transport = LocalTransport("liar")
    path = tmp_path / "journal.log"
    path.write_bytes(line(record()))
    assert len(read_journal(transport, str(path), 0, running=True).records) == 1
    lies = [
        line(record(seq=5), 5),
        line(record(seq=1), 0),
        line(record(wall_ns=-1)),
        line(record(wall_ns=10**30)),
        line(record(wall_ns=float("nan"))),
        line(record(wall_ns=float("inf"))),
        line(record(payload={"type": "result", "unit": 0, "result": {"kind": "../../x"}})),
        line(record(payload=None)),
        line("[" * 100_000),
        line("9" * 5000),
        b"x" * 5_000_000,
        b"0 00000000 {}\n" * 2,
        b"-1 00000000 {}\n" * 2,
    ]
    for lie in lies:
        path.write_bytes(lie)
        polled = read_journal(transport, str(path), 0, running=True)
        assert (polled.state, polled.records) == ("damaged", ())
        assert str(path) in polled.detail
        assert len(polled.detail) < MESSAGE_CAP


def test_who_runs(tmp_path: Path) -> None:
    transport = LocalTransport("liar")
    for lie in (
        b"[" * 4096,
        b'{"pid": Infinity, "start_ticks": 1}',
        b'{"pid": "../../etc/passwd", "start_ticks": 1}',
        b'{"pid": ' + b"9" * 4000 + b', "start_ticks": 1}',
        b'{"pid": 1, "start_ticks": NaN}',
        b'{"pid": [], "start_ticks": {}}',
        b"\xff",
        b"",
    ):
        (tmp_path / "pid").write_bytes(lie)
        assert not agent_runs(transport, str(tmp_path))


def test_names_of_journals() -> None:
    names = [
        "job-1/1", "../../etc/1", "job/../1", "a\nb/1", "job/1/../..", "job/-1", "job/0", "job/1e9", "JOB/1",
        "x/" + "9" * 99, "\x1b[2J/1",
    ]  # fmt: skip
    output = "".join(f"/spool/jobs/{name}/journal.log\n" for name in names).encode()
    assert parse_journal_paths(output, "/spool/jobs") == [("job-1", 1)]
