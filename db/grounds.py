"""What a plan rests on: profiles with their samples and age, and the interval of its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Row

from db.documents import now_wall_ns
from db.models import DeviceProfileRow
from db.statistics import Interval
from sti_runtime.profile import PPM, DeviceProfile

BORROWED_FACTOR = 2
"""How much wider the interval is, each way, of what a borrowed profile predicts (docs/planner.md)."""


@dataclass(frozen=True)
class SampleCounts:
    """How many samples a device profile is fitted from, by kind; those beside are reads beside compute."""

    io: int
    beside: int
    compute: int
    fixed: int


@dataclass(frozen=True)
class ProfileRef:
    """A profile an answer rests on. ``kind``: "device" or "importance"; ``age_ns`` since it was measured.

    Of a device profile: ``device`` it was measured on (another one's name: borrowed), ``samples`` and the
    job that took them. Of an importance profile: the labelled ``rows`` it was scored on, and its ``method``.
    None: not known.
    """

    kind: str
    digest: str
    age_ns: int | None
    unfit: bool
    device: str | None = None
    job_id: str | None = None
    samples: SampleCounts | None = None
    rows: int | None = None
    method: str | None = None


@dataclass(frozen=True)
class ImportanceFacts:
    """Of a stored importance profile: when it was made, on how many labelled rows, and how."""

    created_wall_ns: int
    rows: int
    method: str


def profile_record(row: DeviceProfileRow) -> DeviceProfile:
    """The profile of a row."""
    return parsed_profile(row.profile_json, row.digest)


@lru_cache(maxsize=256)
def parsed_profile(text: str, digest: str) -> DeviceProfile:
    """A stored profile. (Many plans rest on one.)"""
    return DeviceProfile.from_json(text.encode(), source=f"device profile {digest[:12]}")


def references(
    row: Row[Any], profile: DeviceProfile | None, importance: ImportanceFacts | None
) -> tuple[ProfileRef, ...]:
    """The profiles of a plan, from a row of ``db.plan_answers``; a device profile that is None is not in this
    store."""
    now = now_wall_ns()
    if profile is None:
        found = [ProfileRef("device", row.device_profile_digest, None, unfit=False)]
    else:
        found = [
            ProfileRef(
                "device",
                row.profile_digest,
                max(0, now - row.profile_measured_wall_ns),
                unfit=row.profile_unfit,
                device=row.profiled_on,
                job_id=row.profile_job_id,
                samples=_counts(profile),
            )
        ]
    if row.importance_digest is not None:
        age = None if importance is None else max(0, now - importance.created_wall_ns)
        rows, method = (None, None) if importance is None else (importance.rows, importance.method)
        found.append(
            ProfileRef("importance", row.importance_digest, age, unfit=False, rows=rows, method=method)
        )
    return tuple(found)


def predicted_interval(row: Row[Any], profile: DeviceProfile | None) -> Interval | None:
    """Where a warm request is expected; None when the plan's profile is not known.

    From the prediction at median figures to that at p95 figures, each moved outwards by the fit's median
    residual; of a borrowed profile ``BORROWED_FACTOR`` further.
    """
    if profile is None:
        return None
    error_ppm = min(profile.io.error_ppm, PPM)
    low = row.predicted_median_latency_ns * (PPM - error_ppm) // PPM
    high = -(-row.predicted_latency_ns * (PPM + error_ppm) // PPM)
    return Interval(low // BORROWED_FACTOR, high * BORROWED_FACTOR) if row.borrowed else Interval(low, high)


def _counts(profile: DeviceProfile) -> SampleCounts:
    return SampleCounts(
        io=profile.io.samples,
        beside=profile.io.beside_samples,
        compute=sum(width.samples for width in profile.compute),
        fixed=profile.fixed_median.samples,
    )
