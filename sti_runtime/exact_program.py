"""One submodel's choice of versions and preload set as an integer program (docs/planner.md, ``exact``).

Each shard takes one version, streamed or preloaded. Rows: one version per shard; AIB(l) ≥ 0; a layer's
streamed bytes within W; preloaded bytes within |S|; where asked, the timeline. The timeline's rows are
necessary, not sufficient: they read bytes as a fluid, the executor merged reads as wholes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil

from sti_runtime.gain import GainModel
from sti_runtime.integer_program import Program
from sti_runtime.model import Submodel
from sti_runtime.plan_build import Fidelity, ShardCosts, layer_work, shard_rows
from sti_runtime.profile import PPM, DeviceProfile
from sti_runtime.timeline import LayerWork, simulate

Terms = Mapping[int, float]


@dataclass(frozen=True)
class Budgets:
    """What a plan must keep to. Units: ns, bytes."""

    target_ns: int
    preload_bytes: int
    working_bytes: int
    slack: bool


@dataclass(frozen=True)
class Choice:
    """Fidelities of a submodel's shards, layer-major, and the indices of those preloaded."""

    fidelities: tuple[Fidelity, ...]
    preloaded: frozenset[int]


@dataclass(frozen=True)
class Version:
    """A column: shard ``index`` of the submodel at ``fidelity``, streamed or ``preloaded``."""

    index: int
    fidelity: Fidelity
    preloaded: bool


@dataclass(frozen=True)
class Steps:
    """The concave hull of a shard's gain over its budget: the cheapest version, then (ns, nano) steps."""

    first_ns: int
    first_nano: int
    more: tuple[tuple[int, int], ...]


def _steps(costs: ShardCosts, gains: GainModel, row: int) -> Steps:
    points = sorted((costs.budget_ns[k][row], -gains.shard_nano(row, k)) for k in costs.fidelities)
    hull: list[tuple[int, int]] = []
    for ns, loss in points:
        point = (ns, -loss)
        if hull and point[1] <= hull[-1][1]:
            continue
        while len(hull) > 1 and _steeper(hull[-1], point, hull[-2]):
            hull.pop()
        hull.append(point)
    more = tuple((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull))
    return Steps(*hull[0], more)


def _steeper(last: tuple[int, int], point: tuple[int, int], first: tuple[int, int]) -> bool:
    """Whether the step from ``last`` to ``point`` is at least as steep as that from ``first`` to ``last``."""
    rise, run = point[1] - last[1], point[0] - last[0]
    return rise * (last[0] - first[0]) >= (last[1] - first[1]) * run


