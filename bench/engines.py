"""The native engine against the best engines there are, and against its own predictions: one interleaved run.

    python -m bench.engines --setup       once: install and build the peers (minutes; 3 GB in ~/.cache)
    python -m bench.engines               all rows, 12 rounds
    python -m bench.engines --rows 1,4 --rounds 3 --json FILE
    python -m bench.engines --write docs/engine.md
    python -m bench.engines --from FILE ... --write docs/engine.md     joins runs that --json wrote

In every round all cases run once, in random order, each in a fresh process. Wants a quiet machine; root, to
drop the page cache and to limit storage. Prints tables in Markdown; --json keeps every sample. A page takes
one run of all rows, or several joined.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.engine_model import CLOSE_FIDELITY, TOKENS, BenchModel, cache_folder, prepare
from bench.engine_ours import ENGINES, THREADS, WARMUPS, Inferred, Ours
from bench.engine_page import Run, as_json, page, run_from_json, unmeasured
from bench.engine_rows import (
    CLOSE_LABEL,
    KERNELS,
    PLAIN_READS,
    ROWS,
    STI,
    STI_CALM,
    STI_CALM_HELD,
    STI_HELD,
    Measured,
    OurInfo,
    PeerInfo,
    PlanSample,
    cold_case,
    held_case,
    limited_case,
    plain_reads_case,
)
from bench.figures import between_marks, cosine
from bench.launching import (
    ROOT,
    THIS_MACHINE,
    Board,
    PageCache,
    RunFailedError,
    Tools,
    compile_tools,
    direct_read_ns,
    limited_board,
    run,
)
from bench.peers.setup import PeersHome, SetupError, pins, set_up
from bench.peers.table import PEERS, Peer
from db.statistics import median
from orchestrator.cgroups import CgroupUnavailableError
from orchestrator.toolchain import Sources, build_agent
from sti_runtime.messages import EngineName
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity
from sti_runtime.records import sha256_hex

REQUESTS = 12
"""Of one process: the first, then those whose median is its steady time."""

LIMIT_BYTES_PER_S = 100_000_000
PLAIN_READ_BYTES = 100_000_000
PLANS = 50
PLAN_REQUESTS = 4
"""Of each of the two passes over the plans of a profile."""
PLANS_PER_PROFILE = 25
BOARDS = ("this", "io", "cpu")
KERNEL_ROUNDS = 30
"""Each of eight bursts of products, of one thread's multiply-adds, and of all threads'."""
PEER_ROWS = frozenset({1, 2, 4, 10})
LIMITED_ROWS = frozenset({3})
KERNEL_ROWS = frozenset({1, 10})
PREDICTED_ROWS = frozenset({7, 8})
CLOSE_ROWS = frozenset({2, 6, 10})
SAMPLED_FIDELITIES: Sequence[Fidelity] = (2, 3, 4, 5, 6)

Metrics = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """One thing that is run once per round. ``rows``: what needs it."""

    name: str
    rows: frozenset[int]
    run: Callable[[], Metrics]


# ------------------------------------------------------------------ peers


@dataclass
class PeerRunner:
    """Runs peers cold and remembers the first logits of each."""

    home: PeersHome
    model: BenchModel
    tools: Tools
    cache: PageCache
    cosines: dict[str, float]

    def cold(self, peer: Peer, board: Board = THIS_MACHINE) -> Metrics:
        """One process: its start, its later requests, its memory."""
        files = peer.model_files(self.home)
        argv = peer.argv(self.home, THREADS, self.model.rows_file, REQUESTS)
        self.cache.drop((*files, self.home.llama_driver) if peer.native else files)
        done = run(self.tools, argv, board)
        answer = done.answer
        if peer.name not in self.cosines:
            self.cosines[peer.name] = cosine(
                answer["logits"][: len(self.model.reference)], self.model.reference
            )
        return {
            "spawn_ns": answer["logits_ns"] - done.spawned_ns,
            "create_ns": answer["logits_ns"] - answer["began_ns"],
            "steady_ns": median(answer["steady_ns"]),
            "peak_bytes": answer["peak_bytes"],
        }


def peer_cases(runner: PeerRunner) -> Iterator[Case]:
    """Every peer, cold on this machine."""
    for peer in PEERS:
        yield Case(peer.name, PEER_ROWS, partial(runner.cold, peer))


# ------------------------------------------------------------------ ours


def cold_metrics(ours: Ours, plan: Plan, engine: EngineName, board: Board = THIS_MACHINE) -> Metrics:
    """One cold process, then one whose files are cached (for its start-up only)."""
    before = board.bytes_read()
    done = ours.infer(plan, engine, kind="cold", board=board, cold=True)
    planned = done.requests[0]["sample"]["planned_bytes"]
    metrics = {
        "spawn_ns": done.spawn_to_logits_ns,
        "ready_ns": done.ready_ns,
        "peak_bytes": done.peak_bytes,
        "must_read_bytes": ours.must_read_bytes(plan, planned),
    }
    after = board.bytes_read()
    if before is not None and after is not None:
        metrics["read_bytes"] = after - before
    return metrics


def cold_and_cached_metrics(ours: Ours, plan: Plan, engine: EngineName) -> Metrics:
    """As ``cold_metrics``; the process is then started once more, its files being in the page cache."""
    metrics = dict(cold_metrics(ours, plan, engine))
    metrics["ready_cached_ns"] = ours.infer(plan, engine, kind="cold").ready_ns
    return metrics


def warm_metrics(ours: Ours, plan: Plan, engine: EngineName) -> Metrics:
    """Warm requests of one process: medians of those after the warm-ups."""
    done = ours.infer(plan, engine, kind="warm", repeat=WARMUPS + REQUESTS)
    requests = done.counted()
    decompress = [10**6 * r["decompress_ns"] // max(1, r["layers_ns"]) for r in requests]
    return {
        "latency_ns": median(done.latencies_ns()),
        "stall_ns": median([r["sample"]["stall_ns"] for r in requests]),
        "predicted_stall_ns": plan.predicted.stall_ns,
        "preload_bytes": plan.preload_bytes,
        "working_bytes": plan.working_bytes,
        "decompress_ppm": median(decompress),
        "peak_bytes": done.peak_bytes,
    }


def our_cases(ours: Ours) -> Iterator[Case]:
    """Ours on this machine: cold at every fidelity, warm, held in memory."""
    for engine in ENGINES:
        for fidelity in SAMPLED_FIDELITIES:
            rows = {2, 1, 4, 9} if fidelity == 4 else {2}
            plan = ours.uniform(fidelity, engine)
            measure = cold_and_cached_metrics if fidelity == 4 else cold_metrics
            yield Case(cold_case(engine, fidelity), frozenset(rows), partial(measure, ours, plan, engine))
            held = ours.uniform(fidelity, engine, held=True)
            steady = partial(warm_metrics, ours, held, engine)
            yield Case(held_case(engine, fidelity), frozenset({6, 10}), steady)
    cold = partial(cold_metrics, ours, ours.uniform(32, "native"), "native")
    yield Case(cold_case("native", 32), frozenset({2}), cold)
    held = ours.uniform(32, "native", held=True)
    yield Case(held_case("native", 32), frozenset({10}), partial(warm_metrics, ours, held, "native"))
    yield from sti_cases(ours)


def sti_cases(ours: Ours) -> Iterator[Case]:
    """The `sti` plan of rows 4 and 5; where it predicts a stall, also one that does not."""
    plan = ours.sti("native")
    yield Case(STI, frozenset({4, 5}), partial(warm_metrics, ours, plan, "native"))
    held = ours.held_like(plan, "native")
    yield Case(STI_HELD, frozenset({5}), partial(warm_metrics, ours, held, "native"))
    calm = ours.sti_without_stall("native") if plan.predicted.stall_ns > 0 else None
    if calm is not None:
        yield Case(STI_CALM, frozenset({5}), partial(warm_metrics, ours, calm, "native"))
        held = ours.held_like(calm, "native")
        yield Case(STI_CALM_HELD, frozenset({5}), partial(warm_metrics, ours, held, "native"))


def close_cases(close: Ours) -> Iterator[Case]:
    """Ours with the bundle that stays closest to the model."""
    for engine in ENGINES:
        cold = partial(cold_metrics, close, close.uniform(CLOSE_FIDELITY, engine), engine)
        yield Case(cold_case(engine, CLOSE_LABEL), frozenset({2}), cold)
        held = close.uniform(CLOSE_FIDELITY, engine, held=True)
        yield Case(held_case(engine, CLOSE_LABEL), CLOSE_ROWS, partial(warm_metrics, close, held, engine))


def our_cosines(ours: Ours, close: Ours) -> list[OurInfo]:
    """Every plan that is run cold, compared with float32."""
    uniform: list[tuple[Ours, EngineName, str, Plan]] = [
        (ours, engine, str(fidelity), ours.uniform(fidelity, engine))
        for engine in ENGINES
        for fidelity in SAMPLED_FIDELITIES
    ]
    uniform.append((ours, "native", "32", ours.uniform(32, "native")))
    uniform += [(close, e, CLOSE_LABEL, close.uniform(CLOSE_FIDELITY, e)) for e in ENGINES]
    return [
        OurInfo(
            case=cold_case(engine, label),
            label=f"{label} bits, {'int8' if engine == 'native-int8' else 'fp32'}",
            engine=engine,
            stored_bytes=plan.streamed_bytes,
            cosine=cosine(side.checked_logits(plan, engine), side.model.reference),
        )
        for side, engine, label, plan in uniform
    ]


# ------------------------------------------------------------------ limited storage


def limited_cases(ours: Ours, runner: PeerRunner | None, board: Board) -> Iterator[Case]:
    """Ours, llama.cpp at 4 bits and plain reads, all on a board whose storage the kernel limits."""
    file = ours.model.bundle.region_path(32)

    def plain(bytes_: int) -> Metrics:
        duration = direct_read_ns(ours.tools, file, bytes_, board)
        return {"duration_ns": duration, "bytes_per_s": round(bytes_ * 1e9 / duration)}

    yield Case(PLAIN_READS, LIMITED_ROWS, partial(plain, PLAIN_READ_BYTES))
    for fidelity in SAMPLED_FIDELITIES:
        plan = ours.uniform(fidelity, "native")
        cold = partial(cold_metrics, ours, plan, "native", board)
        yield Case(limited_case(f"native {fidelity}"), LIMITED_ROWS, cold)
        planned = ours.infer(plan, "native", kind="cold").requests[0]["sample"]["planned_bytes"]
        reads = partial(plain, ours.must_read_bytes(plan, planned))
        yield Case(plain_reads_case(fidelity), LIMITED_ROWS, reads)
    if runner is not None:
        for peer in PEERS:
            if peer.precision == "4 bits":
                yield Case(limited_case(peer.name), LIMITED_ROWS, partial(runner.cold, peer, board))


# ------------------------------------------------------------------ predictions


def plan_samples(ours: Ours, board: Board, count: int, progress: Callable[[str], None]) -> list[PlanSample]:
    """Random valid plans on a board, profiled just before every few: predictions against medians of warm
    requests. Every plan is measured in two passes: what lies between them no prediction can know."""
    found: list[PlanSample] = []
    for begun in range(0, count, PLANS_PER_PROFILE):
        progress(f"{board.name}: profile")
        ours.forget_profile("native", board)
        few = min(PLANS_PER_PROFILE, count - begun)
        plans = ours.random_plans(few, "native", board, seed=1 + begun)
        passes: list[list[Inferred]] = []
        for number in (1, 2):
            progress(f"{board.name}: plans from {begun + 1} to {begun + few} of {count}, pass {number}")
            passes.append([_plan_requests(ours, plan, board, row) for row, plan in enumerate(plans, begun)])
        found += (_plan_sample(board, plan, *pair) for plan, *pair in zip(plans, *passes, strict=True))
    return found


def _plan_requests(ours: Ours, plan: Plan, board: Board, row: int) -> Inferred:
    repeat = WARMUPS + PLAN_REQUESTS
    return ours.infer(plan, "native", kind="warm", repeat=repeat, row=row, board=board)


def _plan_sample(board: Board, plan: Plan, first: Inferred, second: Inferred) -> PlanSample:
    stalls_ns = [request["sample"]["stall_ns"] for done in (first, second) for request in done.counted()]
    return PlanSample(
        board=board.name,
        target_ns=plan.target_ns,
        predicted_ns=plan.predicted.median_latency_ns,
        measured_ns=median([*first.latencies_ns(), *second.latencies_ns()]),
        passes_ns=(median(first.latencies_ns()), median(second.latencies_ns())),
        predicted_stall_ns=plan.predicted.stall_ns,
        stall_ns=median(stalls_ns),
    )


def limited_boards(
    folder: Path, names: Sequence[str] = BOARDS
) -> Iterator[contextlib.AbstractContextManager[Board]]:
    """Boards that the kernel makes of this machine: one waits for its storage, one for its processor.

    After a pause the kernel lets a tenth of a second's bytes pass at once: only at a low rate is that little
    beside what a layer reads.
    """
    if "io" in names:
        yield limited_board("reads limited to 10 MB/s", folder, read_bytes_per_s=10_000_000)
    if "cpu" in names:
        yield limited_board("CPU limited to half of one", folder, cpu_share_milli=500)


# ------------------------------------------------------------------ limits


def kernels_case(isa: str) -> Case:
    """Operations per second of multiply-adds from registers, and of products on a tile in cache, in turns."""
    runtime = Sources.below((ROOT / "sti_runtime" / "native",))
    program = build_agent(
        "x86_64", sources=Sources((*runtime.files, ROOT / "bench" / "native_kernels.c"), runtime.headers)
    )
    return Case(KERNELS, KERNEL_ROWS, partial(kernel_metrics, program, isa))


def kernel_metrics(program: Path, isa: str) -> Metrics:
    """MFLOP/s: the best burst of each of bench/native_kernels.c."""
    with tempfile.TemporaryDirectory() as folder:
        argv = (str(program), folder, isa, "fp32", str(THREADS), str(TOKENS), str(KERNEL_ROUNDS), "speeds")
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailedError(f"{program.name}: {done.stderr.strip() or done.returncode}")
    gflops = json.loads(done.stdout)
    return {
        "product_1_mflops": round(1e3 * gflops["product_gflops_1"]),
        "peak_1_mflops": round(1e3 * gflops["peak_gflops_1"]),
        "peak_mflops": round(1e3 * gflops["peak_gflops"]),
    }


# ------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    rows: frozenset[int]
    rounds: int
    plans: int
    boards: tuple[str, ...]
    seed: int


class Progress:
    """One line on the terminal's standard error."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Show what is going on."""
        if self._shown:
            print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        self("")


