"""Our side of ``bench.engines``: the native executable, run without a host, and the plans it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine_model import CHECKED_ROWS, BenchModel, made_up_importance
from bench.launching import THIS_MACHINE, Board, Finished, PageCache, RunFailedError, Tools, run
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.manifest import MANIFEST_NAME, RESIDENT_FILE
from sti_runtime.messages import EngineName
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity, assemble_plan
from sti_runtime.policies import plan_policy
from sti_runtime.profile import DeviceProfile
from sti_runtime.records import canonical_json

THREADS = 2
QUEUE_DEPTH = 8
ENGINES: tuple[EngineName, ...] = ("native", "native-int8")
PRELOAD_BYTES = 4_000_000
STI_WORKING_FIDELITY: Fidelity = 5
"""W of the `sti` plan: two layers at this fidelity."""
CALM_WORKING_FIDELITY: Fidelity = 6
"""That of an `sti` plan without stall: the next layer can be read whole while one is computed."""
CALM_PRELOAD_BYTES = (PRELOAD_BYTES, 5_000_000, 6_000_000, 8_000_000, 10_000_000)
"""Tried in turn."""
WARMUPS = 2


@dataclass(frozen=True)
class Inferred:
    """One process of the verb ``infer``. ``requests``: its answers' entries, warm-ups included."""

    finished: Finished
    requests: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, finished: Finished) -> Inferred:
        """Raises: RunFailedError when a request does not count."""
        requests = tuple(finished.answer["requests"])
        for request in requests:
            verdict = request["sample"]["verdict"]
            if not verdict["valid"]:
                raise RunFailedError(f"a request does not count: {', '.join(verdict['reasons'])}")
        return cls(finished, requests)

    @property
    def spawn_to_logits_ns(self) -> int:
        """From before the process existed to the first request's logits."""
        first = self.requests[0]
        return int(first["started_ns"] + first["sample"]["latency_ns"] - self.finished.spawned_ns)

    @property
    def ready_ns(self) -> int:
        """From before the process existed to where its first request's clock starts.

        By then the storage is open, direct IO is proven, IO threads run and all buffers are there: more than
        ``opened_ns`` of the answer tells.
        """
        return int(self.requests[0]["started_ns"] - self.finished.spawned_ns)

    @property
    def peak_bytes(self) -> int:
        """VmHWM of the process."""
        return int(self.finished.answer["memory"]["process_peak_bytes"])

    def counted(self) -> tuple[dict[str, Any], ...]:
        """Requests after the warm-ups."""
        return self.requests[WARMUPS:]

    def latencies_ns(self) -> list[int]:
        """Of the counted requests."""
        return [request["sample"]["latency_ns"] for request in self.counted()]


