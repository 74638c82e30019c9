"""Jobs and journal records: all that passes between the orchestrator and an agent.

A job file is the canonical JSON of a ``Job``. The agent appends one journal line per record
(docs/job-and-journal.md); a unit's whole result is one record, so a unit is in the journal or it is not.
Times are ns of CLOCK_MONOTONIC unless the name says ``wall``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from sti_runtime.errors import FormatError
from sti_runtime.plan import Plan
from sti_runtime.records import Digest, Integer, NonNegative, Positive, Record

JOB_CAP_BYTES = 16 << 20
RECORD_CAP_BYTES = 4 << 20
JOB_FILE = "job.json"
JOURNAL_FILE = "journal.log"
AGENT_LOG_FILE = "agent.log"
SETTINGS_MOST = 64
"""Settings of a job; one may stand for many files."""
SETTING_REPORTS_MOST = 1024
"""Files and values that the settings of one job may stand for."""

JobId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
ThreadCount = Annotated[int, Field(gt=0, le=1024)]
"""Compute threads, or reads in flight."""
CPU_NUMBERS = 4096
"""Every CPU's number is below."""
CpuNumber = Annotated[int, Field(ge=0, lt=CPU_NUMBERS)]
IoMode = Literal["direct", "buffered"]
ProvenMode = Literal["direct", "buffered-cold", "cached", "mixed", "unknown"]
"""Where bytes came from by the kernel's count: all from storage, past the page cache ("direct") or through
it; none ("cached"); some ("mixed"). "unknown": the kernel does not count."""
RequestKind = Literal["spawn-cold", "cold", "warm", "cached"]
EngineName = Literal["torch", "native", "native-int8"]
ENGINES: tuple[EngineName, ...] = ("native", "native-int8", "torch")
"""What computes: the native agent in fp32 or with activations quantized to int8, or PyTorch."""


def computes_alike(engine: str, other: str) -> bool:
    """Whether two engines give one plan the same logits but for rounding, and so the same accuracy."""
    return engine.endswith("-int8") == other.endswith("-int8")


# ------------------------------------------------------------------ job


class Lease(Record):
    """Fencing token. The agent persists the highest counter seen of its store and refuses lower ones;
    a job of another store is refused unless ``takeover``."""

    store: str = Field(min_length=1, max_length=64)
    counter: NonNegative
    takeover: bool


Mechanism = Literal["cgroup-v1", "cgroup-v2", "agent", "lab-cgroup-v1", "lab-cgroup-v2"]


class Emulation(Record):
    """A slowed device. ``None``: that resource is not limited. Mechanism "agent" asks the agent to
    throttle itself; "cgroup-v1" and "cgroup-v2" were applied by the host around the agent, "lab-cgroup-…"
    around the whole device by who made it."""

    io_bytes_per_s: Positive | None
    io_mechanism: Mechanism | None
    cpu_share_milli: Annotated[int, Field(gt=0, le=1_000_000)] | None
    cpu_mechanism: Mechanism | None


Governor = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
"""The kernel's name of one, as ``performance``."""


class Gates(Record):
    """Conditions checked before timed units; ``None`` is not asked. Unreadable sensors give "ungated".

    ``governor``, ``min_khz``, ``max_khz``: of each clock domain of the CPUs used; the bounds are of the
    highest clock that the kernel allows it.
    """

    max_temperature_milli_c: Integer | None
    min_battery_percent: Integer | None
    max_load_milli: Integer | None
    min_free_bytes: Integer | None
    wait_limit_s: NonNegative
    governor: Governor | None = None
    min_khz: NonNegative | None = None
    max_khz: NonNegative | None = None


SettingValue = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,62}[!-~])?$")]
"""What is written into a setting: printable ASCII without blanks around."""


class FileSetting(Record):
    """A file of the kernel's sysfs. A part of ``path`` ending in ``*`` stands for all with a number there."""

    kind: Literal["file"]
    path: Annotated[
        str,
        Field(
            max_length=255,
            pattern=r"^/sys/(class|devices)(/[A-Za-z0-9_:@,+-][A-Za-z0-9_.:@,+-]*\*?)+$",
        ),
    ]
    value: SettingValue


class IdleSetting(Record):
    """No CPU may enter an idle state that it needs more than ``latency_us`` microseconds to leave.

    Source: Documentation/admin-guide/pm/cpuidle.rst (``disable`` and ``latency`` of each state).
    """

    kind: Literal["idle"]
    latency_us: NonNegative


class AndroidSetting(Record):
    """A value of Android's settings provider, as its program ``settings`` gets and puts them."""

    kind: Literal["android"]
    namespace: Literal["global", "secure", "system"]
    key: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.]{0,99}$")]
    value: SettingValue


