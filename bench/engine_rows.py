"""The rows of the table: from the samples of one interleaved run to claims. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.figures import PPM, Claim, Figure, claim, figure, median_and_p95, paired_ratio
from db.statistics import median

FAST, SLOW = "fast storage, compute-bound", "storage limited to 100 MB/s by the kernel, IO-bound"
LOW_FIDELITIES, HIGH_FIDELITIES = (2, 3, 4), (5, 6)
FIDELITIES = (*LOW_FIDELITIES, *HIGH_FIDELITIES)
PASS_GFLOP = 22.4
"""Of one request: the layers' matrix products, attention included."""

COUNTED: Mapping[str, str] = {
    "native": "Counted: each thread's ticks while it decodes codes into a tile and stores outliers over it; "
    "as compute: the prefetch of what is decoded next",
    "native-int8": "Counted: each thread's ticks while it decodes codes into a tile and takes outliers "
    "out of it; as compute: their products in fp32, tables and activations made int8, the prefetch",
}
"""By engine: what row 6 takes for decompression (``fill`` of engine_matrix.c), and what it does not."""

BYTES_LIMIT = 1.05
CLOSE = 0.999
"""Cosine to float32 from which an output counts as the same."""
CLOSE_LABEL = "6 (converged, 1.4 % outliers)"
"""What the bundle of engine_model.CLOSE_QUANTIZER is called."""


@dataclass
class Samples:
    """What every case measured: ``of[case][metric]`` one integer per round. Times in ns, sizes in bytes."""

    of: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, case: str, metrics: Mapping[str, int]) -> None:
        """One round of a case."""
        for metric, value in metrics.items():
            self.of[case][metric].append(value)

    def get(self, case: str, metric: str) -> list[int]:
        """By round; empty for what was not measured."""
        return self.of.get(case, {}).get(metric, [])

    def has(self, *cases: str) -> bool:
        """Whether all were measured."""
        return all(case in self.of for case in cases)


@dataclass(frozen=True)
class PeerInfo:
    """What the tables must know of a peer. ``metric``: its start, by the rule of ``table.Peer.native``;
    ``lacks``: what it does differently."""

    name: str
    precision: str
    metric: str
    cosine: float
    lacks: str = ""


@dataclass(frozen=True)
class OurInfo:
    """A plan of ours that is run cold: its case, engine, stored bytes, and cosine to float32."""

    case: str
    label: str
    engine: str
    stored_bytes: int
    cosine: float


@dataclass(frozen=True)
class PlanSample:
    """One random plan on one board: what was predicted, and the medians of what was measured, in all and in
    each of the two passes. ns."""

    board: str
    target_ns: int
    predicted_ns: int
    measured_ns: int
    passes_ns: tuple[int, int]
    predicted_stall_ns: int
    stall_ns: int


@dataclass
class Measured:
    """All of a run."""

    samples: Samples = field(default_factory=Samples)
    peers: list[PeerInfo] = field(default_factory=list)
    ours: list[OurInfo] = field(default_factory=list)
    plans: list[PlanSample] = field(default_factory=list)
    isa: str = ""
    """Instruction set that the engine took."""
    absent: dict[int, str] = field(default_factory=dict)
    """Row → why it, or a part of it, could not be measured here."""


def cold_case(engine: str, label: object) -> str:
    """Cold, storage as it is."""
    return f"{engine} {label} cold"


def limited_case(name: str) -> str:
    """Cold, storage limited."""
    return f"{name} at 100 MB/s"


def held_case(engine: str, fidelity: object) -> str:
    """Warm requests, the model held in memory."""
    return f"{engine} {fidelity} held"


STI, STI_HELD = "native sti with 4 MB", "native sti's shards held whole"
STI_CALM, STI_CALM_HELD = "native sti with more buffer, no stall predicted", "the same shards held whole"
"""Where the plan of row 4 predicts a stall."""
KERNELS = "kernels alone"
PLAIN_READS = limited_case("plain reads")


def plain_reads_case(fidelity: int) -> str:
    """Plain reads of as many bytes as the run at a fidelity must read."""
    return limited_case(f"plain reads of the bytes at {fidelity} bits")


