from __future__ import annotations

from orchestrator.submodel_report import COLUMNS, COMPARED, submodel_table
from sti_runtime.model import Submodel
from sti_runtime.model_store import TRUNCATED, SubmodelScore

WHOLE, HALF = Submodel(kept=(0, 1, 2), width=4), Submodel(kept=(0, 1), width=2)


def score(submodel: Submodel, correct: int, split: str = "dev") -> SubmodelScore:
    return SubmodelScore(submodel=submodel, split=split, correct=correct, rows=200)


def test_each_submodel_stands_beside_the_fine_tuned_model_and_its_own_truncation() -> None:
    columns, rows, caption = submodel_table(
        [
            score(WHOLE, 178), score(HALF, 166),
            score(WHOLE, 180, "dev" + TRUNCATED), score(HALF, 110, "dev" + TRUNCATED),
        ]
    )  # fmt: skip
    assert columns == COLUMNS + COMPARED
    assert rows == [
        ("3×4", "0 1 2", "89.0 [83.9–92.6]", "+1.0", "90.0 [85.1–93.4]", "-1.0"),
        ("2×2", "0 1", "83.0 [77.2–87.6]", "+7.0", "55.0 [48.1–61.7]", "+28.0"),
    ]
    assert "200 rows" in caption


def test_a_model_that_was_never_truncated_shows_what_it_has() -> None:
    columns, rows, caption = submodel_table([score(WHOLE, 178)])
    assert columns == COLUMNS
    assert [len(row) for row in rows] == [len(columns)]
    assert "truncated" not in caption
    assert submodel_table([])[1] == []
