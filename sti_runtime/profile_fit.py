"""From raw samples to a device profile: robust fits and percentiles, the same in every language.

All floating point is IEEE double, one operation at a time in the stated order (no fused multiply-add,
no compensated sums), and only in ``_fit_io``; samples are sorted first, so their order does not
matter. Everything else is integer arithmetic. Percentiles are nearest-rank. Spec: docs/planner.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from sti_runtime.errors import InputError
from sti_runtime.messages import ComputeSample, FixedSample, IoSample
from sti_runtime.plan_build import Fidelity
from sti_runtime.profile import PPM, DeviceProfile, FidelityTime, FixedTime, IoFit, ReadCost, WidthTime
from sti_runtime.shard import FIDELITIES

IO_ERROR_BOUND_PPM = 200_000
"""A profile whose median relative IO residual is larger is unfit."""

MIN_IO_SAMPLES = 12
MIN_BESIDE_SAMPLES = 5
MIN_COMPUTE_SAMPLES = 5
"""Per width, and per fidelity for decompression. Fewer (but some) make the profile unfit."""
MIN_FIXED_SAMPLES = 5

FIT_ROUNDS = 50
RESIDUAL_FLOOR = 0.001
SINGULAR = 1e-9


def fit_profile(
    *,
    bundle: str,
    engine: str,
    sequence_length: int,
    threads: int,
    queue_depth: int,
    emulated: bool,
    widths: Iterable[int],
    fidelities: Iterable[int],
    io: Iterable[IoSample],
    beside: Iterable[IoSample],
    compute: Iterable[ComputeSample],
    fixed: Iterable[FixedSample],
) -> DeviceProfile:
    """Fit one profile. ``widths`` and ``fidelities``: what the bundle needs measured; ``io``: reads while
    nothing is computed, ``beside``: reads while a layer is.

    Only valid IO samples count, and samples that are neither warm-ups nor throttled. What is too few,
    missing or fits badly is named in ``unfit``.
    Raises: InputError when a kind has no usable sample at all, or a sample has an unknown fidelity.
    """
    unfit: list[str] = []
    io_fit = _io_time(list(io), list(beside), unfit)
    rows = [sample for sample in compute if not (sample.warmup or sample.throttled)]
    if not rows:
        raise _no_samples("compute")
    unknown = sorted({row.fidelity for row in rows} - set(FIDELITIES))
    if unknown:
        raise InputError(
            f"Compute samples at {', '.join(map(str, unknown))} bits, which no bundle holds.",
            "Profile the device again.",
        )
    totals = _layer_totals(rows)
    if totals.read_cost.samples < MIN_COMPUTE_SAMPLES:
        unfit.append(
            f"compute: {totals.read_cost.samples} samples beside reads, fewer than {MIN_COMPUTE_SAMPLES}"
        )
    return DeviceProfile(
        format="stifarm-device-profile",
        version=1,
        bundle=bundle,
        engine=engine,
        sequence_length=sequence_length,
        threads=threads,
        queue_depth=queue_depth,
        emulated=emulated,
        io=io_fit,
        compute=_width_times(totals, set(widths), unfit),
        decompress=_fidelity_times(totals, set(fidelities), unfit),
        read_cost=totals.read_cost,
        **_fixed_times(list(fixed), unfit),
        unfit=tuple(unfit),
    )


def nearest_rank(values: Iterable[int], percent: int) -> int:
    """The nearest-rank percentile: element ceil(percent·n / 100), counted from 1, of the sorted values."""
    ordered = sorted(values)
    return ordered[max(0, (percent * len(ordered) + 99) // 100 - 1)]


def _io_time(samples: Sequence[IoSample], beside: Sequence[IoSample], unfit: list[str]) -> IoFit:
    valid = sorted((s.versions, s.bytes, s.duration_ns) for s in samples if s.valid)
    if not valid:
        raise _no_samples("IO", f"{len(samples)} were taken, none is valid")
    if len(valid) < MIN_IO_SAMPLES:
        unfit.append(f"io: {len(valid)} valid samples, fewer than {MIN_IO_SAMPLES}")
    alpha_ns, ps_per_byte = _fit_io(valid)
    ratios, errors = [], []
    for versions, bytes_, duration_ns in valid:
        fitted_ns = _fitted_ns(alpha_ns, ps_per_byte, versions, bytes_)
        residual_ns = abs(duration_ns - fitted_ns)
        ratios.append(duration_ns * PPM // fitted_ns)
        errors.append(residual_ns * PPM // fitted_ns)
    error_ppm = nearest_rank(errors, 50)
    if error_ppm > IO_ERROR_BOUND_PPM:
        unfit.append(f"io: median residual of {error_ppm} ppm, more than {IO_ERROR_BOUND_PPM}")
    slower = [
        s.duration_ns * PPM // _fitted_ns(alpha_ns, ps_per_byte, s.versions, s.bytes)
        for s in beside
        if s.valid
    ]
    if len(slower) < MIN_BESIDE_SAMPLES:
        unfit.append(f"io: {len(slower)} valid reads beside compute, fewer than {MIN_BESIDE_SAMPLES}")
    return IoFit(
        alpha_ns=alpha_ns,
        ps_per_byte=ps_per_byte,
        p95_ppm=max(1, nearest_rank(ratios, 95)),
        error_ppm=error_ppm,
        samples=len(valid),
        beside_ppm=max(PPM, nearest_rank(slower, 50)) if slower else PPM,
        beside_samples=len(slower),
    )


def _fitted_ns(alpha_ns: int, ps_per_byte: int, versions: int, bytes_: int) -> int:
    return max(1, versions * alpha_ns + bytes_ * ps_per_byte // 1000)


def _fit_io(rows: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Robust line through (versions, bytes, duration): alpha in ns, 1/beta in ps per byte.

    Minimises the sum of relative absolute residuals by iteratively reweighted least squares: a median
    fit, so a minority of disturbed reads cannot pull it. Each round weighs a row by
    1 / (scale² · max(|y - fit| / scale, RESIDUAL_FLOOR)), scale being the last round's fit; the first
    round weighs by 1 / y². Neither figure is negative: one that would be is set to 0 and the other
    fitted alone. Rows that are all of one size per version cannot tell the two apart: alpha is 0.
    """
    points = [(float(versions), float(bytes_), float(max(ns, 1))) for versions, bytes_, ns in rows]
    alpha, slope = 0.0, 0.0
    for round_ in range(FIT_ROUNDS):
        vv, vb, bb, vy, by = 0.0, 0.0, 0.0, 0.0, 0.0
        for v, b, y in points:
            if round_ == 0:
                weight = 1.0 / (y * y)
            else:
                fit = alpha * v
                fit = fit + slope * b
                scale = fit if fit > 1.0 else 1.0  # a call of max would take most of the time
                residual = abs(y - fit) / scale
                floored = residual if residual > RESIDUAL_FLOOR else RESIDUAL_FLOOR
                weight = 1.0 / ((scale * scale) * floored)
            wv, wb = weight * v, weight * b
            vv = vv + wv * v
            vb = vb + wv * b
            bb = bb + wb * b
            vy = vy + wv * y
            by = by + wb * y
        determinant = vv * bb - vb * vb
        if determinant <= SINGULAR * (vv * bb):
            alpha, slope = 0.0, by / bb
            continue
        alpha = (vy * bb - by * vb) / determinant
        slope = (by * vv - vy * vb) / determinant
        if alpha < 0.0:
            alpha, slope = 0.0, by / bb
        elif slope < 0.0:
            alpha, slope = vy / vv, 0.0
    return int(alpha + 0.5), int(slope * 1000.0 + 0.5)


