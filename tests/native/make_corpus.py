"""Writes the fuzz targets' corpora: small real documents. After a change of format, before ``grow_corpus``.

::

    python -m tests.native.make_corpus
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.journal_format import encode_line
from sti_runtime.messages import (
    AndroidSetting,
    ComputeProfileUnit,
    EndRecord,
    EvaluateUnit,
    ExecuteUnit,
    FailureRecord,
    FileSetting,
    FixedProfileUnit,
    Gates,
    IdleSetting,
    IoProfileUnit,
    Job,
    JournalRecord,
    Lease,
    ProbeResult,
    ProbeUnit,
    ResultRecord,
    Sensors,
    Setting,
    StartRecord,
)
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, all_submodels
from sti_runtime.plan import Plan
from sti_runtime.quantizer import GOBO, Quantizer
from tests.bundles import hand_plan, random_sensitivity, random_tensors

CORPUS = Path(__file__).with_name("corpus")
GROWN = "grown"
"""Begins the names of what ``grow_corpus`` adds."""
SPARSE = Quantizer("converged", -500, "fisher")
"""Dense and sparse: outliers enough that some are of the most sensitive weights."""
BOOT = "8a7e5f8c-0000-4000-8000-000000000000"


def config(**changes: Any) -> ModelConfig:
    """The smallest BERT."""
    fields: dict[str, Any] = {
        "family": "bert", "layers": 1, "heads": 2, "hidden": 8, "ffn": 8, "vocab": 9, "positions": 8,
        "position_offset": 0, "token_types": 2, "layer_norm_eps": 1e-12, "activation": "gelu", "pad_id": 0,
        "head": HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes")),
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def small_bundle(
    root: Path, model: ModelConfig, fidelities: tuple[int, ...], quantizer: Quantizer = GOBO
) -> Bundle:
    """A bundle of random weights below ``root``."""
    path = build_bundle(
        model,
        random_tensors(model),
        model_digest="a" * 64,
        submodels=all_submodels(model.layers, model.heads),
        untrained=True,
        out_root=root,
        fidelities=fidelities,
        quantizer=quantizer,
        head_encoding="gobo6" if model.head is not None else "f32",
        sensitivity=random_sensitivity(model) if quantizer.codec == "fisher" else None,
    )
    return Bundle.open(path)


def _plans(bundle: Bundle) -> list[Plan]:
    streamed = hand_plan(bundle.manifest, Submodel(kept=(0,), width=2), lambda i, j: 2)
    held = hand_plan(
        bundle.manifest, Submodel(kept=(0,), width=2), lambda i, j: 32 if j else 2, preloaded={(0, 0)}
    )
    timed = json.loads(held.to_json())
    timed["predicted"]["layers"] = [
        {"io_start_ns": 0, "io_end_ns": 5, "compute_start_ns": 5, "compute_end_ns": 9}
    ]
    timed |= {"flags": ["unfit-profile"], "importance": "b" * 64, "mode": "load-exec"}
    return [streamed, Plan.from_json(json.dumps(timed).encode(), source="timed")]


def _jobs(plan: Plan) -> list[Job]:
    gates = Gates(
        max_temperature_milli_c=45000,
        min_battery_percent=None,
        max_load_milli=None,
        min_free_bytes=0,
        wait_limit_s=1,
        governor="performance",
        min_khz=1_800_000,
    )
    common: dict[str, Any] = {
        "format": "stifarm-job", "version": 1, "id": "job-1", "attempt": 1, "device": "0123456789abcdef",
        "lease": Lease(store="s", counter=3, takeover=False), "bundle": plan.bundle, "task_data": "c" * 64,
        "engine": "native", "threads": 2, "queue_depth": 4, "cpus": (0, 1), "machine_lock": None,
        "emulation": None, "gates": gates,
    }  # fmt: skip
    profiling = (
        ProbeUnit(number=0, kind="probe"),
        IoProfileUnit(number=1, kind="profile-io", widths=(1, 2), fidelities=(2,), repeats=3, seed=7),
        ComputeProfileUnit(number=2, kind="profile-compute", width=2, fidelities=(2,), warmups=0, repeats=1),
        FixedProfileUnit(number=3, kind="profile-fixed", warmups=1, rows=(0, 1)),
    )
    running = (
        ExecuteUnit(
            number=0, kind="execute", plan=plan, request_kind="warm", io_mode="direct", warmups=0, rows=(4, 5)
        ),
        EvaluateUnit(number=1, kind="evaluate", plan=plan, batch=8),
    )
    settings: tuple[Setting, ...] = (
        FileSetting(kind="file", path="/sys/devices/cpu/policy*/governor", value="performance"),
        IdleSetting(kind="idle", latency_us=10),
        AndroidSetting(kind="android", namespace="global", key="stay_on", value="7"),
    )
    return [Job(**common, units=profiling), Job(**common, settings=settings, units=running)]


def _journals() -> list[bytes]:
    sensors = Sensors(
        wall_ns=5, temperature_milli_c=None, cpu_khz=(1,), load_milli=2, available_memory_bytes=3,
        free_bytes=4, battery_percent=None, throttled=False,
    )  # fmt: skip
    start = StartRecord(
        type="start", job="job-1", attempt=1, lease=Lease(store="s", counter=3, takeover=False),
        first_unit=0, agent="1.0", agent_digest="d" * 64, protocol=1, emulated=False, sensors=sensors,
    )  # fmt: skip
    probe = ProbeResult(kind="probe", sensors=sensors, verified=None)
    payloads: tuple[StartRecord | ResultRecord | FailureRecord | EndRecord, ...] = (
        start,
        ResultRecord(type="result", unit=0, result=probe),
        FailureRecord(type="failure", unit=1, error="GateError", what="shut: é\n", remedy=""),
        EndRecord(type="end", done=1, failed=1, refused=None),
    )
    lines = [
        encode_line(JournalRecord(seq=seq, boot_id=BOOT, wall_ns=9, payload=payload))
        for seq, payload in enumerate(payloads)
    ]
    return [b"".join(lines), b"".join(lines[:2]) + lines[2][:40], b""]


def corpora() -> dict[str, list[bytes]]:
    """Documents by kind."""
    with tempfile.TemporaryDirectory() as folder:
        headed = small_bundle(Path(folder), config(), (2, 32))
        bare = small_bundle(
            Path(folder), config(head=None, token_types=0, layer_norm_eps=1e-05, heads=1), (5,)
        )
        close = small_bundle(Path(folder), config(), (6,), Quantizer("converged", -500))
        weighed = small_bundle(Path(folder), config(), (3, 32), SPARSE)
        plans = _plans(headed)
        return {
            "manifest": [b.manifest.to_json() for b in (headed, bare, close, weighed)],
            "plan": [plan.to_json() for plan in plans],
            "job": [job.to_json() for job in _jobs(plans[0])],
            "journal": _journals(),
            "pack": [b"[0,1,2,3,99,98,50,10,11,12]\n", b"[ 7, 42 ]\n"],
        }


def main() -> None:
    """Write all corpora anew."""
    for kind, documents in corpora().items():
        folder = CORPUS / kind
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{kind}-*"):
            old.unlink()
        for number, data in enumerate(documents):
            (folder / f"{kind}-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
