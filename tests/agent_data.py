"""Small real inputs for the agent's tests: bundles, packs, jobs, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.accepting import accept
from agent.accepting_task import accept_task
from agent.identity import device_identity
from agent.spool import Spool
from sti_runtime.bundle_build import build_bundle
from sti_runtime.manifest import MANIFEST_NAME, Manifest
from sti_runtime.messages import Emulation, Gates, Job, Lease, ProbeUnit
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes

REPO = Path(__file__).resolve().parent.parent
OPEN_GATES = Gates(
    max_temperature_milli_c=None,
    min_battery_percent=None,
    max_load_milli=None,
    min_free_bytes=None,
    wait_limit_s=0,
)
CONFIG = ModelConfig(
    family="bert", layers=2, heads=2, hidden=16, ffn=32, vocab=40, positions=16, position_offset=0,
    token_types=2, layer_norm_eps=1e-12, activation="gelu", pad_id=0,
    head=HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes")),
)  # fmt: skip


def tiny_bundle(
    root: Path, *, seed: int = 0, fidelities: tuple[int, ...] = (2, 32), config: ModelConfig = CONFIG
) -> Path:
    """A bundle of a small model (2 × 2 by default) with random weights, below ``root``."""
    random = np.random.default_rng(seed)
    shapes = tensor_shapes(config).items()
    return build_bundle(
        config,
        {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes},
        model_digest=f"{seed:064x}",
        submodels=all_submodels(config.layers, config.heads),
        untrained=True,
        out_root=root,
        fidelities=fidelities,
    )


def manifest_of(bundle: Path) -> Manifest:
    """The manifest of a bundle folder."""
    return Manifest.read(bundle / MANIFEST_NAME)


def make_pack(spool: Spool, bundle: Path, indices: Sequence[int]) -> Path:
    """A file with a pack of those chunks, beside the spool: what `accept` gets as its input."""
    chunks = manifest_of(bundle).all_chunks()
    parts = [json.dumps(list(indices)).encode() + b"\n"]
    for index in indices:
        file, chunk = chunks[index]
        parts.append((bundle / file).read_bytes()[chunk.offset : chunk.offset + chunk.length])
    path = spool.root.with_name(f"{spool.root.name}.pack")
    path.write_bytes(b"".join(parts))
    return path


def accept_pack(spool: Spool, digest: str, pack: Path, **options: Any) -> dict[str, Any]:
    """The torch agent's `accept` of a file, in this process."""
    with pack.open("rb") as stream:
        return accept(spool, digest, stream.fileno(), **options)


def task_piece(spool: Spool, offset: int, data: bytes, total: int) -> Path:
    """A file with a piece of task data, beside the spool: what `accept-task` gets as its input."""
    path = spool.root.with_name(f"{spool.root.name}.piece")
    path.write_bytes(b"[%d,%d,%d]\n" % (offset, len(data), total) + data)
    return path


def last_piece(spool: Spool, digest: str) -> Path:
    """The piece that is left to send where the device holds all of the task data's bytes."""
    partial = spool.task_partial(digest)
    held = partial.stat().st_size if partial.exists() else 0
    return task_piece(spool, held, b"", held)


def accept_held(spool: Spool, digest: str) -> dict[str, Any]:
    """The torch agent's `accept-task` of what lies there already, in this process."""
    with last_piece(spool, digest).open("rb") as stream:
        return accept_task(spool, digest, stream.fileno())


def make_job(spool: Spool, **changes: Any) -> Job:
    """A job of ten probe units for this device; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "format": "stifarm-job", "version": 1, "id": "probe", "attempt": 1,
        "lease": Lease(store="store-a", counter=1, takeover=False), "device": device_identity(spool)[0],
        "bundle": None, "task_data": None, "engine": "torch", "threads": 1, "queue_depth": 1, "cpus": (),
        "machine_lock": None, "emulation": None, "gates": OPEN_GATES, "units": probes(10),
    }  # fmt: skip
    return Job(**(fields | changes))


def probes(count: int) -> tuple[ProbeUnit, ...]:
    """``count`` probe units."""
    return tuple(ProbeUnit(number=number, kind="probe") for number in range(count))


def agent_emulation(io_bytes_per_s: int) -> Emulation:
    """Emulation by the agent's own IO throttle."""
    return Emulation(
        io_bytes_per_s=io_bytes_per_s, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None
    )


def push_job(spool: Spool, job: Job) -> Path:
    """Write the job file to its place; returns its path."""
    folder = spool.job(job.id, job.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_bytes(job.to_json())
    return path


def start_agent(
    *arguments: object, stdin: Path = Path(os.devnull), **options: Any
) -> subprocess.Popen[bytes]:
    """Start ``python -m agent``; ``stdin``: the file that is its input."""
    argv = [sys.executable, "-m", "agent", *map(str, arguments)]
    with stdin.open("rb") as source:
        return subprocess.Popen(
            argv, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=source, **options
        )


def call_agent(*arguments: object, timeout_s: float = 300, **options: Any) -> tuple[int, dict[str, Any]]:
    """Run one verb to its end; returns its exit code and what it printed."""
    process = start_agent(*arguments, **options)
    output, errors = process.communicate(timeout=timeout_s)
    assert output, errors.decode()
    report: dict[str, Any] = json.loads(output)
    return process.returncode, report
