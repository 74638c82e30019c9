"""The losses that the gains of shards are fitted to: submodels with all their shards at one fidelity.

Trained submodels at the base and at the high fidelity, the whole model at every fidelity (``gain.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast

from sti_runtime.bundle import Bundle
from sti_runtime.importance import SplitScore, score_configuration, tensors_at
from sti_runtime.importance_profile import Level
from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel
from sti_runtime.rows import LabelledRows

LevelKey = tuple[Submodel, int]
"""A submodel and the fidelity of all its shards."""


def wanted_levels(manifest: Manifest, base_fidelity: int) -> list[LevelKey]:
    """What is to be scored besides the base itself; submodels only where they were trained as such."""
    config = manifest.model
    whole = Submodel(kept=tuple(range(config.layers)), width=config.heads)
    trained = () if manifest.untrained else manifest.submodels
    submodels = [whole, *(submodel for submodel in trained if submodel != whole)]
    ends = [(submodel, k) for submodel in submodels for k in (base_fidelity, manifest.fidelities[-1])]
    between = [(whole, k) for k in manifest.fidelities]
    return [key for key in dict.fromkeys(ends + between) if key != (whole, base_fidelity)]


def score_levels(
    bundle: Bundle, wanted: Iterable[LevelKey], rows: LabelledRows, *, threads: int = 0
) -> Iterator[tuple[LevelKey, SplitScore]]:
    """Score them, by ascending fidelity. Memory: one whole float32 model. Raises: InputError, FormatError."""
    by_fidelity: dict[int, list[Submodel]] = {}
    for submodel, fidelity in wanted:
        by_fidelity.setdefault(fidelity, []).append(submodel)
    for fidelity, submodels in sorted(by_fidelity.items()):
        tensors = tensors_at(bundle, fidelity)
        for submodel in submodels:
            score = score_configuration(
                bundle.manifest.model, tensors, rows, submodel=submodel, threads=threads
            )
            yield (submodel, fidelity), score


def as_levels(
    manifest: Manifest, base_fidelity: int, scores: Mapping[LevelKey, SplitScore]
) -> tuple[Level, ...]:
    """Those that there are, for a profile."""
    return tuple(
        Level(
            submodel=submodel,
            fidelity=cast(Literal[2, 3, 4, 5, 6, 32], fidelity),
            score=scores[submodel, fidelity].score,
        )
        for submodel, fidelity in wanted_levels(manifest, base_fidelity)
        if (submodel, fidelity) in scores
    )