Setting = Annotated[FileSetting | IdleSetting | AndroidSetting, Field(discriminator="kind")]


class ProbeUnit(Record):
    """Report sensors; when emulated, verify the stated rates (sustained and at the read size)."""

    number: NonNegative
    kind: Literal["probe"]


class IoProfileUnit(Record):
    """Cold reads of whole layers as the executor issues them: ``repeats`` layer reads for each width
    and each fidelity, plus as many with fidelities mixed at random from ``seed``."""

    number: NonNegative
    kind: Literal["profile-io"]
    widths: tuple[Positive, ...]
    fidelities: tuple[Positive, ...]
    repeats: Positive
    seed: NonNegative


class ComputeProfileUnit(Record):
    """Layer compute and decompression for one width at each fidelity: ``warmups`` and ``repeats`` times with
    nothing read meanwhile, then ``repeats`` times with an IO thread reading beside.

    Each fidelity is computed on until at least one of those reads has ended.
    """

    number: NonNegative
    kind: Literal["profile-compute"]
    width: Positive
    fidelities: tuple[Positive, ...]
    warmups: NonNegative
    repeats: Positive


class FixedProfileUnit(Record):
    """Embedding reads and compute, head: requests taken from task rows ``rows``."""

    number: NonNegative
    kind: Literal["profile-fixed"]
    warmups: NonNegative
    rows: tuple[NonNegative, ...]


class ExecuteUnit(Record):
    """Timed requests of one plan, one after the other; the first ``warmups`` are kept apart.

    ``rows`` index the task data and include the warm-ups."""

    number: NonNegative
    kind: Literal["execute"]
    plan: Plan
    request_kind: RequestKind
    io_mode: IoMode
    warmups: NonNegative
    rows: tuple[NonNegative, ...] = Field(min_length=1)


class EvaluateUnit(Record):
    """Untimed: score the plan's weights on all rows of the task data, in batches."""

    number: NonNegative
    kind: Literal["evaluate"]
    plan: Plan
    batch: Positive


Unit = Annotated[
    ProbeUnit | IoProfileUnit | ComputeProfileUnit | FixedProfileUnit | ExecuteUnit | EvaluateUnit,
    Field(discriminator="kind"),
]

TIMED_KINDS = frozenset({"probe", "profile-io", "profile-compute", "profile-fixed", "execute"})


class Job(Record):
    """What one device is asked to do, as numbered units (0, 1, …).

    ``device`` is the hardware identity the agent must find itself on. ``bundle`` and ``task_data`` name
    content below the spool. ``machine_lock``: path of the lock file that timed units hold, shared
    by all devices of one physical machine. ``cpus`` pins the agent; empty: not pinned. ``settings``: what the
    agent changes on the device before its first unit, and puts back behind its last.
    """

    format: Literal["stifarm-job"]
    version: Literal[1]
    id: JobId
    attempt: Positive
    lease: Lease
    device: str = Field(min_length=1, max_length=200)
    bundle: Digest | None
    task_data: Digest | None
    engine: EngineName
    threads: ThreadCount
    queue_depth: ThreadCount
    cpus: tuple[CpuNumber, ...]
    machine_lock: str | None
    emulation: Emulation | None
    gates: Gates
    settings: tuple[Setting, ...] = Field(default=(), max_length=SETTINGS_MOST)
    units: tuple[Unit, ...] = Field(min_length=1, max_length=100_000)

    @model_validator(mode="after")
    def _numbered(self) -> Job:
        if [unit.number for unit in self.units] != list(range(len(self.units))):
            raise ValueError("units must be numbered 0, 1, 2, …")
        return self


# ------------------------------------------------------------------ journal


class ClockTimes(Record):
    """Time one clock domain has spent at each of its clocks since boot; ``cpu``: its first CPU."""

    cpu: NonNegative
    khz: tuple[NonNegative, ...]
    ms: tuple[NonNegative, ...]


class Sensors(Record):
    """What can be read without root; ``None``: not readable here. ``battery_percent`` etc. as named.

    ``time_in_state``: the difference of two readings says at which clocks the work between them ran.
    """

    wall_ns: NonNegative
    temperature_milli_c: int | None
    cpu_khz: tuple[NonNegative, ...]
    load_milli: int | None
    available_memory_bytes: int | None
    free_bytes: int | None
    battery_percent: int | None
    throttled: bool | None
    time_in_state: tuple[ClockTimes, ...] = ()