# ------------------------------------------------------------------ rows 1 to 5: starting, memory, preloading


def row_1(found: Measured) -> list[Claim]:
    """Cold start at 4 bits against llama.cpp q4_0."""
    peers = [peer for peer in found.peers if peer.precision == "4 bits"]
    claims = []
    for engine, mode, limit in (("native", "fp32", 0.60), ("native-int8", "int8", 0.45)):
        best = _best(found, peers, lambda peer: peer.metric)
        case = cold_case(engine, 4)
        if best is None or not found.samples.has(case):
            continue
        ours = found.samples.get(case, "spawn_ns")
        ratio = paired_ratio(ours, found.samples.get(best.name, best.metric))
        without = paired_ratio(ours, found.samples.get(best.name, "create_ns"))
        note = (
            f"{_ms(ours)} ms against {_ms(found.samples.get(best.name, best.metric))} ms of {best.name}; "
            f"{without.text(digits=2)} × when its process start is not counted"
        )
        if engine == "native" and (peak := _best_gflops(found, "peak_mflops")):
            floor_ms = 1e3 * PASS_GFLOP / peak
            note += f"; its multiply-adds alone take {floor_ms:.0f} ms at the CPU's measured peak"
        what = f"cold start, spawn to logits, 12 × 12 at 4 bits, {mode}, ÷ llama.cpp q4_0"
        claims.append(claim("1", what, f"≤ {limit:.2f} ×", ratio, limit, FAST, unit=" ×", note=note))
    return claims


def row_2(found: Measured) -> list[Claim]:
    """The same at the lowest fidelity whose output is close to float32, against the best peer that is."""
    ours = [entry for entry in found.ours if entry.cosine >= CLOSE and found.samples.has(entry.case)]
    peers = [peer for peer in found.peers if peer.cosine >= CLOSE]
    best = _best(found, peers, lambda peer: peer.metric)
    what = f"the same at our lowest fidelity within cosine {CLOSE} of fp32, ÷ the best peer that is"
    if not ours or best is None:
        note = "no plan of ours is that close" if not ours else "no peer is that close"
        return [Claim("2", what, "≤ 0.50 ×", "–", None, FAST, note + _next_best(found))]
    lowest = min(
        ours, key=lambda entry: (entry.stored_bytes, median(found.samples.get(entry.case, "spawn_ns")))
    )
    times, theirs = found.samples.get(lowest.case, "spawn_ns"), found.samples.get(best.name, best.metric)
    note = f"ours: {lowest.label}, {lowest.stored_bytes / 1e6:.0f} MB, {_ms(times)} ms; "
    note += f"{best.name}: {_ms(theirs)} ms" + _next_best(found)
    return [claim("2", what, "≤ 0.50 ×", paired_ratio(times, theirs), 0.50, FAST, unit=" ×", note=note)]


def _next_best(found: Measured) -> str:
    """What the closest uniform plan of an engine would reach where none is close: what limits the row."""
    labels = tuple(f"{fidelity} bits" for fidelity in (*FIDELITIES, CLOSE_LABEL))
    uniform = [o for o in found.ours if o.label.startswith(labels) and found.samples.has(o.case)]
    text = ""
    for engine in ("native", "native-int8"):
        mine = [o for o in uniform if o.engine == engine and o.cosine < CLOSE]
        if not mine or any(o.engine == engine and o.cosine >= CLOSE for o in uniform):
            continue
        ours = max(mine, key=lambda o: o.cosine)
        best = _best(found, [p for p in found.peers if p.cosine >= ours.cosine], lambda p: p.metric)
        if best is not None:
            ratio = paired_ratio(
                found.samples.get(ours.case, "spawn_ns"), found.samples.get(best.name, best.metric)
            )
            text += f"; {ours.label} reaches cosine {ours.cosine:.4f} at {ratio.text(digits=2)} × {best.name}"
    return text


