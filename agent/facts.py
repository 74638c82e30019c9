"""The ``facts`` verb: what the device is, read from the kernel by pure parsers; nothing is guessed."""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Literal

from agent import android, identity, sensors
from agent.sensors import PROC, SYS, read_int, read_text
from agent.spool import Spool, storage_error
from sti_runtime.device_facts import DeviceFacts, StorageFacts, ThermalZone
from sti_runtime.journal_format import PROTOCOL_VERSION

_FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
             "asimd", "neon", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip
_ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72", "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76",
    "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710", "0xd48": "Cortex-X2", "0xd4d": "Cortex-A715", "0xd4e": "Cortex-X3",
}  # fmt: skip
"""MIDR part numbers. Source: arch/arm64/include/asm/cputype.h."""
_VIRTUAL_DMI = ("QEMU", "KVM", "VMware", "VirtualBox", "Xen", "Microsoft Corporation", "Amazon EC2",
                "Google Compute Engine", "Firecracker")  # fmt: skip
_PROBE_BYTES = 4096


def parse_cpu_model(cpuinfo: str) -> str | None:
    """The CPU's name: "model name" on x86; the core types on Arm, e.g. "4× Cortex-A55 + 4× Cortex-A76"."""
    names: list[str] = []
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and value:
            names.append(value)
        elif key == "CPU part":
            names.append(_ARM_PARTS.get(value.lower(), f"part {value}"))
    arm_named = [name for name in names if name in _ARM_PARTS.values() or name.startswith("part ")]
    chosen = arm_named or names
    if not chosen:
        return None
    if not arm_named:
        return chosen[0]
    return " + ".join(f"{chosen.count(name)}× {name}" for name in dict.fromkeys(chosen))


def parse_cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Those of the SIMD extensions an engine may use that the first CPU has."""
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.lower() in ("flags", "features"):
            present = set(value.split())
            return tuple(name for name in _FEATURES if name in present)
    return ()


def parse_clocks_khz(cpuinfo: str) -> tuple[int, ...]:
    """ "cpu MHz" of each CPU: what x86 shows where there is no cpufreq (virtual machines)."""
    clocks = []
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "cpu MHz" and value.replace(".", "", 1).isdigit():
            clocks.append(round(float(value) * 1000))
    return tuple(clocks)


def parse_os_release(text: str) -> str | None:
    """PRETTY_NAME of os-release(5), with BUILD_ID or VERSION_ID where it does not say."""
    values = {}
    for line in text.splitlines():
        key, found, value = line.partition("=")
        if found:
            values[key.strip()] = value.strip().strip("\"'")
    build = values.get("BUILD_ID", "")
    name = values.get("PRETTY_NAME") or values.get("NAME")
    return f"{name} ({build})" if name and build else name


def parse_mount(mountinfo: str, path: str) -> tuple[str, str] | None:
    """(filesystem, source) of the mount that holds ``path``. Source: proc_pid_mountinfo(5)."""
    best: tuple[int, str, str] | None = None
    for line in mountinfo.splitlines():
        left, found, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if not found or len(fields) < 5 or len(tail) < 2:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/")
        inside = path == point or path.startswith(point + "/")
        if inside and (best is None or len(point) >= best[0]):
            best = (len(point), tail[0], tail[1])
    return None if best is None else best[1:]


def parse_virtual(cpuinfo: str, dmi: Iterable[str]) -> bool:
    """Whether a hypervisor shows: the CPU flag on x86, else the firmware's vendor strings."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return "hypervisor" in flags.split() or any(name in text for text in dmi for name in _VIRTUAL_DMI)


def block_device(folder: Path, sys: Path = SYS) -> tuple[str | None, bool | None]:
    """(name, rotational) of the disk below ``folder``; of the whole disk for a partition."""
    number = folder.stat().st_dev
    link = sys / f"dev/block/{os.major(number)}:{os.minor(number)}"
    if not link.exists():
        return None, None
    device = link.resolve()
    disk = device.parent if (device / "partition").exists() else device
    rotational = read_int(disk / "queue/rotational")
    return device.name, None if rotational is None else rotational != 0


def _storage_read_bytes() -> int | None:
    """Bytes this process had the kernel read from storage. Source: proc_pid_io(5), read_bytes."""
    for line in (read_text(PROC / "self/io") or "").splitlines():
        if line.startswith("read_bytes:"):
            return sensors.parse_int(line.partition(":")[2])
    return None