class Reading(Record):
    """The cheap sensors between two samples of a unit; ``None``: not readable here.

    ``after``: how many of the unit's requests or samples had been taken. ``clocks_khz`` now and
    ``ceilings_khz``, the highest that the kernel allows now: one for each clock domain of the CPUs the agent
    uses. ``temperature_milli_c``: the hottest of the watched zones. ``throttled``: whether this reading shows
    the device held back or beyond its temperature limit; None when nothing here could show it.
    """

    after: NonNegative
    clocks_khz: tuple[NonNegative | None, ...]
    ceilings_khz: tuple[NonNegative | None, ...]
    temperature_milli_c: int | None
    load_milli: int | None
    available_memory_bytes: int | None
    throttled: bool | None


class GateVerdict(Record):
    """One gate: passed, failed (after waiting), or ungated because its sensor is unreadable."""

    gate: str
    verdict: Literal["pass", "fail", "ungated"]
    detail: str


class Verdict(Record):
    """Whether a sample counts. Reasons: "not-from-storage", "not-cached", "io-not-accounted", "throttled"
    (a reading of the sensors before or after it shows throttling)."""

    valid: bool
    reasons: tuple[str, ...]


class VerifiedEmulation(Record):
    """Nominal beside measured rates of an emulated device; bursts show in the medians of single pieces.

    ``read_p50_ns``/``read_nominal_ns``: single reads of ``read_bytes`` bytes against bytes ÷ nominal rate.
    ``section_p50_ns``/``section_nominal_ns``: sections of ``section_cpu_ns`` of CPU time, about one narrow
    layer's, against that time ÷ nominal share.
    """

    emulation: Emulation
    io_bytes_per_s: NonNegative | None
    read_bytes: NonNegative | None
    read_p50_ns: NonNegative | None
    read_nominal_ns: NonNegative | None
    cpu_share_milli: NonNegative | None
    section_cpu_ns: NonNegative | None
    section_p50_ns: NonNegative | None
    section_nominal_ns: NonNegative | None


class ProbeResult(Record):
    """Result of a ProbeUnit."""

    kind: Literal["probe"]
    sensors: Sensors
    verified: VerifiedEmulation | None


class IoSample(Record):
    """One merged layer read: ``versions`` versions, ``bytes`` asked, ``storage_bytes`` from the device.

    ``throttled``: a reading before or after it shows throttling. ``valid``: not so, and all bytes came from
    storage."""

    versions: Positive
    bytes: Positive
    storage_bytes: NonNegative
    duration_ns: NonNegative
    mode_asked: IoMode
    mode_proven: ProvenMode
    throttled: bool
    valid: bool


class IoProfileResult(Record):
    """Result of an IoProfileUnit. ``io_mode``: in use, not the one asked where storage refused that."""

    kind: Literal["profile-io"]
    io_mode: IoMode
    readings: tuple[Reading, ...]
    samples: tuple[IoSample, ...]


class ComputeSample(Record):
    """One layer: total decompression of its ``width`` shards at ``fidelity``, then compute.

    ``read_bytes``: 0 if it was computed alone; else an equal share of what was read from storage beside the
    layers of its fidelity (where the kernel does not count: of what was asked).
    """

    width: Positive
    fidelity: Positive
    read_bytes: NonNegative
    decompress_ns: NonNegative
    compute_ns: NonNegative
    throttled: bool
    warmup: bool


class ComputeProfileResult(Record):
    """Result of a ComputeProfileUnit. ``reads``: the layer reads beside, all while a layer was computed."""

    kind: Literal["profile-compute"]
    io_mode: IoMode
    readings: tuple[Reading, ...]
    samples: tuple[ComputeSample, ...]
    reads: tuple[IoSample, ...]


class FixedSample(Record):
    """One request's fixed parts."""

    embed_io_ns: NonNegative
    embed_compute_ns: NonNegative
    head_ns: NonNegative
    bytes: NonNegative
    storage_bytes: NonNegative
    mode_asked: IoMode
    mode_proven: ProvenMode
    throttled: bool
    warmup: bool


class FixedProfileResult(Record):
    """Result of a FixedProfileUnit."""

    kind: Literal["profile-fixed"]
    readings: tuple[Reading, ...]
    samples: tuple[FixedSample, ...]


class LayerTrace(Record):
    """One layer of one request, ns from the request's start. No IO: both IO times are 0, bytes 0."""

    io_start_ns: NonNegative
    io_end_ns: NonNegative
    bytes: NonNegative
    compute_start_ns: NonNegative
    compute_end_ns: NonNegative
    decompress_ns: NonNegative
    stall_ns: NonNegative


