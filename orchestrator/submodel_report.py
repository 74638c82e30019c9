"""What elastic training brought and cost: every submodel beside what it would be without. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sti_runtime.metrics import accuracy
from sti_runtime.model_store import TRUNCATED, SubmodelScore

COLUMNS: tuple[str, ...] = ("n × m", "kept layers", "accuracy [95 %]")
COMPARED: tuple[str, ...] = (">lost", "truncated [95 %]", ">gained")
CAPTION = (
    "lost: points below the whole model before elastic training. truncated: that model cut to the\n"
    "submodel. gained: points that elastic training adds to that. Accuracies in % of {rows} rows, with\n"
    "Wilson's interval."
)


def submodel_table(
    scores: Sequence[SubmodelScore],
) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """(columns, rows, caption) of a model's scores, in their order."""
    trained = [score for score in scores if not score.split.endswith(TRUNCATED)]
    before = {score.submodel: score for score in scores if score.split.endswith(TRUNCATED)}
    whole = max(before.values(), key=lambda s: s.submodel.depth * s.submodel.width, default=None)
    rows: list[tuple[str, ...]] = []
    for score in trained:
        cells: tuple[str, ...] = (str(score.submodel), " ".join(map(str, score.submodel.kept)), _share(score))
        if whole is not None:
            cut = before[score.submodel]
            cells += (_points(whole, score), _share(cut), _points(score, cut))
        rows.append(cells)
    if whole is None:
        return COLUMNS, rows, "Accuracies in %, with Wilson's interval."
    return COLUMNS + COMPARED, rows, CAPTION.format(rows=whole.rows)


def _share(score: SubmodelScore) -> str:
    found = accuracy(score.correct, score.rows)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}–{100 * found.high:.1f}]"


def _points(one: SubmodelScore, other: SubmodelScore) -> str:
    """By how many points ``one`` is above ``other``."""
    return f"{100 * (one.correct / one.rows - other.correct / other.rows):+.1f}"
