"""The probe unit: sensors, and whether an emulated device is as slow as it says."""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from agent import android
from agent.context import Context
from agent.sensors import read_sensors
from agent.spool import storage_error
from sti_runtime.engine import Throttle
from sti_runtime.manifest import ALIGNMENT
from sti_runtime.messages import Emulation, ExecuteUnit, Job, ProbeResult, ProbeUnit, VerifiedEmulation
from sti_runtime.plan import MERGE_LIMIT_BYTES, merged_reads
from sti_runtime.shard import matrix_shapes
from sti_runtime.storage import Storage, anonymous_pages
from sti_runtime.units import NS_PER_S

SUSTAINED_NS = NS_PER_S
SPIN_NS = NS_PER_S // 2
SECTION_NS = 5_000_000
SINGLE_READS = 15
SECTIONS = 25
NS_PER_WEIGHT = 5
"""CPU time per weight of a narrow layer, decompression included: the scale, not a measurement."""
MIN_SECTION_NS, MAX_SECTION_NS = 200_000, 20_000_000
DEFAULT_READ_BYTES = 256 << 10
_FILE_BYTES = 16 << 20


def probe(unit: ProbeUnit, context: Context) -> ProbeResult:
    """Read the sensors; when the job is of an emulated device, measure its rates."""
    emulation = context.job.emulation
    return ProbeResult(
        kind="probe",
        sensors=android.complete(read_sensors(context.spool)),
        verified=None if emulation is None else verify_emulation(emulation, context),
    )