def measure(ours: Ours, runner: PeerRunner | None, settings: Settings, progress: Progress) -> Measured:
    """The whole run."""
    found = Measured()
    with contextlib.ExitStack() as stack:
        cases: list[Case] = [] if runner is None else list(peer_cases(runner))
        progress("profile of this machine")
        cases += our_cases(ours)
        if settings.rows & KERNEL_ROWS:
            found.isa = ours.isa()
            cases.append(kernels_case(found.isa))
        if settings.rows & CLOSE_ROWS:
            close = ours.close()
            cases += close_cases(close)
            if 2 in settings.rows:
                found.ours = our_cosines(ours, close)
        if settings.rows & LIMITED_ROWS:
            try:
                board = stack.enter_context(
                    limited_board("100 MB/s", ours.folder, read_bytes_per_s=LIMIT_BYTES_PER_S)
                )
                cases += limited_cases(ours, runner, board)
            except CgroupUnavailableError as error:
                found.absent[3] = f"storage cannot be limited here: {error}"
        _rounds([case for case in cases if case.rows & settings.rows], found, settings, progress)
    if runner is not None:
        found.peers = [
            PeerInfo(
                name=peer.name,
                precision=peer.precision,
                metric="spawn_ns" if peer.native else "create_ns",
                cosine=runner.cosines[peer.name],
                lacks=peer.lacks,
            )
            for peer in PEERS
            if peer.name in runner.cosines
        ]
    if settings.rows & PREDICTED_ROWS:
        _predictions(ours, found, settings, progress)
    progress.close()
    return found