def row_3(found: Measured) -> list[Claim]:
    """Limited storage: the time against that of reading the bytes."""
    claims = []
    for fidelity in FIDELITIES:
        case = limited_case(f"native {fidelity}")
        if not found.samples.has(case, PLAIN_READS):
            continue
        times, must = found.samples.get(case, "spawn_ns"), found.samples.get(case, "must_read_bytes")
        rate = found.samples.get(PLAIN_READS, "bytes_per_s")
        reading = [round(b * 1e9 / r) for b, r in zip(must, rate, strict=True)]
        ratio = paired_ratio(times, reading)
        plain = paired_ratio(times, found.samples.get(plain_reads_case(fidelity), "duration_ns"))
        note = f"{_ms(times)} ms for {must[0] / 1e6:.1f} MB at {median(rate) / 1e6:.1f} MB/s sustained"
        best = _best(
            found, [p for p in found.peers if p.precision == "4 bits"], lambda p: p.metric, limited_case
        )
        if best is not None:
            theirs = paired_ratio(times, found.samples.get(limited_case(best.name), best.metric))
            note += f"; {theirs.text(digits=2)} × {best.name}"
        what = f"storage limited to 100 MB/s, {fidelity} bits, fp32: time ÷ (bytes ÷ measured bandwidth)"
        # The limit lets bursts pass, so the bandwidth of a long read flatters a short run: both must hold.
        shown = f"{ratio.text(digits=3)} × sustained, {plain.text(digits=3)} × plain reads of as many bytes"
        reached = max(ratio.value, plain.value) <= BYTES_LIMIT
        claims.append(Claim("3", what, f"≤ {BYTES_LIMIT} ×", shown, reached, SLOW, note, ratio))
    return claims


def row_4(found: Measured) -> list[Claim]:
    """Peak memory of the process."""
    claims = []
    smallest = min(
        (
            (peak, peer.name)
            for peer in found.peers
            if (peaks := found.samples.get(peer.name, "peak_bytes"))
            for peak in [median(peaks)]
        ),
        default=None,
    )
    note = "" if smallest is None else f"smallest peer: {smallest[1]}, {smallest[0] / 1e6:.0f} MB"
    for case, label in (
        (cold_case("native", 4), "4 bits, fp32"),
        (cold_case("native-int8", 4), "4 bits, int8"),
        (STI, "`sti` plan with 4 MB preload, fp32"),
    ):
        peaks = found.samples.get(case, "peak_bytes")
        if peaks:
            what = f"peak memory of the process (VmHWM), {label}"
            shown = figure(peaks)
            claims.append(
                claim("4", what, "≤ 22 MB", shown, 22e6, FAST, scale=1e6, digits=1, unit=" MB", note=note)
            )
    return claims


def row_5(found: Measured) -> list[Claim]:
    """A warm request with a small preload buffer against the same model held whole."""
    claims = []
    for case, held in ((STI, STI_HELD), (STI_CALM, STI_CALM_HELD)):
        if not found.samples.has(case, held):
            continue
        ours, theirs = (found.samples.get(name, "latency_ns") for name in (case, held))
        preload_mb = median(found.samples.get(case, "preload_bytes")) / 1e6
        stall_ns = median(found.samples.get(case, "predicted_stall_ns"))
        ratio = paired_ratio(ours, theirs)
        what = f"warm `sti` request with {preload_mb:.0f} MB preload ÷ the same shards held whole, fp32"
        working_mb = median(found.samples.get(case, "working_bytes")) / 1e6
        note = (
            f"{_ms(ours)} against {_ms(theirs)} ms; W {working_mb:.1f} MB; "
            f"predicted stall {stall_ns / 1e6:.2f} ms, measured {_ms(found.samples.get(case, 'stall_ns'))} ms"
        )
        made = claim("5", what, "≤ 1.1 ×", ratio, 1.1, FAST, unit=" ×", note=note)
        if stall_ns > 0:
            why = f"{note}; the row is of plans that predict none, and with these buffers none does"
            made = replace(made, reached=None, unjudged="not applicable", note=why)
        claims.append(made)
    return claims


# ------------------------------------------------------------------ rows 6 to 10: parts, predictions, steady