@dataclass
class Ours:
    """The executable with the bundle. Plans are written below ``folder`` once and found again by digest."""

    executable: Path
    model: BenchModel
    tools: Tools
    cache: PageCache
    folder: Path
    profiles: dict[tuple[str, EngineName], DeviceProfile] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that a cold run may read."""
        return (self.executable, self.model.task_file, *sorted(self.model.bundle.path.iterdir()))

    def close(self) -> Ours:
        """The same executable with the bundle that stays closest to the model."""
        return replace(self, model=replace(self.model, bundle=self.model.close), profiles={})

    # ---------------------------------------------------------------- measuring

    def profile(self, engine: EngineName, board: Board = THIS_MACHINE) -> DeviceProfile:
        """The device profile of a board, measured on first use by the executable itself."""
        key = (board.name, engine)
        if key not in self.profiles:
            done = run(self.tools, self._argv("profile", engine), board)
            self.profiles[key] = DeviceProfile.from_json(
                canonical_json(done.answer), source="the verb profile"
            )
        return self.profiles[key]

    def forget_profile(self, engine: EngineName, board: Board = THIS_MACHINE) -> None:
        """Have the board measured again on next use."""
        self.profiles.pop((board.name, engine), None)

    def infer(
        self,
        plan: Plan,
        engine: EngineName,
        *,
        kind: str,
        repeat: int = 1,
        row: int = 0,
        board: Board = THIS_MACHINE,
        cold: bool = False,
    ) -> Inferred:
        """One process. ``cold``: the page cache is dropped before it starts. Raises: RunFailedError."""
        path = self.folder / f"plan-{plan.digest[:20]}.json"
        if not path.exists():
            path.write_bytes(plan.to_json())
        if cold:
            self.cache.drop((*self.files, path))
        asked = ("--plan", str(path), "--kind", kind, "--repeat", str(repeat), "--row", str(row))
        argv = (*self._argv("infer", engine), *asked, "--io-mode", "direct")
        return Inferred.of(run(self.tools, argv, board))

    def checked_logits(self, plan: Plan, engine: EngineName) -> list[list[float]]:
        """Logits of the rows that the reference has."""
        return [
            self.infer(plan, engine, kind="cold", row=row).requests[0]["sample"]["logits"]
            for row in range(CHECKED_ROWS)
        ]

    def _argv(self, verb: str, engine: EngineName) -> tuple[str, ...]:
        where = ("--bundle", str(self.model.bundle.path), "--task", str(self.model.task_file))
        how = ("--threads", str(THREADS), "--queue-depth", str(QUEUE_DEPTH), "--engine", engine)
        return (str(self.executable), verb, *where, *how)

    def must_read_bytes(self, plan: Plan, planned_bytes: int) -> int:
        """What a cold process cannot do without: shards, embedding pages, resident tensors, plan, itself …"""
        plan_bytes = len(plan.to_json())
        sizes = self.model.bundle.file_sizes()
        manifest = (self.model.bundle.path / MANIFEST_NAME).stat().st_size
        return planned_bytes + plan_bytes + manifest + sizes[RESIDENT_FILE] + self.executable.stat().st_size

    # ---------------------------------------------------------------- plans

    def uniform(self, fidelity: Fidelity, engine: EngineName, *, held: bool = False) -> Plan:
        """All 12 × 12 shards at one fidelity: streamed, or ``held`` in the preload buffer."""
        return self.mixed([fidelity] * self.model.whole.shards, engine, held=held)

    def mixed(self, fidelities: Sequence[Fidelity], engine: EngineName, *, held: bool = False) -> Plan:
        """All 12 × 12 shards at these fidelities [144]; the working buffer holds two layers."""
        whole, manifest = self.model.whole, self.model.bundle.manifest
        lengths = [
            manifest.shard_version(*divmod(index, whole.width), fidelity).length
            for index, fidelity in enumerate(fidelities)
        ]
        layers = [sum(lengths[i : i + whole.width]) for i in range(0, len(lengths), whole.width)]
        return assemble_plan(
            manifest,
            self.profile(engine),
            whole,
            fidelities,
            range(whole.shards) if held else (),
            planner="baseline",
            policy="preload-6" if held else "std-pipeline-6",
            mode="pipeline",
            slack=False,
            importance=None,
            target_ns=10**10,
            preload_bytes=sum(lengths) if held else 0,
            working_bytes=sum(sorted(layers)[-2:]),
        )

    def sti(
        self,
        engine: EngineName,
        preload_bytes: int = PRELOAD_BYTES,
        working_fidelity: Fidelity = STI_WORKING_FIDELITY,
    ) -> Plan:
        """The `sti` plan of the whole model with the least stall, then the least T, of many T."""
        profile, importance = self.profile(engine), made_up_importance(self.model.model)
        working_bytes = self.uniform(working_fidelity, engine).working_bytes

        def made(target_ns: int) -> Plan | None:
            try:
                return plan_policy(
                    "sti",
                    self.model.bundle.manifest,
                    importance,
                    profile,
                    target_ns=target_ns,
                    preload_bytes=preload_bytes,
                    working_bytes=working_bytes,
                )
            except InfeasiblePlanError:
                return None

        compute_ns = profile.fixed_p95.total_ns + self.model.whole.depth * profile.t_comp_ns(
            self.model.whole.width
        )
        targets = [compute_ns * step // 40 for step in range(40, 480)]
        plans: list[Plan] = []
        for target in targets:
            plan = made(target)
            if plan is not None and plan.submodel == self.model.whole:
                plans.append(plan)
                if plan.predicted.stall_ns == 0:
                    break
        if not plans:
            raise RunFailedError("no `sti` plan of the whole model exists on this machine")
        return min(plans, key=lambda plan: (plan.predicted.stall_ns, plan.target_ns))

    def sti_without_stall(self, engine: EngineName) -> Plan | None:
        """An `sti` plan that predicts none: with more W, then with more preload too; None where none does."""
        for preload_bytes in CALM_PRELOAD_BYTES:
            plan = self.sti(engine, preload_bytes, CALM_WORKING_FIDELITY)
            if plan.predicted.stall_ns == 0:
                return plan
        return None

    def isa(self) -> str:
        """The instruction set that the executable takes here."""
        done = self.infer(self.uniform(2, "native"), "native", kind="cold")
        return str(done.finished.answer["isa"])

    def held_like(self, plan: Plan, engine: EngineName) -> Plan:
        """The same shards, all of them in the preload buffer."""
        return self.mixed([shard.fidelity for shard in plan.shards], engine, held=True)

    def random_plans(self, count: int, engine: EngineName, board: Board, seed: int) -> list[Plan]:
        """Valid plans for a board: random |S| up to 12 MB, W of 1 to 4 layers at 6 bits; T from the least
        that works to what the whole model at 6 bits takes without overlap, evenly on a logarithmic scale."""
        generator, profile = random.Random(seed), self.profile(engine, board)
        importance, manifest = made_up_importance(self.model.model), self.model.bundle.manifest
        whole, uniform = self.model.whole, self.uniform(6, engine)
        layer_bytes = uniform.working_bytes // 2
        longest_ns = (
            profile.fixed_p95.total_ns
            + whole.depth * profile.t_comp_ns(whole.width)
            + sum(profile.io.p95_ns(shard.length) for shard in uniform.shards)
        )

        plans: list[Plan] = []
        for number in range(count):
            made = partial(
                plan_policy,
                "random",
                manifest,
                importance,
                profile,
                preload_bytes=generator.randrange(0, 12_000_000),
                working_bytes=round(layer_bytes * generator.uniform(1, 4)),
                seed=number,
            )
            smallest, share = _smallest_target_ns(made), generator.random()
            plans.append(made(target_ns=max(smallest, round(smallest ** (1 - share) * longest_ns**share))))
        return plans


def _smallest_target_ns(made: Callable[..., Plan]) -> int:
    try:
        made(target_ns=1)
    except InfeasiblePlanError as error:
        return error.smallest_target_ns or 1
    return 1