def _rounds(cases: Sequence[Case], found: Measured, settings: Settings, progress: Progress) -> None:
    order = random.Random(settings.seed)
    for round_ in range(settings.rounds):
        shuffled = list(cases)
        order.shuffle(shuffled)
        for number, case in enumerate(shuffled):
            progress(f"round {round_ + 1} of {settings.rounds}, {number + 1} of {len(cases)}: {case.name}")
            found.samples.add(case.name, case.run())


def _predictions(ours: Ours, found: Measured, settings: Settings, progress: Progress) -> None:
    if "this" in settings.boards:
        found.plans = plan_samples(ours, THIS_MACHINE, settings.plans, progress)
    for limited in limited_boards(ours.folder, settings.boards):
        try:
            with limited as board:
                found.plans += plan_samples(ours, board, settings.plans, progress)
        except CgroupUnavailableError as error:
            for row in PREDICTED_ROWS:
                found.absent[row] = f"no limited boards: {error}"


# ------------------------------------------------------------------ output


def environment(
    arguments: Sequence[str], cache: PageCache, settings: Settings, executable: Path
) -> list[str]:
    """What the figures are of."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE) is not None
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    versions = ", ".join(
        f"{name} {version}" for name, version in pins().items() if name not in ("onnx", "gguf")
    )
    below = ". The virtual machine's host may keep in its memory what was dropped here, invisible from here"
    if not virtual:
        below = ""
    rounds = f"{settings.rounds} rounds, all cases in random order in each, "
    if settings.rows <= PREDICTED_ROWS:
        rounds = ""
    program = executable.read_bytes()
    lines = [
        f"`{command_line(arguments)}`, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; "
        f"executable of {len(program) / 1e3:.0f} KB, sha256 {sha256_hex(program)[:16]}",
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPUs, "
        f"{int(memory[1]) / 1e6 if memory else 0:.0f} GB, Linux {platform.release()}"
        f"{', a virtual machine' if virtual else ''}; load {os.getloadavg()[0]:.2f} at the start",
        f"BERT-base shape (12 × 12 × 768, FFN 3072), 128 tokens, batch 1, {THREADS} threads, random weights; "
        f"{rounds}every case in a fresh process",
        f"Page cache: {cache.description}{below}",
        *([f"Peers: {versions}"] if settings.rows & (PEER_ROWS | LIMITED_ROWS) else []),
        "Medians with 95 % intervals (order statistics); ratios are paired by round",
    ]
    if settings.rows & PREDICTED_ROWS:
        lines.append(
            "Rows 7 and 8: fp32 and warm requests only; latency and stall of a plan are medians of "
            f"{2 * PLAN_REQUESTS} requests, {PLAN_REQUESTS} in each of two passes over the plans; the board "
            f"is profiled anew before every {PLANS_PER_PROFILE} plans. Drawn: |S| evenly up to 12 MB, W "
            "evenly of 1 to 4 layers at 6 bits, T evenly on a logarithmic scale from the least that works to "
            "what the whole model at 6 bits takes without overlap"
        )
    return lines


def command_line(arguments: Sequence[str]) -> str:
    """As a shell takes it."""
    return shlex.join(("python", "-m", "bench.engines", *arguments))


# ------------------------------------------------------------------ command line


def _rows(text: str) -> frozenset[int]:
    chosen = frozenset(int(part) for part in text.split(","))
    if not chosen <= ROWS.keys():
        raise argparse.ArgumentTypeError(f"rows are {min(ROWS)} to {max(ROWS)}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setup", action="store_true", help="install, build and export what is missing, then end"
    )
    parser.add_argument("--rows", type=_rows, default=frozenset(ROWS), help="for example 1,4 (default: all)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--plans", type=int, default=PLANS, help="random plans per board")
    parser.add_argument(
        "--boards", nargs="+", choices=BOARDS, default=BOARDS, help="of rows 7 and 8 (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order of cases")
    parser.add_argument("--json", type=Path, help="where to write every sample")
    parser.add_argument(
        "--from",
        dest="runs",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="show runs of --json, measure nothing",
    )
    parser.add_argument("--write", type=Path, help="page whose tables are to be replaced: docs/engine.md")
    parser.add_argument("--agent", type=Path, help="executable to measure instead of the tree's own")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Set up, or measure, or read runs; then print."""
    options = _parser().parse_args(arguments)
    if options.write:
        _check_page(options.write)
    if options.runs:
        runs = [_read_run(path) for path in options.runs]
    else:
        if options.write and options.rows != ROWS.keys():
            raise SystemExit(
                "A page takes all rows. Write parts with --json FILE, then join them: --from FILE ... --write"
            )
        made = _measured(options, arguments)
        if made is None:
            return
        runs = [made]
        if options.json:
            options.json.write_text(as_json(made))
    text = page(runs)
    print(text)
    if options.write:
        missing = unmeasured(runs)
        if missing and len(runs) == 1:
            rows = ", ".join(map(str, missing))
            raise SystemExit(
                f"{options.write} is left as it is: not measured: {rows}. Join runs: --from FILE ..."
            )
        options.write.write_text(between_marks(options.write.read_text(), text))