def row_6(found: Measured) -> list[Claim]:
    """Decompression's share of compute: the worst fidelity of each group, by engine."""
    claims = []
    for engine, mode, what in (
        ("native", "fp32", "decompression and outliers"),
        ("native-int8", "int8", "decompression, outliers' products not counted"),
    ):
        for group, limit in ((LOW_FIDELITIES, 80_000), (HIGH_FIDELITIES, 120_000)):
            shares = {
                fidelity: figure(values)
                for fidelity in group
                if (values := found.samples.get(held_case(engine, fidelity), "decompress_ppm"))
            }
            if not shares:
                continue
            worst = max(shares, key=lambda fidelity: shares[fidelity].value)
            note = ", ".join(f"{k} bits {shares[k].value / 1e4:.1f} %" for k in shares)
            note += f" (shown: {worst} bits)"
            close = found.samples.get(held_case(engine, CLOSE_LABEL), "decompress_ppm")
            if close and 6 in group:
                note += f"; {CLOSE_LABEL}: {median(close) / 1e4:.1f} %"
            claims.append(
                claim(
                    "6",
                    f"{what}, share of compute, {group[0]}–{group[-1]} bits, {mode}",
                    f"≤ {limit // 10_000} %",
                    shares[worst],
                    limit,
                    FAST,
                    scale=1e4,
                    digits=1,
                    unit=" %",
                    note=f"{note}. {COUNTED[engine]}",
                )
            )
    return claims