def verify_emulation(emulation: Emulation, context: Context) -> VerifiedEmulation:
    """Measure an emulated device through the throttle its requests go through."""
    rate, read_bytes, single_ns, nominal_ns = None, None, None, None
    if emulation.io_bytes_per_s is not None:
        with _probe_file(context) as path:
            read_bytes = min(typical_read_bytes(context), path.stat().st_size // ALIGNMENT * ALIGNMENT)
            nominal_ns = read_bytes * NS_PER_S // emulation.io_bytes_per_s
            rate, single_ns = measure_reads(path, read_bytes, nominal_ns, context.throttle)
    share, section, section_p50_ns, section_nominal_ns = None, None, None, None
    if emulation.cpu_share_milli is not None:
        share = measure_cpu_share(emulation.cpu_share_milli, context.throttle)
        section = typical_section_ns(context)
        section_nominal_ns = max(section, section * 1000 // emulation.cpu_share_milli)
        section_p50_ns = measure_sections(section, section_nominal_ns, context.throttle)
    return VerifiedEmulation(
        emulation=emulation,
        io_bytes_per_s=rate,
        read_bytes=read_bytes,
        read_p50_ns=single_ns,
        read_nominal_ns=nominal_ns,
        cpu_share_milli=share,
        section_cpu_ns=section,
        section_p50_ns=section_p50_ns,
        section_nominal_ns=section_nominal_ns,
    )


def typical_read_bytes(context: Context) -> int:
    """The median merged read of the job's plans; without plans that of a 4-bit layer; else 256 KiB."""
    sizes = planned_read_sizes(context.job)
    if sizes:
        return int(statistics.median_low(sizes))
    if context.job.bundle is None:
        return DEFAULT_READ_BYTES
    manifest = context.bundle.manifest
    fidelity = 4 if 4 in manifest.fidelities else manifest.fidelities[0]
    layer = [v.length for v in manifest.region(fidelity).versions[: manifest.model.heads]]
    return min(sum(layer), MERGE_LIMIT_BYTES)


def planned_read_sizes(job: Job) -> list[int]:
    """Bytes of every merged read that the job's plans make."""
    plans = [unit.plan for unit in job.units if isinstance(unit, ExecuteUnit)]
    return [read.length for plan in plans for read in merged_reads(plan.streamed())]


def measure_reads(path: Path, read_bytes: int, nominal_ns: int, throttle: Throttle) -> tuple[int, int]:
    """(bytes per second sustained for a second of random reads, median ns of a read after a pause).

    Every read misses the page cache. The pause, as long as a read should take, is when a device that
    saves up for bursts would do so. Raises: StorageReadError.
    """
    size_bytes = path.stat().st_size
    places = random.Random(size_bytes)
    buffer = anonymous_pages(read_bytes)
    with Storage(path.parent, {path.name: size_bytes}, "direct") as storage:

        def read() -> int:
            offset = places.randrange((size_bytes - read_bytes) // ALIGNMENT + 1) * ALIGNMENT
            if storage.io_mode == "buffered":
                storage.evict()
            start_ns = time.monotonic_ns()
            storage.read(path.name, offset, [buffer])
            throttle.after_read(start_ns, read_bytes)
            return time.monotonic_ns() - start_ns

        read()
        start_ns, done = time.monotonic_ns(), 0
        while (elapsed_ns := time.monotonic_ns() - start_ns) < SUSTAINED_NS:
            read()
            done += read_bytes
        singles = []
        for _ in range(SINGLE_READS):
            time.sleep(nominal_ns / NS_PER_S)
            singles.append(read())
    return done * NS_PER_S // elapsed_ns, int(statistics.median_low(singles))


def measure_cpu_share(nominal_milli: int, throttle: Throttle) -> int:
    """CPU time ÷ wall time, in thousandths, of busy threads, as many as the nominal share could feed."""
    threads = -(-nominal_milli // 1000)
    with ThreadPoolExecutor(threads, "spin") as pool:
        start_ns, start_cpu_ns = time.monotonic_ns(), time.process_time_ns()
        while time.monotonic_ns() - start_ns < SPIN_NS:
            with throttle.compute():
                list(pool.map(_spin, [time.monotonic_ns() + SECTION_NS] * threads))
        return (time.process_time_ns() - start_cpu_ns) * 1000 // (time.monotonic_ns() - start_ns)


def typical_section_ns(context: Context) -> int:
    """About the CPU time of the bundle's narrowest layer, from its weights; without a bundle the longest."""
    if context.job.bundle is None:
        return MAX_SECTION_NS
    manifest = context.bundle.manifest
    narrowest = min(submodel.width for submodel in manifest.submodels)
    weights = narrowest * sum(rows * columns for rows, columns in matrix_shapes(manifest.model).values())
    return min(MAX_SECTION_NS, max(MIN_SECTION_NS, weights * NS_PER_WEIGHT))


def measure_sections(section_ns: int, nominal_ns: int, throttle: Throttle) -> int:
    """Median wall time in ns of single-threaded sections of ``section_ns`` of CPU time, after pauses.

    A limit that works in coarser slices than a section lets some through at full speed and holds up
    others: its median is far from nominal though its average is right.
    """
    walls = []
    for _ in range(SECTIONS):
        time.sleep(nominal_ns / NS_PER_S)
        start_ns = time.monotonic_ns()
        with throttle.compute():
            _burn(section_ns)
        walls.append(time.monotonic_ns() - start_ns)
    return int(statistics.median_low(walls))


def _burn(cpu_ns: int) -> None:
    """Use ``cpu_ns`` of this thread's CPU time."""
    until_ns = time.thread_time_ns() + cpu_ns
    block = bytes(4 << 10)
    while time.thread_time_ns() < until_ns:
        hashlib.sha256(block).digest()


def _spin(until_ns: int) -> None:
    """Keep a CPU busy; hashing lets other threads of the interpreter run."""
    block = bytes(64 << 10)
    while time.monotonic_ns() < until_ns:
        hashlib.sha256(block).digest()


@contextmanager
def _probe_file(context: Context) -> Iterator[Path]:
    """The largest file of the job's bundle, else a temporary one in the spool. Raises: StifarmError."""
    if context.job.bundle is not None:
        bundle = context.bundle
        sizes = {r.file: r.versions[-1].offset + r.versions[-1].length for r in bundle.manifest.regions}
        yield bundle.path / max(sizes, key=lambda name: sizes[name])
        return
    path = context.spool / f".probe.{os.getpid()}.partial"
    try:
        try:
            with path.open("wb") as stream:
                stream.write(random.Random(0).randbytes(_FILE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise storage_error(error, path) from error
        yield path
    finally:
        path.unlink(missing_ok=True)