def _check_page(path: Path) -> None:
    """Before hours of measuring, not after."""
    try:
        between_marks(path.read_text(), "")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error


def _read_run(path: Path) -> Run:
    try:
        return run_from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error


def _measured(options: argparse.Namespace, arguments: Sequence[str]) -> Run | None:
    """One run; None where only the peers were set up."""
    if platform.machine() != "x86_64":
        raise SystemExit("This benchmark runs on x86-64: its peers are installed and built for it.")
    settings = Settings(options.rows, options.rounds, options.plans, tuple(options.boards), options.seed)
    cache, home = PageCache.best(), PeersHome(cache_folder() / "peers")
    model = prepare(cache_folder() / "model")
    executable = options.agent or build_agent("x86_64")
    tools = compile_tools(cache_folder() / "tools")
    try:
        if options.setup:
            set_up(home, cache_folder() / "model" / "models" / model.model.digest)
            return None
        runner = None
        if settings.rows & (PEER_ROWS | LIMITED_ROWS):
            home.check()
            runner = PeerRunner(home, model, tools, cache, {})
        heading = environment(arguments, cache, settings, executable)
        folder = cache_folder() / "plans"
        folder.mkdir(exist_ok=True)
        ours = Ours(executable, model, tools, cache, folder)
        return Run(tuple(heading), settings.rows, measure(ours, runner, settings, Progress()))
    except (SetupError, RunFailedError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