class RequestSample(Record):
    """One request. ``planned_bytes``: what it had to read (shards and embedding pages).

    ``mode_asked``: by the unit; ``mode_proven``: by the kernel's count of this request's bytes."""

    row: NonNegative
    warmup: bool
    latency_ns: NonNegative
    stall_ns: NonNegative
    planned_bytes: NonNegative
    storage_bytes: NonNegative
    mode_asked: IoMode
    mode_proven: ProvenMode
    logits: tuple[float, ...]
    trace: tuple[LayerTrace, ...]
    verdict: Verdict


class MemoryParts(Record):
    """Peak bytes by part, from the allocators. ``process_peak_bytes``: VmHWM; None for the torch engine."""

    resident: NonNegative
    preload: NonNegative
    working: NonNegative
    activations: NonNegative
    process_peak_bytes: NonNegative | None

    @property
    def total(self) -> int:
        """Sum of the parts' peaks."""
        return self.resident + self.preload + self.working + self.activations


class ExecuteResult(Record):
    """Result of an ExecuteUnit. ``io_mode``: in use, which is not the one asked where storage refused it.
    ``io_mode_proven``: of all requests together; "direct" only when every byte came from storage."""

    kind: Literal["execute"]
    plan_digest: Digest
    request_kind: RequestKind
    io_mode: IoMode
    io_mode_proven: ProvenMode
    readings: tuple[Reading, ...]
    requests: tuple[RequestSample, ...]
    memory: MemoryParts
    before: Sensors
    after: Sensors
    gates: tuple[GateVerdict, ...]


class EvaluateResult(Record):
    """Result of an EvaluateUnit: predictions and mean cross-entropy over all rows with labels."""

    kind: Literal["evaluate"]
    content_digest: Digest
    rows: Positive
    correct: NonNegative
    loss: float
    predictions: tuple[NonNegative, ...]


UnitResult = Annotated[
    ProbeResult
    | IoProfileResult
    | ComputeProfileResult
    | FixedProfileResult
    | ExecuteResult
    | EvaluateResult,
    Field(discriminator="kind"),
]


class SettingReport(Record):
    """What became of one setting. ``target``: the file, or ``namespace/key`` of Android's.

    ``before``: what it was before the agent changed it; None: not set, or not readable. ``state``: of a start
    record "applied" or "not-applied"; of an end record "restored", "kept" (somebody changed it: it is left
    alone) or "not-restored" (tried again at the next contact). ``why``: the cause, if there is one.
    """

    target: Annotated[str, Field(max_length=300)]
    value: SettingValue
    before: Annotated[str, Field(max_length=256)] | None
    state: Literal["applied", "not-applied", "restored", "kept", "not-restored"]
    why: Annotated[str, Field(max_length=500)]


SettingReports = Annotated[tuple[SettingReport, ...], Field(max_length=SETTING_REPORTS_MOST)]


class StartRecord(Record):
    """The agent (re)started the job. ``first_unit``: where it goes on. ``settings``: what became of them."""

    type: Literal["start"]
    job: JobId
    attempt: Positive
    lease: Lease
    first_unit: NonNegative
    agent: str
    agent_digest: Digest
    protocol: Positive
    emulated: bool
    sensors: Sensors
    settings: SettingReports = ()


class ResultRecord(Record):
    """A unit is done."""

    type: Literal["result"]
    unit: NonNegative
    result: UnitResult


class FailureRecord(Record):
    """A unit failed; it is not tried again in this attempt, the next unit runs.

    ``error`` is a class name of the error tree; ``what`` and ``remedy`` are for people.
    """

    type: Literal["failure"]
    unit: NonNegative
    error: str
    what: str
    remedy: str


class EndRecord(Record):
    """All units are in the journal, or the job was refused (``refused`` says why).

    ``settings``: what became of those that this run of the agent had changed."""

    type: Literal["end"]
    done: NonNegative
    failed: NonNegative
    refused: str | None
    settings: SettingReports = ()


Payload = Annotated[StartRecord | ResultRecord | FailureRecord | EndRecord, Field(discriminator="type")]


class JournalRecord(Record):
    """One journal line: sequence number from 0, boot id, wall clock, payload."""

    seq: NonNegative
    boot_id: str = Field(min_length=1, max_length=64)
    wall_ns: NonNegative
    payload: Payload


_UNIT_RESULT: TypeAdapter[Any] = TypeAdapter(UnitResult)


def parse_unit_result(data: bytes, *, source: str) -> Any:
    """Validate a stored unit result. Raises: FormatError."""
    try:
        return _UNIT_RESULT.validate_json(data, strict=True)
    except ValidationError as error:
        raise FormatError(f"{source}: not a valid unit result: {error.errors()[0]['msg']}.") from error