class SubmodelProgram:
    """The programs of one submodel under fixed budgets, and whether a choice is valid."""

    def __init__(
        self,
        submodel: Submodel,
        profile: DeviceProfile,
        costs: ShardCosts,
        gains: GainModel,
        budgets: Budgets,
    ) -> None:
        self.submodel, self.profile, self.costs = submodel, profile, costs
        self.gains, self.budgets = gains.within(submodel), budgets
        self.absent_nano = gains.absent_nano(submodel)
        self.rows = shard_rows(submodel, costs.heads)
        self.layer_ns = profile.layer_ns(submodel.width)
        self.t_comp_ns = profile.t_comp_ns(submodel.width)
        spent_ns = profile.fixed_p95.total_ns + submodel.depth * self.t_comp_ns
        self.slack_ns = budgets.target_ns - spent_ns
        self.columns = self._columns()
        self.slowest_ns_per_byte = max(
            ns / length
            for k, lengths in costs.lengths.items()
            for ns, length in zip(costs.budget_ns[k], lengths, strict=True)
        )

    @property
    def feasible_compute(self) -> bool:
        """Whether the layers' compute alone fits T."""
        return self.slack_ns >= 0

    @cached_property
    def bound_nano(self) -> int:
        """A cheap bound of the gain: what the time for all layers' reads, and |S| at the slowest rate of any
        version, can buy in fractions of versions."""
        mine = [_steps(self.costs, self.gains, row) for row in self.rows]
        left_ns = self.aib_ns(self.submodel.depth - 1) + self.budgets.preload_bytes * self.slowest_ns_per_byte
        left_ns -= sum(steps.first_ns for steps in mine)
        gain: float = sum(steps.first_nano for steps in mine)
        for more_ns, more_nano in sorted(
            (step for steps in mine for step in steps.more), key=lambda step: step[0] / step[1]
        ):
            if more_ns > left_ns:
                return ceil(gain + more_nano * max(0.0, left_ns) / more_ns)
            left_ns -= more_ns
            gain += more_nano
        return ceil(gain)

    def least_nano(self) -> int:
        """Gain of all shards at their lowest fidelity."""
        return self.gains.choice_nano(self.rows, [self.costs.fidelities[0]] * len(self.rows))

    def gain_nano(self, choice: Choice) -> int:
        """Expected gain of a choice, over the submodel at the base fidelity."""
        return self.gains.choice_nano(self.rows, choice.fidelities)

    def aib_ns(self, layer: int) -> int:
        """AIB(layer) before any read."""
        return (self.slack_ns if self.budgets.slack else 0) + layer * self.t_comp_ns

    def valid(self, choice: Choice) -> bool:
        """By the rules of docs/planner.md, in integers."""
        end_ns = self.end_ns(choice)
        return end_ns is not None and end_ns <= self.budgets.target_ns and self._within_budgets(choice)

    def end_ns(self, choice: Choice) -> int | None:
        """When the p95 timeline ends; None if there is none."""
        sharing, working_bytes = self.profile.sharing(), self.budgets.working_bytes
        timeline = simulate(self._works(choice), self.profile.fixed_p95, working_bytes, sharing=sharing)
        return None if timeline is None else timeline.end_ns

    @property
    def timeline_follows(self) -> bool:
        """Whether AIB ≥ 0 makes the timeline end by T: reads cost no compute, and W holds all of them."""
        most = sum(max(lengths[row] for lengths in self.costs.lengths.values()) for row in self.rows)
        return self.profile.sharing().layer_ns(most) == 0 and most <= self.budgets.working_bytes

    def program(self, *, timeline_ns: int | None = None, without: Collection[frozenset[int]] = ()) -> Program:
        """The program; with the rows of a timeline that ends by ``timeline_ns``, and ``without`` choices."""
        program = Program()
        for version in self.columns:
            program.add_binary(self.gains.shard_nano(self.rows[version.index], version.fidelity))
        by_shard: list[list[int]] = [[] for _ in self.rows]
        for column, version in enumerate(self.columns):
            by_shard[version.index].append(column)
        for columns in by_shard:
            program.add_row(((column, 1.0) for column in columns), 1.0, 1.0)
        depth, read = self.submodel.depth, dict[int, float]()
        bytes_ = [program.add_sum(self._streamed(layer, self.costs.lengths)) for layer in range(depth)]
        for layer in range(depth):
            read |= program.add_sum(self._streamed(layer, self.costs.budget_ns))
            program.at_most(read.items(), self.aib_ns(layer))
            program.at_most(bytes_[layer].items(), self.budgets.working_bytes)
        held = {c: self._of(self.costs.lengths, v) for c, v in enumerate(self.columns) if v.preloaded}
        program.at_most(held.items(), self.budgets.preload_bytes)
        if timeline_ns is not None:
            self._add_timeline(program, timeline_ns, bytes_)
        for choice in without:
            program.at_most(((column, 1.0) for column in choice), len(choice) - 1)
        return program

    def choice(self, chosen: Iterable[int]) -> Choice:
        """What the columns that are 1 stand for."""
        versions = sorted(
            (self.columns[c] for c in chosen if c < len(self.columns)), key=lambda version: version.index
        )
        return Choice(
            tuple(version.fidelity for version in versions),
            frozenset(version.index for version in versions if version.preloaded),
        )

    # ------------------------------------------------------------------ details

    def _columns(self) -> list[Version]:
        """Versions that could be in a valid plan by themselves."""
        budgets, found = self.budgets, list[Version]()
        for index, row in enumerate(self.rows):
            room_ns = self.aib_ns(index // self.submodel.width)
            for fidelity in self.costs.fidelities:
                length, ns = self.costs.lengths[fidelity][row], self.costs.budget_ns[fidelity][row]
                if length <= budgets.working_bytes and ns <= room_ns:
                    found.append(Version(index, fidelity, preloaded=False))
                if length <= budgets.preload_bytes:
                    found.append(Version(index, fidelity, preloaded=True))
        return found

    def _of(self, figures: Mapping[Fidelity, Sequence[int]], version: Version) -> int:
        return figures[version.fidelity][self.rows[version.index]]

    def _streamed(self, layer: int, figures: Mapping[Fidelity, Sequence[int]]) -> dict[int, float]:
        return {
            column: self._of(figures, version)
            for column, version in enumerate(self.columns)
            if not version.preloaded and version.index // self.submodel.width == layer
        }

    def _works(self, choice: Choice) -> list[LayerWork]:
        return [
            layer_work(
                self.costs,
                self.rows,
                choice.fidelities,
                choice.preloaded,
                layer,
                self.submodel.width,
                self.layer_ns,
            )
            for layer in range(self.submodel.depth)
        ]

    def _within_budgets(self, choice: Choice) -> bool:
        costs, spent_ns, held_bytes = self.costs, 0, 0
        for index, (row, fidelity) in enumerate(zip(self.rows, choice.fidelities, strict=True)):
            if index in choice.preloaded:
                held_bytes += costs.lengths[fidelity][row]
            else:
                spent_ns += costs.budget_ns[fidelity][row]
            if (index + 1) % self.submodel.width == 0 and spent_ns > self.aib_ns(
                index // self.submodel.width
            ):
                return False
        return held_bytes <= self.budgets.preload_bytes and self.slack_ns >= 0

    def _add_timeline(self, program: Program, end_ns: int, bytes_: Sequence[Terms]) -> None:
        """Layer l starts no earlier than embedding, the layer below, its reads, and the room for them allow.

        With b = beside_ppm / 10⁶: before layer l starts, reads take (1 − 1/b) of the layers' compute more.
        """
        fixed, sharing, depth = self.profile.fixed_p95, self.profile.sharing(), self.submodel.depth
        slower = 1.0 - PPM / sharing.beside_ppm
        starts: list[Terms] = [{program.add_amount(): float(self.budgets.target_ns)} for _ in range(depth)]
        computes, constants = zip(*(self._compute(program, layer) for layer in range(depth)), strict=True)
        reads = [program.add_sum(self._streamed(layer, self.costs.io_ns)) for layer in range(depth)]
        ns_per_byte = min(
            (
                self.costs.io_ns[k][row] / length
                for k, lengths in self.costs.lengths.items()
                for row, length in enumerate(lengths)
            )
        )

        def no_earlier(layer: int, parts: Iterable[tuple[Terms, float]], constant: float) -> None:
            """start(layer) ≥ Σ factor·part + constant."""
            total: dict[int, float] = defaultdict(float)
            for part, factor in (*parts, (starts[layer], -1.0)):
                for column, value in part.items():
                    total[column] += factor * value
            program.at_most(total.items(), -constant)

        embed_io_ns = fixed.embed_io_ns
        no_earlier(0, (), embed_io_ns + fixed.embed_compute_ns)
        for layer in range(depth):
            below = range(layer)
            no_earlier(
                layer,
                [(reads[i], 1.0) for i in range(layer + 1)] + [(computes[i], slower) for i in below],
                embed_io_ns + slower * sum(constants[:layer]),
            )
            for freed in below:
                between = range(freed + 1, layer)
                overflow = [(bytes_[i], ns_per_byte) for i in range(freed, layer + 1)]
                room_ns = ns_per_byte * self.budgets.working_bytes
                no_earlier(
                    layer,
                    [(starts[freed], 1.0), (computes[freed], 1.0), *overflow]
                    + [(computes[i], slower) for i in between],
                    constants[freed] - room_ns + slower * sum(constants[i] for i in between),
                )
            if layer:
                below_it = [(starts[layer - 1], 1.0), (computes[layer - 1], 1.0)]
                no_earlier(layer, below_it, constants[layer - 1])
        last = {**starts[-1], **computes[-1]}
        program.at_most(last.items(), end_ns - fixed.head_ns - constants[-1])

    def _compute(self, program: Program, layer: int) -> tuple[Terms, float]:
        """A layer's compute as terms and a constant; at most 1 ns less than the timeline has it."""
        sharing, width = self.profile.sharing(), self.submodel.width
        terms: dict[int, float] = defaultdict(float)
        for column, version in enumerate(self.columns):
            if version.index // width == layer:
                terms[column] += self.costs.decompress_ns[version.fidelity]
                if not version.preloaded:
                    terms[column] += self._of(self.costs.lengths, version) * sharing.ps_per_byte / 1000
        constant = float(self.layer_ns)
        if sharing.ps_per_byte:
            constant -= 1.0
        if sharing.each_ns and self._least_bytes(layer) > self.budgets.preload_bytes:
            constant += sharing.each_ns
        elif sharing.each_ns:
            reads = program.add_binary(0.0)
            terms[reads] = sharing.each_ns
            by_shard: dict[int, dict[int, float]] = defaultdict(dict)
            for column, version in enumerate(self.columns):
                if not version.preloaded and version.index // width == layer:
                    by_shard[version.index][column] = 1.0
            for streamed in by_shard.values():
                program.at_most({**streamed, reads: -1.0}.items(), 0.0)
        return program.add_sum(terms), constant

    def _least_bytes(self, layer: int) -> int:
        """Of the layer's shards, each at its smallest version."""
        width = self.submodel.width
        rows = self.rows[layer * width : (layer + 1) * width]
        return sum(min(lengths[row] for lengths in self.costs.lengths.values()) for row in rows)
