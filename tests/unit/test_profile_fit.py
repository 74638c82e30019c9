"""The fits: exact recovery, robustness, bounds, and figures pinned for other implementations."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sti_runtime.errors import InputError
from sti_runtime.messages import ComputeSample, FixedSample, IoSample
from sti_runtime.profile import PPM, DeviceProfile
from sti_runtime.profile_fit import (
    IO_ERROR_BOUND_PPM,
    MIN_COMPUTE_SAMPLES,
    MIN_FIXED_SAMPLES,
    MIN_IO_SAMPLES,
    fit_profile,
    nearest_rank,
)

FIDELITIES = (2, 6, 32)


def io(versions: int, bytes_: int, duration_ns: int, *, valid: bool = True) -> IoSample:
    return IoSample(
        versions=versions, bytes=bytes_, storage_bytes=bytes_, duration_ns=duration_ns, valid=valid,
        mode_asked="direct", mode_proven="direct", throttled=False,
    )  # fmt: skip


def line(alpha_ns: int, ps_per_byte: int, *, repeats: int = 4) -> list[IoSample]:
    """Layer reads of 1–4 slices at 2–32 bits, exactly on the line."""
    return [
        io(m, m * k * 4096, m * alpha_ns + m * k * 4096 * ps_per_byte // 1000)
        for m in (1, 2, 4)
        for k in FIDELITIES
        for _ in range(repeats)
    ]


def compute(
    width: int,
    fidelity: int,
    decompress: int,
    ns: int,
    *,
    read_bytes: int = 0,
    warmup: bool = False,
    throttled: bool = False,
) -> ComputeSample:
    return ComputeSample(
        width=width,
        fidelity=fidelity,
        read_bytes=read_bytes,
        decompress_ns=decompress,
        compute_ns=ns,
        throttled=throttled,
        warmup=warmup,
    )


COMPUTE = [
    compute(m, k, m * k * 10, m * 1000 + i + added, read_bytes=bytes_)
    for m in (1, 2)
    for k in FIDELITIES
    for i in range(5)
    for bytes_, added in ((0, 0), (0, 0), (10, 40), (1_000, 140))
]
"""Layers, twice alone, then with reads beside, which take 40 ns longer and 0.1 ns per byte."""


def fixed(
    embed_io: int,
    embed_compute: int,
    head: int,
    *,
    stored: int = 10,
    warmup: bool = False,
    throttled: bool = False,
) -> FixedSample:
    return FixedSample(
        embed_io_ns=embed_io,
        embed_compute_ns=embed_compute,
        head_ns=head,
        bytes=10,
        storage_bytes=stored,
        mode_asked="direct",
        mode_proven="direct" if stored >= 10 else "mixed",
        throttled=throttled,
        warmup=warmup,
    )


FIXED = [fixed(100 + i, 200 + i, 300 + i) for i in range(10)]


BESIDE = [
    io(m, m * k * 4096, (m * 5_000 + m * k * 4096 * 400 // 1000) * 2)
    for m, k, _ in ((m, k, 0) for m in (1, 2, 4) for k in FIDELITIES)
]
"""Reads of ``line(5_000, 400)`` while a layer was computed: twice as long."""


def fit(
    io_samples: list[IoSample] | None = None,
    compute_samples: list[ComputeSample] | None = None,
    fixed_samples: list[FixedSample] | None = None,
    beside_samples: list[IoSample] | None = None,
    *,
    widths: tuple[int, ...] = (1, 2),
    fidelities: tuple[int, ...] = FIDELITIES,
) -> DeviceProfile:
    return fit_profile(
        bundle="b" * 64,
        engine="torch",
        sequence_length=32,
        threads=2,
        queue_depth=1,
        emulated=False,
        widths=widths,
        fidelities=fidelities,
        io=line(5_000, 400) if io_samples is None else io_samples,
        beside=BESIDE if beside_samples is None else beside_samples,
        compute=COMPUTE if compute_samples is None else compute_samples,
        fixed=FIXED if fixed_samples is None else fixed_samples,
    )


def test_a_good_profile_is_fit_and_recovers_the_line() -> None:
    profile = fit()
    assert (profile.io.alpha_ns, profile.io.ps_per_byte) == (5_000, 400)
    assert (profile.io.p95_ppm, profile.io.error_ppm, profile.io.samples) == (PPM, 0, 36)
    assert profile.unfit == ()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_any_exact_line_is_recovered(alpha_ns: int, ps_per_byte: int) -> None:
    profile = fit(line(alpha_ns, ps_per_byte, repeats=1))
    for sample in line(alpha_ns, ps_per_byte, repeats=1):
        fitted = profile.io.alpha_ns * sample.versions + sample.bytes * profile.io.ps_per_byte // 1000
        assert abs(fitted - sample.duration_ns) <= 4 + sample.duration_ns // 500


def test_a_fifth_of_the_reads_ten_times_slower_does_not_move_the_fit() -> None:
    disturbed = [
        sample.model_copy(update={"duration_ns": sample.duration_ns * 10}) if i % 5 == 0 else sample
        for i, sample in enumerate(line(5_000, 400))
    ]
    profile = fit(disturbed)
    assert profile.io.alpha_ns == pytest.approx(5_000, rel=0.02)
    assert profile.io.ps_per_byte == pytest.approx(400, rel=0.02)
    assert profile.io.p95_ppm > 9 * PPM  # planning at p95 still pays for them
    assert profile.unfit == ()


def test_neither_figure_is_ever_negative() -> None:
    falling = [io(1, k * 4096, 100_000 - k * 1_000) for k in FIDELITIES for _ in range(5)]
    profile = fit(falling)
    assert profile.io.ps_per_byte == 0
    assert profile.io.alpha_ns == pytest.approx(94_000, rel=0.05)
    convex = [io(1, k * 4096, k * k * 100) for k in FIDELITIES for _ in range(5)]
    assert fit(convex).io.alpha_ns == 0


def test_reads_of_one_size_give_all_to_the_bytes() -> None:
    profile = fit([io(m, m * 4096, m * 8_192) for m in (1, 2, 3, 4) for _ in range(4)])
    assert (profile.io.alpha_ns, profile.io.ps_per_byte, profile.unfit) == (0, 2_000, ())


def test_the_order_of_samples_does_not_matter() -> None:
    shuffled = [line(5_123, 431), list(COMPUTE), list(FIXED)]
    for rows in shuffled:
        random.Random(1).shuffle(rows)  # type: ignore[arg-type]
    assert fit(shuffled[0], shuffled[1], shuffled[2]) == fit(line(5_123, 431))  # type: ignore[arg-type]


def test_percentiles_are_nearest_rank_and_warm_ups_do_not_count() -> None:
    assert [nearest_rank(range(1, 21), p) for p in (50, 95, 100)] == [10, 19, 20]
    assert [nearest_rank([7], p) for p in (1, 50, 95)] == [7, 7, 7]
    warm = [*COMPUTE, compute(1, 2, 10**9, 10**9, warmup=True)]
    profile = fit(None, warm, [*FIXED, fixed(10**9, 10**9, 10**9, warmup=True)])
    assert profile == fit()
    assert profile.layer_ns(2, p95=False) == 2_002
    assert profile.layer_ns(2) == 2_004
    assert (profile.decompress_ns(6, p95=False), profile.decompress_ns(6)) == (60, 61)
    assert profile.fixed_median.total_ns == 104 + 204 + 304
    assert profile.fixed_p95.total_ns == 109 + 209 + 309


def test_p95_is_of_the_layer_as_a_whole() -> None:
    # One disturbance hits either part, never both: one layer in ten takes 5,000 ns more.
    steady = [compute(1, 2, 100, 900)] * 18
    rows = [*steady, compute(1, 2, 5_100, 900), compute(1, 2, 100, 5_900)]
    profile = fit(None, rows, widths=(1,), fidelities=(2,))
    assert (profile.layer_ns(1, p95=False), profile.decompress_ns(2, p95=False)) == (900, 100)
    assert profile.layer_ns(1) + profile.decompress_ns(2) == 6_000
    # A layer faster than its medians does not make planning bolder than the median.
    fast = [compute(1, 2, 50, 900), *[compute(1, 2, 100, 900)] * 6]
    assert fit(None, fast, widths=(1,), fidelities=(2,)).t_comp_ns(1) == 1_000


def test_decompression_is_per_shard_rounded_half_up() -> None:
    rows = [compute(2, 2, total, 1_000) for total in (3, 3, 3, 3, 4)]
    profile = fit(None, rows, widths=(2,), fidelities=(2,))
    assert profile.decompress_ns(2, p95=False) == 2
    rows = [compute(3, 2, 4, 1_000)] * 5
    assert fit(None, rows, widths=(3,), fidelities=(2,)).decompress_ns(2, p95=False) == 1


def test_invalid_reads_do_not_count() -> None:
    wrong = [io(1, 4096, 10**9, valid=False)] * 100
    assert fit([*line(5_000, 400), *wrong]) == fit()


def test_reads_beside_compute_are_compared_with_the_line() -> None:
    io_fit = fit().io
    assert (io_fit.beside_ppm, io_fit.beside_samples) == (2 * PPM, 9)
    assert io_fit.budget_ns(4096) == 2 * io_fit.p95_ns(4096)
    faster = [sample.model_copy(update={"duration_ns": 1}) for sample in BESIDE]
    assert fit(beside_samples=faster).io.beside_ppm == PPM
    wrong = [io(1, 4096, 10**9, valid=False)] * 100
    assert fit(beside_samples=[*BESIDE, *wrong]) == fit()


def test_without_reads_beside_compute_a_profile_is_unfit() -> None:
    for count, ppm in ((0, PPM), (4, 2 * PPM)):
        profile = fit(beside_samples=BESIDE[:count])
        assert profile.io.beside_ppm == ppm
        assert profile.unfit == (f"io: {count} valid reads beside compute, fewer than 5",)


def test_what_reading_adds_to_compute_is_apart_once_and_per_byte() -> None:
    profile = fit()
    assert profile.layer_ns(2, p95=False) == 2_002  # of the layers beside which nothing was read
    cost = profile.read_cost
    assert (cost.median_layer_ns, cost.median_ps_per_byte, cost.samples) == (40, 100, 60)
    sharing = profile.sharing(p95=False)
    assert [sharing.layer_ns(bytes_) for bytes_ in (0, 1, 1_000)] == [0, 40, 140]
    # Layers with reads beside are disturbed twice as much: planning's figures rise by as much as they do.
    rows = [
        *[compute(1, 2, 100, 900)] * 5,
        *[compute(1, 2, 100, 1_000, read_bytes=1_000)] * 6,
        *[compute(1, 2, 100, 1_500, read_bytes=6_000)] * 6,
        compute(1, 2, 100, 3_100, read_bytes=6_000),
    ]
    cost = fit(None, rows, widths=(1,), fidelities=(2,)).read_cost
    assert (cost.median_layer_ns, cost.median_ps_per_byte) == (100, 83)
    assert (cost.p95_layer_ns, cost.p95_ps_per_byte) == (201, 167)


def test_layers_that_reading_makes_faster_cost_nothing_to_read_beside() -> None:
    rows = [*[compute(1, 2, 100, 900)] * 5, *[compute(1, 2, 100, 800, read_bytes=1_000)] * 5]
    cost = fit(None, rows, widths=(1,), fidelities=(2,)).read_cost
    assert (cost.p95_layer_ns, cost.p95_ps_per_byte) == (0, 0)


def test_a_width_only_measured_beside_reads_counts_them() -> None:
    rows = [compute(1, 2, 100, 900, read_bytes=8)] * 5
    profile = fit(None, rows, widths=(1,), fidelities=(2,))
    assert (profile.layer_ns(1), profile.decompress_ns(2), profile.read_cost.median_ps_per_byte) == (
        900,
        100,
        0,
    )


def test_unfit_reasons() -> None:
    assert fit(line(5_000, 400)[: MIN_IO_SAMPLES - 1]).unfit == ("io: 11 valid samples, fewer than 12",)
    noisy = [
        sample.model_copy(update={"duration_ns": sample.duration_ns * (1, 2, 4, 8)[i % 4]})
        for i, sample in enumerate(line(5_000, 400))
    ]
    profile = fit(noisy)
    assert profile.io.error_ppm > IO_ERROR_BOUND_PPM
    assert profile.unfit == (
        f"io: median residual of {profile.io.error_ppm} ppm, more than {IO_ERROR_BOUND_PPM}",
    )
    assert fit(widths=(1, 2, 4), fidelities=(2, 3, 6, 32)).unfit == (
        "compute: 0 samples of width 4, fewer than 5",
        "decompression: 0 samples of fidelity 3, fewer than 5",
    )
    few = COMPUTE[: MIN_COMPUTE_SAMPLES - 1]
    assert fit(None, few, widths=(1,), fidelities=(2,)).unfit == (
        "compute: 2 samples beside reads, fewer than 5",
        "compute: 4 samples of width 1, fewer than 5",
        "decompression: 4 samples of fidelity 2, fewer than 5",
    )
    assert fit(None, None, FIXED[: MIN_FIXED_SAMPLES - 1]).unfit == ("fixed: 4 samples, fewer than 5",)


def test_fixed_samples_from_the_page_cache_are_left_out_or_named() -> None:
    cached = [fixed(1, 1, 1, stored=0)] * 20
    assert fit(None, None, [*FIXED, *cached]) == fit()
    profile = fit(None, None, cached)
    assert profile.unfit == ("fixed: only 0 of 20 samples were read from storage",)
    assert profile.fixed_p95.total_ns == 3


def test_nothing_to_fit_is_a_clear_error() -> None:
    with pytest.raises(InputError, match=r"No usable IO samples.*3 were taken, none is valid"):
        fit([io(1, 4096, 1, valid=False)] * 3)
    with pytest.raises(InputError, match="No usable compute samples"):
        fit(None, [compute(1, 2, 1, 1, warmup=True)])
    with pytest.raises(InputError, match="No usable fixed-cost samples"):
        fit(None, None, [])
    with pytest.raises(InputError, match="at 7 bits, which no bundle holds"):
        fit(None, [compute(1, 7, 1, 1)])


def lcg(seed: int, count: int) -> list[int]:
    """x → (1103515245 x + 12345) mod 2^31: the same in any language."""
    values = []
    for _ in range(count):
        seed = (1_103_515_245 * seed + 12_345) % (1 << 31)
        values.append(seed)
    return values


def test_figures_pinned_for_other_implementations() -> None:
    """The integers a C program gets from these samples (gcc -O2 -ffp-contract=off, x86-64)."""
    noise = lcg(1, 120)
    samples = []
    for i, x in enumerate(noise):
        m, k = (3, 6, 9, 12)[i % 4], (2, 3, 4, 5, 6, 32)[i // 4 % 6]
        bytes_ = m * k * 18 * 4096
        fitted = m * 21_337 + bytes_ * 417 // 1000
        samples.append(io(m, bytes_, fitted * (900_000 + x % 400_000) // PPM))
    slower = [sample.model_copy(update={"duration_ns": 2 * sample.duration_ns}) for sample in samples[:9]]
    assert fit(samples, beside_samples=slower).io.model_dump() == {
        "alpha_ns": 18_803,
        "ps_per_byte": 471,
        "p95_ppm": 1_153_761,
        "error_ppm": 97_724,
        "samples": 120,
        "beside_ppm": 2_060_248,
        "beside_samples": 9,
    }
