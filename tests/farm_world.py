"""A small farm to test verbs on: a random 2 × 2 model, a task, its bundle, local devices; no Ray.

Run as a program it is a controller: ``python -m tests.farm_world ROOT UNITS`` drives a job of that many
probe units on the first device, so that tests can interrupt or kill it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import select

from db.models import AttemptRow, JobRow, JournalRecordRow
from orchestrator import fleet
from orchestrator.demo.demo_task import TASK, generate, tokenizer_json, vocabulary, write_tsv
from orchestrator.dispatch import Request, run_job
from orchestrator.farm import Farm, controlling, open_farm
from orchestrator.fleet import ReadyDevice
from orchestrator.interrupts import lost_interrupts_return
from orchestrator.library import (
    KnownBundle,
    Splits,
    find_bundle,
    make_bundle,
    register_model,
    register_task,
    tokenize_splits,
)
from orchestrator.measure import Work
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from sti_runtime.journal_format import parse_lines
from sti_runtime.messages import JournalRecord, ProbeUnit
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels
from sti_runtime.model_store import Model, make_model
from sti_runtime.storage import Storage, StorageCounter, anonymous_pages
from tests.agent_data import REPO
from tests.bundles import random_tensors
from tests.machine import Machine

DESK = "{name: desk, transport: local, threads: 1, labels: {kind: computer}}"
BOARD = (
    "{name: board, transport: local, threads: 1, labels: {kind: board}, "
    "emulate: {read_bandwidth: 20MB/s, mechanism: agent}}"
)
NAME = "tiny"
ROWS = 24

T = TypeVar("T")
R = TypeVar("R")


def write_inventory(root: Path, *devices: str) -> Path:
    """An inventory of these devices."""
    path = root / "inventory.yaml"
    path.write_text(f"version: 1\ndevices: [{', '.join(devices)}]\n")
    return path


def tiny_config() -> ModelConfig:
    """2 layers × 2 heads × 32 hidden, with the demo task's vocabulary and labels."""
    return ModelConfig(
        family="bert",
        layers=2,
        heads=2,
        hidden=32,
        ffn=64,
        vocab=len(vocabulary()),
        positions=40,
        position_offset=0,
        token_types=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        pad_id=0,
        head=HeadConfig(pooling="cls", activation="tanh", labels=TASK.labels),
    )


def tiny_model() -> Model:
    """Random weights, said to be trained, so that plans carry no flag of untrained submodels."""
    config = tiny_config()
    return make_model(
        config,
        random_tensors(config),
        tokenizer_json(),
        submodels=all_submodels(config.layers, config.heads),
        untrained=False,
        source="tests",
        provenance={},
    )


def tiny_splits(model: Model) -> Splits:
    """The demo task's sentences, few of them."""
    rows = generate(3 * ROWS, 5)
    return tokenize_splits(TASK, (rows[:ROWS], rows[ROWS : 2 * ROWS], rows[2 * ROWS :]), model)


def write_task_files(root: Path) -> tuple[Path, Path]:
    """Train and dev files of the demo task as a user's TSV."""
    train, dev = root / "train.tsv", root / "dev.tsv"
    write_tsv(train, generate(4 * ROWS, 1))
    write_tsv(dev, generate(ROWS, 2))
    return train, dev


@contextmanager
def open_world(root: Path) -> Iterator[Farm]:
    """The farm below ``root``, whose inventory is there."""
    with open_farm(load_settings(environ={}, cwd=root)) as farm:
        yield farm


def fill(farm: Farm) -> Work:
    """Model, task and bundle in the farm's home and store."""
    model = tiny_model()
    register_model(farm, model, NAME)
    register_task(farm, TASK, tiny_splits(model))
    return Work.of(farm, make_bundle(farm, NAME, name=None), TASK.name)


class InProcess:
    """Maps one item after the other in this process."""

    def map_tasks(
        self, function: Callable[[T], R], items: Iterable[T], *, num_cpus: float = 1
    ) -> Iterator[tuple[T, R]]:
        """(item, result) in the items' order."""
        for item in items:
            yield item, function(item)


def require_storage(root: Path) -> None:
    """Skips where no read can be proven to come from storage (a tmpfs): no device there has a profile."""
    path, size_bytes = root / "storage-probe", 1 << 16
    path.write_bytes(bytes(size_bytes))
    counter = StorageCounter()
    counter.join()
    with Storage(root, {path.name: size_bytes}, "direct") as storage:
        storage.evict()
        before = counter.read()
        storage.read(path.name, 0, [anonymous_pages(size_bytes)])
        after = counter.read()
    counter.close()
    path.unlink()
    if before is None or after is None or after - before < size_bytes:
        pytest.skip(f"{root}: reads here cannot be proven to come from storage, so no device can be profiled")