def row_7(found: Measured) -> list[Claim]:
    """Stall beyond the predicted, of T, over the random plans of each board."""
    claims = []
    for board, plans in _by_board(found).items():
        beyond = [PPM * max(0, plan.stall_ns - plan.predicted_stall_ns) // plan.target_ns for plan in plans]
        middle, high = median_and_p95(beyond)
        what = f"stall beyond the predicted, of T, {len(plans)} random plans, 95th percentile"
        note = f"median {middle / 1e4:.2f} %, largest {max(beyond) / 1e4:.2f} %"
        shown = Figure(float(high), None, None, len(plans))
        claims.append(
            claim("7", what, "≤ 3 %", shown, 30_000, board, scale=1e4, digits=2, unit=" %", note=note)
        )
    return claims


def row_8(found: Measured) -> list[Claim]:
    """Predicted against measured latency, medians of both."""
    claims = []
    for board, plans in _by_board(found).items():
        errors = [PPM * abs(plan.measured_ns - plan.predicted_ns) // plan.measured_ns for plan in plans]
        bias = [PPM * (plan.measured_ns - plan.predicted_ns) // plan.measured_ns for plan in plans]
        middle, high = median_and_p95(errors)
        apart = [PPM * abs(a - b) // min(a, b) for a, b in (plan.passes_ns for plan in plans)]
        same, far = median_and_p95(apart)
        note = (
            f"{len(plans)} random plans; measured beyond predicted, median: {median(bias) / 1e4:.1f} %; "
            f"measured twice, the same plan differs by {same / 1e4:.1f} % in the median, "
            f"{far / 1e4:.1f} % at the 95th percentile"
        )
        for name, value, shown, limit in (
            ("median", middle, figure(errors), 50_000),
            ("95th percentile", high, Figure(float(high), None, None, len(plans)), 100_000),
        ):
            assert value == int(shown.value)
            what = f"predicted against measured latency, {name} error"
            reach = f"≤ {limit // 10_000} %"
            claims.append(
                claim("8", what, reach, shown, limit, board, scale=1e4, digits=1, unit=" %", note=note)
            )
    return claims


def row_9(found: Measured) -> list[Claim]:
    """From the spawn to where the first request's clock starts."""
    claims = []
    for metric, label in (("ready_ns", "page cache dropped"), ("ready_cached_ns", "its files cached")):
        values = found.samples.get(cold_case("native", 4), metric)
        if values:
            shown = figure(values)
            what = f"process start to where a request's clock starts, {label}"
            claims.append(claim("9", what, "≤ 5 ms", shown, 5e6, FAST, scale=1e6, unit=" ms"))
    return claims


def row_10(found: Measured) -> list[Claim]:
    """Steady requests, the model held in memory; the matrix products alone."""
    claims = []
    for engine, precision in (("native", "fp32"), ("native-int8", "int8")):
        peers = [peer for peer in found.peers if peer.precision == precision]
        best = _best(found, peers, lambda _: "steady_ns")
        times = {
            fidelity: values
            for fidelity in (*FIDELITIES, 32)
            if (values := found.samples.get(held_case(engine, fidelity), "latency_ns"))
        }
        if best is None or not times:
            continue
        # The policy that holds a model whole does so at 6 bits (preload-6).
        fidelity = 6 if 6 in times else max(times)
        theirs = found.samples.get(best.name, "steady_ns")
        note = f"{_ms(times[fidelity])} ms against {best.name}: {_ms(theirs)} ms; others: " + ", ".join(
            f"{k} bits {_ms(values)} ms" for k, values in times.items() if k != fidelity
        )
        what = f"steady, held in memory at {fidelity} bits, {precision}, ÷ the best {precision} peer"
        ratio = paired_ratio(times[fidelity], theirs)
        claims.append(claim("10", what, "≤ 1.00 ×", ratio, 1.0, FAST, unit=" ×", note=note))
    return claims + _products_alone(found)


def _products_alone(found: Measured) -> list[Claim]:
    """Matrix products against the multiply-adds that the CPU does from registers: the best burst of each."""
    product, peak = _best_gflops(found, "product_1_mflops"), _best_gflops(found, "peak_1_mflops")
    if product is None or peak is None:
        return []
    what, reach = "matrix products alone, share of the measured multiply-add peak", "≥ 80 %"
    regime = f"fp32, tile in cache, 1 thread, nothing decoded{', ' if found.isa else ''}{found.isa}"
    note = f"{product:.0f} of {peak:.0f} GFLOP/s, each the best of bursts that take turns"
    both = _best_gflops(found, "peak_mflops")
    if both and (request := found.samples.get(held_case("native", 32), "latency_ns")):
        reached = 1e9 * PASS_GFLOP / median(request)
        note += (
            f"; a whole request at 32 bits, 2 threads: {PASS_GFLOP} GFLOP in {_ms(request)} ms are "
            f"{reached:.0f} GFLOP/s, {100 * reached / both:.0f} % of the {both:.0f} of two threads at once"
        )
    if product > peak:
        note += "; no product is faster than the peak, so that was measured too low"
        return [Claim("10", what, reach, "–", None, regime, note)]
    return [Claim("10", what, reach, f"{100 * product / peak:.0f} %", product >= 0.8 * peak, regime, note)]


ROWS: Mapping[int, Callable[[Measured], list[Claim]]] = {
    1: row_1, 2: row_2, 3: row_3, 4: row_4, 5: row_5, 6: row_6, 7: row_7, 8: row_8, 9: row_9, 10: row_10,
}  # fmt: skip


def claims_of(found: Measured, rows: Iterable[int]) -> list[Claim]:
    """The rows asked for, in order; what could not be measured says why."""
    claims: list[Claim] = []
    for row in sorted(rows):
        made = ROWS[row](found)
        claims += made
        if not made or row in found.absent:
            why = found.absent.get(row, "nothing was measured for it")
            claims.append(Claim(str(row), "–", "–", "–", None, "", why))
    return claims


def measured_rows(found: Measured) -> frozenset[int]:
    """Rows that have something to say."""
    return frozenset(row for row, claims in ROWS.items() if claims(found))


# ------------------------------------------------------------------ parts


def _best(
    found: Measured,
    peers: Sequence[PeerInfo],
    metric: Callable[[PeerInfo], str],
    case: Callable[[str], str] = str,
) -> PeerInfo | None:
    """The peer with the smallest median."""
    measured = [peer for peer in peers if found.samples.get(case(peer.name), metric(peer))]
    return min(measured, key=lambda p: median(found.samples.get(case(p.name), metric(p))), default=None)


def _best_gflops(found: Measured, metric: str) -> float | None:
    """Of all rounds: other programs only take from it."""
    samples = found.samples.get(KERNELS, metric)
    return max(samples) / 1e3 if samples else None


def _by_board(found: Measured) -> dict[str, list[PlanSample]]:
    boards: dict[str, list[PlanSample]] = {}
    for plan in found.plans:
        boards.setdefault(plan.board, []).append(plan)
    return boards


def _ms(samples: Sequence[int]) -> str:
    return figure(samples).text(1e6)
