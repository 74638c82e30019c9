"""How sensitive a task is to each weight of a model, for the codec that asks for it; loads PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.farm import Farm
from orchestrator.library import PROFILE_SPLIT, task_rows
from sti_runtime.bundle_build import Sensitivity
from sti_runtime.fisher import fisher_information
from sti_runtime.importance import prepare_rows
from sti_runtime.manifest import SensitivityInfo
from sti_runtime.model_store import Model
from sti_runtime.rows import rows_digest


def sensitivity_of(
    farm: Farm,
    model: Model,
    task: str,
    *,
    rows: int,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Of the first ``rows`` labelled rows of the task's profile split, which no result is reported on.

    ``progress`` gets (rows done, rows in all). On one thread, so that sums keep their order.
    Raises: InputError when the task has no rows for the model; DatasetError when none has a label.
    """
    _, data = task_rows(farm, task, PROFILE_SPLIT, model)
    chosen = prepare_rows(data, model.config, rows)
    return Sensitivity(
        SensitivityInfo(task=task, rows=len(chosen.labels), rows_digest=rows_digest(chosen)),
        lambda: fisher_information(model.config, model.tensors, chosen, threads=1, progress=progress),
    )