@dataclass(frozen=True)
class _LayerTotals:
    """Medians of the parts of a layer's time, and how far layers as a whole exceed their sum.

    The medians are of samples without reads beside (of a width or fidelity that has none, of all its
    samples); what reading beside adds is fitted to the others. ``width_ratios`` and
    ``fidelity_ratios``: for each width and each fidelity the 95th percentile of (decompression + compute) ÷
    (its medians summed), ppm, at least 1. The parts' own percentiles would not do: a disturbance hits either
    part of a layer, seldom both, and their sum would count it twice.
    """

    compute_ns: dict[int, int]
    decompress_ns: dict[int, int]
    width_ratios: dict[int, int]
    fidelity_ratios: dict[int, int]
    width_samples: dict[int, int]
    fidelity_samples: dict[int, int]
    read_cost: ReadCost


def _layer_totals(rows: Sequence[ComputeSample]) -> _LayerTotals:
    by_width: dict[int, list[ComputeSample]] = {}
    by_fidelity: dict[int, list[ComputeSample]] = {}
    for row in rows:
        by_width.setdefault(row.width, []).append(row)
        by_fidelity.setdefault(row.fidelity, []).append(row)
    compute = {
        w: nearest_rank((row.compute_ns for row in _quiet(group)), 50) for w, group in by_width.items()
    }
    decompress = {
        k: nearest_rank(((2 * row.decompress_ns + row.width) // (2 * row.width) for row in _quiet(group)), 50)
        for k, group in by_fidelity.items()
    }

    def usual_ns(row: ComputeSample) -> int:
        return compute[row.width] + row.width * decompress[row.fidelity]

    beside = [row for row in rows if row.read_bytes > 0]
    added = sorted(
        (row.read_bytes, max(0, row.decompress_ns + row.compute_ns - usual_ns(row))) for row in beside
    )
    few = (len(added) + 1) // 2  # those that read the least tell what reading costs at all
    each_ns = nearest_rank((ns for _, ns in added[:few]), 50) if few else 0
    slopes = [max(0, ns - each_ns) * 1000 // bytes_ for bytes_, ns in added[few:]]
    ps_per_byte = nearest_rank(slopes, 50) if slopes else 0

    def added_ns(row: ComputeSample) -> int:
        return each_ns + row.read_bytes * ps_per_byte // 1000 if row.read_bytes else 0

    def ratio(group: Sequence[ComputeSample]) -> int:
        return nearest_rank(
            (
                max(
                    PPM,
                    (row.decompress_ns + row.compute_ns) * PPM // max(1, usual_ns(row) + added_ns(row)),
                )
                for row in group
            ),
            95,
        )

    beside_ratio = ratio(beside) if beside else PPM
    return _LayerTotals(
        compute_ns=compute,
        decompress_ns=decompress,
        width_ratios={width: ratio(group) for width, group in by_width.items()},
        fidelity_ratios={fidelity: ratio(group) for fidelity, group in by_fidelity.items()},
        width_samples={width: len(group) for width, group in by_width.items()},
        fidelity_samples={fidelity: len(group) for fidelity, group in by_fidelity.items()},
        read_cost=ReadCost(
            median_layer_ns=each_ns,
            p95_layer_ns=-(-each_ns * beside_ratio // PPM),
            median_ps_per_byte=ps_per_byte,
            p95_ps_per_byte=-(-ps_per_byte * beside_ratio // PPM),
            samples=len(beside),
        ),
    )


def _quiet(group: Sequence[ComputeSample]) -> Sequence[ComputeSample]:
    """Those beside which nothing was read, or all where there are none."""
    return [row for row in group if row.read_bytes == 0] or group


def _width_times(totals: _LayerTotals, wanted: set[int], unfit: list[str]) -> tuple[WidthTime, ...]:
    _note_missing("compute", "width", totals.width_samples, wanted, unfit)
    return tuple(
        WidthTime(
            width=width,
            median_ns=median_ns,
            p95_ns=-(-median_ns * totals.width_ratios[width] // PPM),
            samples=totals.width_samples[width],
        )
        for width, median_ns in sorted(totals.compute_ns.items())
    )


def _fidelity_times(totals: _LayerTotals, wanted: set[int], unfit: list[str]) -> tuple[FidelityTime, ...]:
    _note_missing("decompression", "fidelity", totals.fidelity_samples, wanted, unfit)
    return tuple(
        FidelityTime(
            fidelity=cast(Fidelity, fidelity),
            median_ns=median_ns,
            p95_ns=-(-median_ns * totals.fidelity_ratios[fidelity] // PPM),
            samples=totals.fidelity_samples[fidelity],
        )
        for fidelity, median_ns in sorted(totals.decompress_ns.items())
    )


def _note_missing(what: str, key: str, samples: dict[int, int], wanted: set[int], unfit: list[str]) -> None:
    for value in sorted(wanted | samples.keys()):
        count = samples.get(value, 0)
        if count < MIN_COMPUTE_SAMPLES:
            unfit.append(f"{what}: {count} samples of {key} {value}, fewer than {MIN_COMPUTE_SAMPLES}")


def _fixed_times(samples: Sequence[FixedSample], unfit: list[str]) -> dict[str, FixedTime]:
    rows = [sample for sample in samples if not (sample.warmup or sample.throttled)]
    if not rows:
        raise _no_samples("fixed-cost")
    stored = [row for row in rows if row.storage_bytes >= row.bytes]
    if len(stored) < len(rows) and len(stored) < MIN_FIXED_SAMPLES:
        unfit.append(f"fixed: only {len(stored)} of {len(rows)} samples were read from storage")
    else:
        rows = stored
    if len(rows) < MIN_FIXED_SAMPLES:
        unfit.append(f"fixed: {len(rows)} samples, fewer than {MIN_FIXED_SAMPLES}")
    return {
        name: FixedTime(
            embed_io_ns=nearest_rank((row.embed_io_ns for row in rows), percent),
            embed_compute_ns=nearest_rank((row.embed_compute_ns for row in rows), percent),
            head_ns=nearest_rank((row.head_ns for row in rows), percent),
            samples=len(rows),
        )
        for name, percent in (("fixed_median", 50), ("fixed_p95", 95))
    }


def _no_samples(kind: str, detail: str = "all are warm-ups or throttled, or none were taken") -> InputError:
    return InputError(
        f"No usable {kind} samples for a device profile: {detail}.",
        "Profile the device again; its journal says why samples were refused.",
    )