def try_direct_io(folder: Path) -> Literal["works", "silent-fallback", "unproven", "refused"]:
    """Really try it: write a block, read it back with O_DIRECT, and see whether storage was read.

    Raises: StifarmError if the folder cannot be written.
    """
    probe = folder / f".direct-io.{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(os.urandom(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        fd = os.open(probe, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if probe.exists() and probe.stat().st_size == _PROBE_BYTES:
            probe.unlink()
            return "refused"
        probe.unlink(missing_ok=True)
        raise storage_error(error, probe) from error
    try:
        with mmap.mmap(-1, _PROBE_BYTES) as buffer:
            before = _storage_read_bytes()
            try:
                count = os.preadv(fd, [buffer], 0)
            except OSError:
                return "refused"
            after = _storage_read_bytes()
    finally:
        os.close(fd)
        probe.unlink()
    if before is None or after is None:
        return "unproven"
    return "works" if count == _PROBE_BYTES and after - before >= _PROBE_BYTES else "silent-fallback"


def storage_facts(folder: Path) -> StorageFacts:
    """Filesystem, disk and direct IO at ``folder``."""
    stat = os.statvfs(folder)
    mount = parse_mount(read_text(PROC / "self/mountinfo") or "", str(folder.resolve()))
    device, rotational = block_device(folder)
    return StorageFacts(
        path=str(folder),
        filesystem=mount[0] if mount else None,
        block_device=device or (mount[1] if mount else None),
        rotational=rotational,
        total_bytes=stat.f_blocks * stat.f_frsize,
        free_bytes=stat.f_bavail * stat.f_frsize,
        direct_io=try_direct_io(folder),
    )


def _installed(package: str) -> str | None:
    """Version from the package's metadata, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    """Names of NVIDIA GPUs as their driver lists them."""
    names = []
    for path in sorted(PROC.glob("driver/nvidia/gpus/*/information")):
        for line in (read_text(path) or "").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return tuple(names)


def _per_cpu(cpus: tuple[int, ...], name: str) -> tuple[int, ...]:
    values = [read_int(sensors.cpu_file(cpu, name)) for cpu in cpus]
    return tuple(v for v in values if v is not None) if None not in values else ()


def _notes(virtual: bool, direct_io: str) -> tuple[str, ...]:
    """Provenance that a reader of the figures must know."""
    notes = []
    if virtual:
        notes.append("virtual machine: its host's page cache is invisible; cold is the guest's view")
    if direct_io != "works":
        notes.append(f"direct IO at the spool: {direct_io}")
    return tuple(notes)


def zones(sys: Path = SYS, root: Path = android.ROOT) -> tuple[tuple[str, int | None], ...]:
    """The kernel's thermal zones; where none can be read, those of Android's thermal service."""
    found = sensors.thermal_zones(sys)
    if any(value is not None for _, value in found):
        return found
    thermal = android.android_thermal(root)
    return thermal.zones if thermal is not None and thermal.zones else found


def read_facts(spool: Spool) -> DeviceFacts:
    """All facts of this device. Imports no engine. Raises: StifarmError."""
    cpuinfo = read_text(PROC / "cpuinfo") or ""
    dmi = [read_text(SYS / f"class/dmi/id/{name}") or "" for name in ("sys_vendor", "product_name")]
    cpus = sensors.online_cpus()
    name, source = identity.device_identity(spool)
    storage = storage_facts(spool.root)
    virtual = parse_virtual(cpuinfo, dmi)
    governors = [read_text(sensors.cpu_file(cpu, "scaling_governor")) for cpu in cpus]
    libc = " ".join(platform.libc_ver())
    torch = _installed("torch")
    return DeviceFacts(
        format="stifarm-facts",
        version=1,
        identity=name,
        identity_source=source,
        emulated_spool=identity.emulated_id(spool) is not None,
        boot_id=identity.boot_id(),
        wall_ns=time.time_ns(),
        agent=identity.agent_version(),
        agent_digest=identity.agent_digest(),
        protocol=PROTOCOL_VERSION,
        engines=("torch",) if torch else (),
        cpu_model=parse_cpu_model(cpuinfo),
        architecture=platform.machine(),
        cpus=cpus,
        cpu_features=parse_cpu_features(cpuinfo),
        current_khz=sensors.cpu_clocks_khz() or parse_clocks_khz(cpuinfo),
        min_khz=_per_cpu(cpus, "cpuinfo_min_freq"),
        max_khz=_per_cpu(cpus, "cpuinfo_max_freq"),
        governors=tuple(g for g in governors if g),
        memory_bytes=sensors.parse_meminfo(read_text(PROC / "meminfo") or "").get("MemTotal"),
        storage=storage,
        os_build=android.android_property("ro.build.fingerprint")
        or parse_os_release(read_text(Path("/etc/os-release")) or ""),
        kernel=f"{platform.system()} {platform.release()} {platform.version()}",
        libc=libc.strip() or None,
        python=platform.python_version(),
        torch=torch,
        gpus=_gpus(),
        thermal_zones=tuple(ThermalZone(name=zone, temperature_milli_c=value) for zone, value in zones()),
        battery=sensors.has_battery() or android.android_battery() is not None,
        virtual_machine=virtual,
        notes=_notes(virtual, storage.direct_io),
    )
