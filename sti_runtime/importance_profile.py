"""The importance profile: how much each shard's fidelity matters to one task.

A profile is its own object with its own digest: named by plans and jobs, never part of a bundle,
and independent of any device. Integers only, so that the digest is the same in every language.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from sti_runtime.model import Submodel
from sti_runtime.records import Digest, Integer, NonNegative, Positive, Record, canonical_json
from sti_runtime.shard import ShardId

Method = Literal["exhaustive", "exhaustive-accuracy", "gradient"]
"""How a profile ranks shards: ``exhaustive``, every shard scored, by loss; ``exhaustive-accuracy``, the same
scores by correct rows alone, as the paper does; ``gradient``, by losses estimated from slopes at the base."""

METHODS: tuple[Method, ...] = get_args(Method)


class Score(Record):
    """A configuration's score on the profile split: mean loss in nano-nats, correct rows."""

    loss_nano: Integer
    correct: NonNegative


class ShardScore(Record):
    """The score with shard (layer, slice) raised to the high fidelity, all others at the base."""

    layer: NonNegative
    slice: NonNegative
    score: Score


class Level(Record):
    """The score of a submodel with all its shards at one fidelity: what the gains of shards are fitted to."""

    submodel: Submodel
    fidelity: Literal[2, 3, 4, 5, 6, 32]
    score: Score


class ImportanceProfile(Record):
    """All N·M scores, layer-major.

    ``base_fidelity``: bits of all other shards (2, or the lowest that is not at chance).
    ``scores``: measured, or of method ``gradient`` estimated (the correct rows too); ``base`` is measured.
    ``reliability_ppm``: Spearman-Brown corrected split-half rank correlation of the gains that ``method``
    ranks by, ppm.
    ``levels``: of trained submodels at the base and at the high fidelity, of the whole model at the others
    too; may be missing. No order of shards depends on them.
    """

    format: Literal["stifarm-importance"]
    version: Literal[1]
    model_digest: Digest
    task: str
    split_digest: Digest
    method: Method
    base_fidelity: Literal[2, 3, 4, 5, 6]
    rows: Positive
    base: Score
    reliability_ppm: Integer
    layers: Positive
    slices: Positive
    scores: tuple[ShardScore, ...]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] = ()

    def to_json(self) -> bytes:
        """Canonical JSON; without ``levels`` where there are none."""
        return canonical_json(self.model_dump(mode="json", exclude=None if self.levels else {"levels"}))

    @model_validator(mode="after")
    def _complete(self) -> ImportanceProfile:
        count = self.layers * self.slices
        if len(self.scores) != count or any(
            (s.layer, s.slice) != divmod(i, self.slices) for i, s in enumerate(self.scores)
        ):
            raise ValueError(f"scores must cover all {count} shards, layer-major")
        return self

    def gain_nano(self, shard: ShardId) -> int:
        """Loss saved by raising ``shard``, in nano-nats; may be negative."""
        score = self.scores[shard[0] * self.slices + shard[1]].score
        return self.base.loss_nano - score.loss_nano

    def worth(self) -> tuple[int, ...]:
        """What each shard is ranked by, layer-major: nano-nats saved; by accuracy, correct rows gained."""
        if self.method == "exhaustive-accuracy":
            return tuple(s.score.correct - self.base.correct for s in self.scores)
        return tuple(self.base.loss_nano - s.score.loss_nano for s in self.scores)

    def ranking(self) -> tuple[ShardId, ...]:
        """Shards from most to least important.

        By loss gain, then correct rows, then (layer, slice); of method ``exhaustive-accuracy`` by correct
        rows, then (layer, slice).
        """
        by_loss = self.method != "exhaustive-accuracy"
        return tuple(
            (s.layer, s.slice)
            for s in sorted(
                self.scores,
                key=lambda s: (s.score.loss_nano if by_loss else 0, -s.score.correct, s.layer, s.slice),
            )
        )
