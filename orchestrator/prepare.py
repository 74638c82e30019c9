"""What the inventory asks to be changed on a device while it is timed, as the settings of its jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from sti_runtime.messages import (
    AndroidSetting,
    EndRecord,
    FileSetting,
    IdleSetting,
    JournalRecord,
    Setting,
    StartRecord,
)

SHALLOW_LATENCY_US = 10
"""Idle states that take longer to leave are deep: waiting for an interrupt (about 1 µs) and halting stay."""

_GOVERNORS = "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
_STAY_AWAKE = (("stay_on_while_plugged_in", "7"), ("low_power", "0"))
"""Android's global values: the screen stays on while the device is plugged in (mains 1, USB 2, wireless 4):
that keeps it out of doze and suspend; the battery saver, which lowers clocks, is off.
Source: android.provider.Settings.Global, STAY_ON_WHILE_PLUGGED_IN."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Prepare:
    """``governor``: of all clock domains; None: as it is. ``shallow_idle``: no deep idle states."""

    stay_awake: bool = False
    governor: str | None = None
    shallow_idle: bool = False

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings of a job with timed units."""
        found: list[Setting] = []
        if self.stay_awake:
            found += (
                AndroidSetting(kind="android", namespace="global", key=key, value=value)
                for key, value in _STAY_AWAKE
            )
        if self.governor is not None:
            found.append(FileSetting(kind="file", path=_GOVERNORS, value=self.governor))
        if self.shallow_idle:
            found.append(IdleSetting(kind="idle", latency_us=SHALLOW_LATENCY_US))
        return tuple(found)


def tell_settings(device: str, records: Iterable[JournalRecord]) -> None:
    """Warn of settings that were not changed as asked, or not put back; the store keeps them as events."""
    for record in records:
        if isinstance(record.payload, StartRecord | EndRecord):
            for report in record.payload.settings:
                if report.state not in ("applied", "restored"):
                    _log.warning(
                        f"setting {report.state}", device=device, target=report.target, why=report.why
                    )
