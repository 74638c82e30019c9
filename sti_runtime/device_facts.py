"""What an agent says about its device (``facts`` verb): read without root, never guessed.

``None`` means "not readable here". The identity is the hardware's, see docs/job-and-journal.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sti_runtime.messages import EngineName
from sti_runtime.records import Digest, NonNegative, Positive, Record

FACTS_CAP_BYTES = 1 << 20
Text = Annotated[str, Field(max_length=500)]


class StorageFacts(Record):
    """The storage below the spool. ``direct_io`` was tried there: "works" only when the kernel counted
    the bytes as read from the device; "unproven" when it does not say."""

    path: Text
    filesystem: Text | None
    block_device: Text | None
    rotational: bool | None
    total_bytes: NonNegative
    free_bytes: NonNegative
    direct_io: Literal["works", "silent-fallback", "unproven", "refused"]


class ThermalZone(Record):
    """One thermal zone of the kernel."""

    name: Text
    temperature_milli_c: int | None


class DeviceFacts(Record):
    """Facts of one device. Clocks in kHz per core, in the order of ``cpus`` (those online).

    ``virtual_machine``: its host's page cache is invisible from here, so "cold" is the guest's view.
    ``emulated_spool``: the spool was marked as an emulated device's. ``cpu_features``: of the SIMD
    extensions that matter to an engine, those this CPU has.
    """

    format: Literal["stifarm-facts"]
    version: Literal[1]
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{16}(/[0-9a-f]{12})?$")]
    identity_source: Literal["android-serial", "device-tree-serial", "machine-id", "mac-address"]
    emulated_spool: bool
    boot_id: Annotated[str, Field(min_length=1, max_length=64)]
    wall_ns: NonNegative
    agent: Text
    agent_digest: Digest
    protocol: Positive
    engines: tuple[EngineName, ...]
    cpu_model: Text | None
    architecture: Text
    cpus: tuple[NonNegative, ...]
    cpu_features: tuple[Text, ...]
    current_khz: tuple[NonNegative, ...]
    min_khz: tuple[NonNegative, ...]
    max_khz: tuple[NonNegative, ...]
    governors: tuple[Text, ...]
    memory_bytes: NonNegative | None
    storage: StorageFacts
    os_build: Text | None
    kernel: Text
    libc: Text | None
    python: Text | None
    torch: Text | None
    gpus: tuple[Text, ...]
    thermal_zones: tuple[ThermalZone, ...]
    battery: bool
    virtual_machine: bool | None
    notes: tuple[Text, ...]
