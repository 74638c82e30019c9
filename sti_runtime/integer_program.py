"""Integer programs, solved by HiGHS: the only file that imports the solver.

One thread and a limit of nodes, not of time, end a search: the same program has the same solution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from sti_runtime.errors import SolverError

_LAST_RESORT_S = 60.0
_INFINITY = float("inf")


@dataclass
class Program:
    """Maximise Σ gain·x under rows of bounds; columns are binary or continuous. Built row by row.

    ``margin``: by what share of its largest coefficient a bound is undercut, for the solver's tolerance.
    """

    margin: float = 0.0
    gains: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    row_low: list[float] = field(default_factory=list)
    row_high: list[float] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)

    def add_binary(self, gain: float) -> int:
        """A new column of 0 or 1; its index."""
        self.gains.append(gain)
        self.upper.append(1.0)
        self.binary.append(True)
        return len(self.gains) - 1

    def add_time(self) -> int:
        """A new column of 0 or more; its index."""
        self.gains.append(0.0)
        self.upper.append(_INFINITY)
        self.binary.append(False)
        return len(self.gains) - 1

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
        listed = list(terms)
        largest = max((abs(value) for _, value in listed), default=0.0)
        self.add_row(listed, -_INFINITY, high - self.margin * largest)


@dataclass(frozen=True)
class Solution:
    """The columns that are 1, and a proven upper bound of the gain."""

    chosen: frozenset[int]
    bound: float


def solve(program: Program, *, tolerance: float, nodes: int, relaxed: bool = False) -> Solution | None:
    """The best solution within ``tolerance`` (relative), or as near as so many ``nodes`` allow; None when
    there is none. ``relaxed``: of fractions; only its bound is of use.

    Raises: SolverError when the solver is not installed or ends without a solution or a proof of none.
    """
    try:
        import highspy
    except ImportError as error:
        raise SolverError(
            "The planner exact needs the solver HiGHS, which is not installed here.",
            "Install it (pip install highspy), or plan with policy sti.",
        ) from error
    columns = len(program.gains)
    if columns == 0:  # the solver calls that no problem at all
        fits = all(low <= 0 <= high for low, high in zip(program.row_low, program.row_high, strict=True))
        return Solution(frozenset(), 0.0) if fits else None
    largest = max(map(abs, program.gains), default=1.0) or 1.0
    table = sorted(program.entries)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, len(program.row_low)
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_ = np.array(program.gains) / largest
    model.col_lower_ = np.zeros(columns)
    model.col_upper_ = np.array(program.upper)
    model.row_lower_ = np.array(program.row_low)
    model.row_upper_ = np.array(program.row_high)
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.searchsorted(
        [column for column, _, _ in table], np.arange(columns + 1)
    ).astype(np.int32)
    model.a_matrix_.index_ = np.array([row for _, row, _ in table], np.int32)
    model.a_matrix_.value_ = np.array([value for _, _, value in table])
    if not relaxed:
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[binary] for binary in program.binary]
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in (
        ("output_flag", False),
        ("threads", 1),
        ("mip_rel_gap", tolerance),
        ("mip_abs_gap", 0.0),
        ("mip_max_nodes", nodes),
        ("time_limit", _LAST_RESORT_S),
    ):
        solver.setOptionValue(name, value)
    solver.passModel(model)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    info = solver.getInfo()
    reached = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kSolutionLimit)
    if status not in reached or info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise SolverError(
            f"HiGHS found no optimum in its limit of {nodes} nodes and {_LAST_RESORT_S:.0f} s "
            f"({solver.modelStatusToString(status)}).",
            "Plan with policy sti.",
        )
    values = solver.getSolution().col_value
    bound = info.objective_function_value if relaxed else info.mip_dual_bound
    chosen = frozenset(i for i in range(columns) if program.binary[i] and values[i] > 0.5)
    return Solution(chosen, bound * largest)
