"""A small, complete world for store tests: model, bundle, task data, plan, job and its journal."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.artifacts import save_bundle, save_model, save_task, save_task_data
from db.devices import record_facts, register_device
from db.jobs import begin_attempt, create_job
from db.plans import save_plan
from db.profiles import save_device_profile
from sti_runtime.manifest import ALIGNMENT, Manifest, QuantizerInfo, Region, Version
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    ComputeSample,
    Emulation,
    EndRecord,
    EvaluateResult,
    EvaluateUnit,
    ExecuteResult,
    ExecuteUnit,
    FixedProfileResult,
    FixedProfileUnit,
    FixedSample,
    Gates,
    GateVerdict,
    IoProfileResult,
    IoProfileUnit,
    IoSample,
    Job,
    JournalRecord,
    LayerTrace,
    Lease,
    MemoryParts,
    Payload,
    ProbeResult,
    ProbeUnit,
    Reading,
    RequestSample,
    ResultRecord,
    Sensors,
    StartRecord,
    Unit,
    UnitResult,
    Verdict,
    VerifiedEmulation,
)
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, all_submodels
from sti_runtime.plan import LayerTime, Plan, PlannedShard, Prediction
from sti_runtime.profile import PPM, DeviceProfile, FidelityTime, FixedTime, IoFit, ReadCost, WidthTime
from sti_runtime.records import Record

MODEL = "a" * 64
DATA = "d" * 64
AGENT = "e" * 64
TASK = "sst-2"
LENGTH = 16
DATA_ROWS = 40
WALL_NS = 1_700_000_000_000_000_000
STEP_NS = 10_000_000_000
CONFIG = ModelConfig(
    family="bert",
    layers=2,
    heads=2,
    hidden=8,
    ffn=16,
    vocab=100,
    positions=32,
    position_offset=0,
    token_types=2,
    layer_norm_eps=1e-12,
    activation="gelu",
    pad_id=0,
    head=HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes")),
)


class Spec(Record):
    """Stands for any specification document."""

    name: str


@dataclass(frozen=True)
class World:
    """Ids of what ``populate`` made."""

    device_id: int
    bundle: str
    profile: str
    plan: Plan
    job: Job


def manifest(refined: bool = True) -> Manifest:
    """A bundle of four shards at 2 bits; another digest with ``refined`` false."""
    versions = tuple(
        Version(
            offset=i * ALIGNMENT,
            length=ALIGNMENT,
            payload_bytes=100,
            outliers=(0, 0, 0, 0, 0, 0),
            sha256="b" * 64,
        )
        for i in range(4)
    )
    return Manifest(
        format="stifarm-bundle",
        version=1,
        model=CONFIG,
        model_digest=MODEL,
        untrained=True,
        submodels=all_submodels(2, 2),
        quantizer=QuantizerInfo(name="gobo", refined=refined, outlier_log_density_milli=-4000),
        regions=(Region(fidelity=2, file="k2.bin", versions=versions),),
        resident=(),
        embeddings=(),
        files=(),
    )


def device_profile(bundle: str, *, emulated: bool = False, alpha_ns: int = 1000) -> DeviceProfile:
    """A good profile; ``alpha_ns`` makes it another one."""
    fixed = FixedTime(embed_io_ns=10, embed_compute_ns=10, head_ns=10, samples=5)
    return DeviceProfile(
        format="stifarm-device-profile",
        version=1,
        bundle=bundle,
        engine="torch",
        sequence_length=LENGTH,
        threads=2,
        queue_depth=2,
        emulated=emulated,
        io=IoFit(
            alpha_ns=alpha_ns,
            ps_per_byte=10,
            p95_ppm=1_100_000,
            error_ppm=1000,
            samples=9,
            beside_ppm=PPM,
            beside_samples=9,
        ),
        compute=(WidthTime(width=2, median_ns=100, p95_ns=120, samples=9),),
        decompress=(FidelityTime(fidelity=2, median_ns=10, p95_ns=12, samples=9),),
        read_cost=ReadCost(
            median_layer_ns=3, p95_layer_ns=4, median_ps_per_byte=1, p95_ps_per_byte=2, samples=9
        ),
        fixed_median=fixed,
        fixed_p95=fixed,
        unfit=(),
    )


def plan(bundle: str, profile: str, *, target_ns: int = 5_000_000, working_bytes: int = 100_000) -> Plan:
    """A 1 × 2 plan that streams both shards."""
    shards = tuple(
        PlannedShard(
            layer=0,
            source_layer=0,
            slice=i,
            fidelity=2,
            offset=i * ALIGNMENT,
            length=ALIGNMENT,
            preloaded=False,
            order=i,
        )
        for i in range(2)
    )
    predicted = Prediction(
        latency_ns=3_000_000,
        median_latency_ns=2_500_000,
        fixed_ns=30,
        stall_ns=1000,
        layers=(LayerTime(io_start_ns=0, io_end_ns=1, compute_start_ns=1, compute_end_ns=2),),
    )
    return Plan(
        format="stifarm-plan",
        version=1,
        planner="paper",
        policy="sti",
        mode="pipeline",
        slack=True,
        bundle=bundle,
        importance=None,
        device_profile=profile,
        target_ns=target_ns,
        preload_bytes=0,
        working_bytes=working_bytes,
        sequence_length=LENGTH,
        submodel=Submodel(kept=(0,), width=2),
        shards=shards,
        predicted=predicted,
        within_target=True,
        flags=(),
    )


SLOWED = Emulation(io_bytes_per_s=20_000_000, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None)


def job(
    bundle: str, executed: Plan, *, job_id: str = "job-1", identity: str = "hw-1", emulated: bool = False
) -> Job:
    """One unit of every kind; unit 4 executes 12 requests of which 2 are warm-ups."""
    units: tuple[Unit, ...] = (
        ProbeUnit(number=0, kind="probe"),
        IoProfileUnit(number=1, kind="profile-io", widths=(2,), fidelities=(2,), repeats=3, seed=0),
        ComputeProfileUnit(number=2, kind="profile-compute", width=2, fidelities=(2,), warmups=1, repeats=3),
        FixedProfileUnit(number=3, kind="profile-fixed", warmups=1, rows=(0, 1, 2)),
        ExecuteUnit(
            number=4,
            kind="execute",
            plan=executed,
            request_kind="warm",
            io_mode="direct",
            warmups=2,
            rows=tuple(range(12)),
        ),
        EvaluateUnit(number=5, kind="evaluate", plan=executed, batch=8),
    )
    return Job(
        format="stifarm-job",
        version=1,
        id=job_id,
        attempt=1,
        lease=Lease(store="s", counter=1, takeover=False),
        device=identity,
        bundle=bundle,
        task_data=DATA,
        engine="torch",
        threads=2,
        queue_depth=2,
        cpus=(),
        machine_lock=None,
        emulation=SLOWED if emulated else None,
        gates=Gates(
            max_temperature_milli_c=None,
            min_battery_percent=None,
            max_load_milli=None,
            min_free_bytes=None,
            wait_limit_s=0,
        ),
        units=units,
    )


SENSORS = Sensors(
    wall_ns=WALL_NS,
    temperature_milli_c=40_000,
    cpu_khz=(2_000_000, 2_000_000),
    load_milli=500,
    available_memory_bytes=10**9,
    free_bytes=10**9,
    battery_percent=None,
    throttled=None,
)


READING = Reading(
    after=0,
    clocks_khz=(2_000_000,),
    ceilings_khz=(2_400_000,),
    temperature_milli_c=40_000,
    load_milli=500,
    available_memory_bytes=10**9,
    throttled=False,
)


def request(row: int, *, warmup: bool = False, latency_ns: int | None = None) -> RequestSample:
    """A valid request whose latency depends on its row."""
    latency = 2_000_000 + row * 10_000 if latency_ns is None else latency_ns
    return RequestSample(
        row=row,
        warmup=warmup,
        latency_ns=latency,
        stall_ns=latency // 10,
        planned_bytes=8192,
        storage_bytes=8192,
        mode_asked="direct",
        mode_proven="direct",
        logits=(0.25, -0.5),
        trace=(
            LayerTrace(
                io_start_ns=0,
                io_end_ns=1000,
                bytes=8192,
                compute_start_ns=1000,
                compute_end_ns=2000,
                decompress_ns=10,
                stall_ns=latency // 10,
            ),
        ),
        verdict=Verdict(valid=True, reasons=()),
    )


def execute_result(
    executed: Plan,
    requests: tuple[RequestSample, ...] | None = None,
    gates: tuple[GateVerdict, ...] = (),
) -> ExecuteResult:
    """The result of unit 4."""
    made = tuple(request(i, warmup=i < 2) for i in range(12)) if requests is None else requests
    return ExecuteResult(
        kind="execute",
        plan_digest=executed.digest,
        request_kind="warm",
        io_mode="direct",
        io_mode_proven="direct",
        readings=(READING, READING.model_copy(update={"after": len(made)})),
        requests=made,
        memory=MemoryParts(resident=10, preload=20, working=30, activations=40, process_peak_bytes=None),
        before=SENSORS,
        after=SENSORS,
        gates=gates,
    )


def evaluate_result(executed: Plan, *, correct: int = 30) -> EvaluateResult:
    """The result of unit 5."""
    return EvaluateResult(
        kind="evaluate",
        content_digest=executed.content_digest,
        rows=DATA_ROWS,
        correct=correct,
        loss=0.5,
        predictions=(1,) * DATA_ROWS,
    )


def results(executed: Plan, *, emulated: bool = False) -> list[UnitResult]:
    """A believable result of every unit of ``job``."""
    verified = VerifiedEmulation(
        emulation=SLOWED,
        io_bytes_per_s=19_900_000,
        read_bytes=8192,
        read_p50_ns=410_000,
        read_nominal_ns=409_600,
        cpu_share_milli=None,
        section_cpu_ns=None,
        section_p50_ns=None,
        section_nominal_ns=None,
    )
    io = IoSample(
        versions=2, bytes=8192, storage_bytes=8192, duration_ns=100_000, mode_asked="direct",
        mode_proven="direct", throttled=False, valid=True,
    )  # fmt: skip
    compute = ComputeSample(
        width=2, fidelity=2, read_bytes=0, decompress_ns=20, compute_ns=100, throttled=False, warmup=False
    )
    fixed = FixedSample(
        embed_io_ns=10, embed_compute_ns=11, head_ns=12, bytes=4096, storage_bytes=4096, mode_asked="direct",
        mode_proven="direct", throttled=False, warmup=False,
    )  # fmt: skip
    short = io.model_copy(
        update={"storage_bytes": 0, "duration_ns": 100, "mode_proven": "cached", "valid": False}
    )
    return [
        ProbeResult(kind="probe", sensors=SENSORS, verified=verified if emulated else None),
        IoProfileResult(kind="profile-io", io_mode="direct", readings=(READING,), samples=(io, io, short)),
        ComputeProfileResult(
            kind="profile-compute",
            io_mode="direct",
            readings=(READING,),
            samples=(compute.model_copy(update={"warmup": True}), compute, compute),
            reads=(io.model_copy(update={"duration_ns": 150_000}), short),
        ),
        FixedProfileResult(kind="profile-fixed", readings=(), samples=(fixed, fixed)),
        execute_result(executed),
        evaluate_result(executed),
    ]


def start_record(of: Job, *, emulated: bool = False, agent_digest: str = AGENT) -> StartRecord:
    """The record an agent begins with."""
    return StartRecord(
        type="start",
        job=of.id,
        attempt=of.attempt,
        lease=of.lease,
        first_unit=0,
        agent="stifarm-agent torch 0.1.0",
        agent_digest=agent_digest,
        protocol=1,
        emulated=emulated,
        sensors=SENSORS,
    )


def numbered(payloads: list[Payload], *, first: int = 0, boot_id: str = "boot-1") -> list[JournalRecord]:
    """Journal records of ``payloads``, ten seconds apart."""
    return [
        JournalRecord(seq=first + i, boot_id=boot_id, wall_ns=WALL_NS + (first + i) * STEP_NS, payload=p)
        for i, p in enumerate(payloads)
    ]


def journal(of: Job, executed: Plan, *, emulated: bool = False) -> list[JournalRecord]:
    """A whole journal: start, six results, end."""
    made: list[Payload] = [start_record(of, emulated=emulated)]
    made += [
        ResultRecord(type="result", unit=unit, result=result)
        for unit, result in enumerate(results(executed, emulated=emulated))
    ]
    made.append(EndRecord(type="end", done=6, failed=0, refused=None))
    return numbered(made)


def populate(
    session: Session,
    *,
    name: str = "board",
    identity: str = "hw-1",
    emulated: bool = False,
    job_id: str = "job-1",
) -> World:
    """Register a device and everything its job needs; attempt 1 is open."""
    device = register_device(
        session, identity=identity, name=name, transport="local", engine="torch", emulated=emulated
    )
    record_facts(session, device.id, {"cpu": "x"}, boot_id="boot-1", os_build="os-1", kernel="6.1")
    bundle = manifest()
    save_model(
        session,
        digest=MODEL,
        name="tiny",
        source="test",
        config=CONFIG,
        untrained=True,
        info=Spec(name="tiny"),
    )
    save_task(session, Spec(name=TASK), name=TASK)
    save_task_data(session, digest=DATA, task=TASK, split="dev", rows=DATA_ROWS, sequence_length=LENGTH)
    save_bundle(session, bundle, name="tiny")
    profile = device_profile(bundle.digest, emulated=emulated, alpha_ns=1000 + device.id)
    save_device_profile(session, profile, device_id=device.id)
    executed = plan(bundle.digest, profile.digest)
    save_plan(session, executed, device_id=device.id, task=TASK)
    work = job(bundle.digest, executed, job_id=job_id, identity=identity, emulated=emulated)
    create_job(session, work, key=f"work of {job_id}", kind="test", device_id=device.id)
    assert begin_attempt(session, job_id, lease_counter=1) == 1
    return World(device.id, bundle.digest, profile.digest, executed, work)