def score(farm: Farm, bundle: KnownBundle) -> int:
    """The importance profile of the bundle on the task; how many shards were scored now."""
    from orchestrator.scoring import score_importance  # with PyTorch, which a controller need not wait for

    return score_importance(farm, InProcess(), bundle, TASK.name, rows=ROWS, workers=1).scored


def make_ready(farm: Farm, worker: HostWorker, work: Work, name: str) -> ReadyDevice:
    """A device with bundle and rows on it."""
    device = next(item for item in farm.inventory.devices if item.name == name)
    rows = farm.settings.tasks / f"{work.task_data}.safetensors"
    deployed = fleet.deploy(farm, worker, [device], work.bundle.bundle.path, [rows])[0]
    assert deployed.error is None, deployed.error
    return fleet.ready_device(farm, worker, device, work.bundle.digest)


# ------------------------------------------------------------------ a job that takes a while


def machine_of(root: Path) -> Machine:
    """The machine that the jobs of ``probe_request`` wait for: the test's own, whatever else runs here."""
    return Machine(root / "machine.lock")


def probe_request(farm: Farm, worker: HostWorker, units: int, *, again: int = 0) -> Request:
    """A job of probe units on the first device; to verify a slowed one takes a bundle."""
    device = farm.inventory.devices[0]
    if device.emulated:
        work = Work.of(farm, find_bundle(farm, None), TASK.name)
        ready = make_ready(farm, worker, work, device.name)
    else:
        ready = fleet.ready_device(farm, worker, device, "0" * 64)
    return Request(
        device=device.name,
        device_id=ready.device_id,
        agent_digest=ready.facts.agent_digest,
        target=replace(ready.target, machine_lock=str(machine_of(farm.settings.home.parent).path)),
        kind="probe",
        bundle=None,
        task_data=None,
        units=tuple(ProbeUnit(number=number, kind="probe") for number in range(units)),
        again=again,
    )


@contextmanager
def as_controller(farm: Farm) -> Iterator[None]:
    """Be the controller of the farm's home, unless this process is."""
    if farm.controller is not None:
        yield
        return
    with controlling(farm):
        yield


def start_controller(root: Path, units: int) -> subprocess.Popen[str]:
    """A controller in a process of its own, driving such a job."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.farm_world", str(root), str(units)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _control(root: Path, units: int) -> None:
    with open_world(root) as farm, controlling(farm):
        worker = HostWorker(farm.settings, farm.inventory.devices)
        run_job(farm.store, worker, farm.owner, probe_request(farm, worker, units))


# ------------------------------------------------------------------ looking


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def job_folders(root: Path, device: str, kind: str) -> list[Path]:
    """Folders of the attempts of a kind of job on a device, oldest job and attempt first."""
    jobs = (root / ".stifarm/devices" / device / "jobs").glob(f"{kind}-*/*")
    return sorted(jobs, key=lambda path: (path.parent.stat().st_mtime_ns, int(path.name)))


def journal_lines(folder: Path) -> int:
    """Whole lines of an attempt's journal so far."""
    path = folder / "journal.log"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def journal(folder: Path) -> list[JournalRecord]:
    """All records of an attempt's journal, which must be whole."""
    data = (folder / "journal.log").read_bytes()
    found = parse_lines(data, offset=0, source=str(folder))
    assert found.problem is None
    assert found.next_offset == len(data)
    return list(found.records)


def agent_pid(folder: Path) -> int:
    """The process of the agent that runs an attempt."""
    return int(json.loads((folder / "pid").read_bytes())["pid"])


def stored_records(farm: Farm, job_id: str, attempt: int) -> list[JournalRecord]:
    """What the store holds of an attempt's journal, in order; every record of it was believed."""
    table = JournalRecordRow
    query = select(table).where(table.job_id == job_id, table.attempt == attempt).order_by(table.seq)
    with farm.store.reader() as session:
        rows = session.scalars(query).all()
        assert [row.rejected for row in rows] == [None] * len(rows)
        return [JournalRecord.from_json(row.record_json.encode(), source="store") for row in rows]


def attempts_of(farm: Farm, job_id: str) -> list[tuple[int, str]]:
    """(number, state) of a job's attempts."""
    query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)
    with farm.store.reader() as session:
        return [(row.number, row.state) for row in session.scalars(query)]


def job_states(farm: Farm) -> dict[str, str]:
    """Every job's state by id."""
    with farm.store.reader() as session:
        return {row.id: row.state for row in session.scalars(select(JobRow))}


if __name__ == "__main__":
    with lost_interrupts_return():
        _control(Path(sys.argv[1]), int(sys.argv[2]))
