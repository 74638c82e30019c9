"""Integer programs, solved by HiGHS: the only file that imports the solver.

One thread and limits of nodes and of the solver's own checks, not of time, end a search: the same program has
the same solution. Large programs are solved on their *core*: first in fractions (``relax``), then over the
columns whose reduced cost does not rule them out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sti_runtime.errors import SolverError

if TYPE_CHECKING:
    from sti_runtime.metrics import F64

_LAST_RESORT_S = 60.0
_INFINITY = float("inf")
_FEASIBILITY = 1e-9
"""By how much a row may be missed, of its largest coefficient: fractions of a ns or byte."""


@dataclass
class Program:
    """Maximise Σ gain·x under rows of bounds; columns are binary or continuous. Built row by row."""

    gains: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    row_low: list[float] = field(default_factory=list)
    row_high: list[float] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)

    def add_binary(self, gain: float) -> int:
        """A new column of 0 or 1; its index."""
        self.gains.append(gain)
        self.binary.append(True)
        return len(self.gains) - 1

    def add_amount(self) -> int:
        """A new column of 0 or more; its index."""
        self.gains.append(0.0)
        self.binary.append(False)
        return len(self.gains) - 1

    def add_sum(self, terms: Mapping[int, float]) -> dict[int, float]:
        """A new column that is Σ terms, in units of the largest; as terms to be used in rows."""
        unit = max(terms.values(), default=0.0)
        if unit <= 0:
            return {}
        column = self.add_amount()
        self.add_row([*terms.items(), (column, -unit)], 0.0, 0.0)
        return {column: unit}

    def add_row(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> None:
        """``low`` ≤ Σ coefficient·column ≤ ``high``; a column may occur once. Scaled to coefficients ≤ 1."""
        listed = [(column, value) for column, value in terms if value]
        largest = max((abs(value) for _, value in listed), default=1.0)
        row = len(self.row_low)
        self.entries += [(column, row, value / largest) for column, value in listed]
        self.row_low.append(low / largest)
        self.row_high.append(high / largest)

    def at_most(self, terms: Iterable[tuple[int, float]], high: float) -> None:
        """Σ ≤ ``high``."""
        self.add_row(terms, -_INFINITY, high)


@dataclass(frozen=True)
class Solution:
    """The columns that are 1 (None: none found in so many nodes), and a proven bound of the gain."""

    chosen: frozenset[int] | None
    bound: float


@dataclass(frozen=True)
class Relaxation:
    """The optimum of fractions: a bound of the gain, and by column what the bound falls by if it is 1."""

    bound: float
    forfeits: F64

    def core(self, count: int, among: int) -> tuple[frozenset[int], float]:
        """About ``count`` of the first ``among`` columns, and the forfeit that all others exceed: no solution
        with one of them gains more than ``bound`` less that."""
        forfeits = self.forfeits[:among]
        most = float(np.partition(forfeits, count)[count]) if count < among else _INFINITY
        return frozenset(np.flatnonzero(forfeits <= most).tolist()), most


def relax(program: Program) -> Relaxation | None:
    """Solve in fractions; None when there is no solution. Raises: SolverError."""
    if not program.gains:
        return None if solve(program, gap=0.0, nodes=0) is None else Relaxation(0.0, np.zeros(0))
    solver, unit = _solver(program, {"primal_feasibility_tolerance": _FEASIBILITY})
    if not _run(solver):
        return None
    found = solver.getSolution()
    forfeits = np.where(np.array(found.col_value) < 0.5, np.abs(np.array(found.col_dual)) * unit, 0.0)
    return Relaxation(solver.getInfo().objective_function_value * unit, forfeits)


def solve(
    program: Program,
    *,
    gap: float,
    nodes: int,
    checks: int | None = None,
    among: Collection[int] | None = None,
) -> Solution | None:
    """The best solution within ``gap`` of the bound, or as near as so many ``nodes`` allow; None when there
    is none. ``among``: other binary columns are 0; the bound holds for these only. ``checks``: after so many
    times that the solver asked whether to go on, which it does after each round of cuts or branching, the
    search ends with what it has.

    Raises: SolverError when the solver is not installed or ends without a solution or a proof of none.
    """
    columns = len(program.gains)
    if columns == 0:  # the solver calls that no problem at all
        _highspy()
        fits = all(low <= 0 <= high for low, high in zip(program.row_low, program.row_high, strict=True))
        return Solution(frozenset(), 0.0) if fits else None
    options = {"mip_feasibility_tolerance": _FEASIBILITY, "mip_rel_gap": 0.0, "mip_max_nodes": nodes}
    if checks is not None:
        options["mip_heuristic_effort"] = 0.0
    solver, unit = _solver(program, options, among=among, whole=True)
    solver.setOptionValue("mip_abs_gap", gap / unit)
    if checks is not None:
        _end_after(solver, checks)
    if not _run(solver):
        return None
    info, chosen = solver.getInfo(), None
    if info.primal_solution_status == _highspy().SolutionStatus.kSolutionStatusFeasible:
        values = solver.getSolution().col_value
        chosen = frozenset(i for i in range(columns) if program.binary[i] and values[i] > 0.5)
    return Solution(chosen, info.mip_dual_bound * unit)


def _end_after(solver: Any, checks: int) -> None:
    """Interrupt the solver at its check of that number: the same program ends at the same place."""
    asked = 0

    def ask(event: Any) -> None:
        nonlocal asked
        asked += 1
        if asked > checks:
            event.data_in.user_interrupt = True

    solver.cbMipInterrupt += ask


def _highspy() -> Any:
    try:
        import highspy
    except ImportError as error:
        raise SolverError(
            "The planner exact needs the solver HiGHS, which is not installed here.",
            "Install it (pip install highspy), or plan with policy sti.",
        ) from error
    return highspy


def _solver(
    program: Program,
    options: Mapping[str, float],
    *,
    among: Collection[int] | None = None,
    whole: bool = False,
) -> tuple[Any, float]:
    """HiGHS with the program passed, and the gain that its objective counts in."""
    highspy, columns = _highspy(), len(program.gains)
    unit = max(map(abs, program.gains), default=1.0) or 1.0
    binary = np.array(program.binary)
    upper = np.where(binary, 1.0, _INFINITY)
    if among is not None:
        out = binary.copy()
        out[list(among)] = False
        upper[out] = 0.0
    table = np.array(program.entries, np.float64).reshape(-1, 3)
    at, rows, values = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]
    order = np.lexsort((rows, at))
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, len(program.row_low)
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_ = np.array(program.gains) / unit
    model.col_lower_ = np.zeros(columns)
    model.col_upper_ = upper
    model.row_lower_ = np.array(program.row_low)
    model.row_upper_ = np.array(program.row_high)
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.searchsorted(at[order], np.arange(columns + 1)).astype(np.int32)
    model.a_matrix_.index_ = rows[order].astype(np.int32)
    model.a_matrix_.value_ = values[order]
    if whole:
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[each] for each in program.binary]
    solver = _silent(highspy)
    for name, value in {
        "threads": 1,
        "time_limit": _LAST_RESORT_S,
        **options,
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(model)
    return solver, unit


def _silent(highspy: Any) -> Any:
    """A solver that prints nothing: making one prints a banner unless it is silenced before its callbacks."""

    class Silent(highspy.Highs):  # type: ignore[misc]
        def enableCallbacks(self) -> None:  # noqa: N802
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Silent()


def _run(solver: Any) -> bool:
    """Solve; False: proven that there is no solution. Raises: SolverError when neither end is reached."""
    highspy = _highspy()
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return False
    ends = highspy.HighsModelStatus
    if status not in (ends.kOptimal, ends.kSolutionLimit, ends.kInterrupt):
        raise SolverError(
            f"HiGHS found no optimum in {_LAST_RESORT_S:.0f} s ({solver.modelStatusToString(status)}).",
            "Plan with policy sti.",
        )
    return True
