"""Queries about importance scores and profiles."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.documents import document, now_wall_ns
from db.models import ImportanceProfileRow, ImportanceScoreRow
from db.upsert import save_new
from sti_runtime.errors import InputError
from sti_runtime.importance_profile import METHODS, ImportanceProfile, Method, Score
from sti_runtime.shard import ShardId

BASE: ShardId = (-1, -1)
"""The key of the base's own score, with no shard raised."""

LEVELS = -2
"""The layer in the keys of scores of submodels, all shards at what is then the base fidelity; their slice is
the submodel's number in its model."""


@dataclass(frozen=True)
class ScoreKey:
    """What scores must share to be compared."""

    model_digest: str
    task: str
    split_digest: str
    base_fidelity: int
    quantizer: str = "gobo-refined"


@dataclass(frozen=True)
class StoredScore:
    """One score; the halves are the even and the odd rows, for split-half reliability. ``half_a_correct``
    None: of an earlier schema, to be scored again. ``device``: where it was measured; None: on the host."""

    score: Score
    rows: int
    half_a_loss_nano: int | None = None
    half_b_loss_nano: int | None = None
    half_a_correct: int | None = None
    device: str | None = None


def record_score(session: Session, key: ScoreKey, shard: ShardId, stored: StoredScore) -> None:
    """Keep one score; a score that is there already stays (scoring is deterministic), unless it lacks
    ``half_a_correct``."""
    configuration = {
        "model_digest": key.model_digest,
        "task": key.task,
        "split_digest": key.split_digest,
        "base_fidelity": key.base_fidelity,
        "quantizer": key.quantizer,
        "layer": shard[0],
        "slice": shard[1],
    }
    figures = {
        "rows": stored.rows,
        "loss_nano": stored.score.loss_nano,
        "correct": stored.score.correct,
        "half_a_loss_nano": stored.half_a_loss_nano,
        "half_b_loss_nano": stored.half_b_loss_nano,
        "half_a_correct": stored.half_a_correct,
        "device": stored.device,
        "created_wall_ns": now_wall_ns(),
    }
    save_new(session, ImportanceScoreRow, configuration | figures)
    table = ImportanceScoreRow
    session.execute(
        update(table).filter_by(**configuration).where(table.half_a_correct.is_(None)).values(**figures)
    )


def scores_done(session: Session, key: ScoreKey) -> dict[ShardId, StoredScore]:
    """All scores of ``key`` by shard, the base's under ``BASE``: where an interrupted profile goes on."""
    table = ImportanceScoreRow
    query = select(table).where(
        table.model_digest == key.model_digest,
        table.task == key.task,
        table.split_digest == key.split_digest,
        table.base_fidelity == key.base_fidelity,
        table.quantizer == key.quantizer,
    )
    return {
        (row.layer, row.slice): StoredScore(
            Score(loss_nano=row.loss_nano, correct=row.correct),
            row.rows,
            row.half_a_loss_nano,
            row.half_b_loss_nano,
            row.half_a_correct,
            row.device,
        )
        for row in session.scalars(query)
    }


def scored_by(session: Session, profile: ImportanceProfile) -> dict[str | None, int]:
    """How many of a profile's shards each device scored, None: the host; empty for an estimate.

    Of more than one quantizer's scores, all count.
    """
    table = ImportanceScoreRow
    if profile.method == "gradient":
        return {}
    query = (
        select(table.device, func.count())
        .where(
            table.model_digest == profile.model_digest,
            table.task == profile.task,
            table.split_digest == profile.split_digest,
            table.base_fidelity == profile.base_fidelity,
            table.layer >= 0,
        )
        .group_by(table.device)
        .order_by(func.count().desc(), table.device)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def save_importance_profile(session: Session, profile: ImportanceProfile) -> str:
    """Keep a complete profile; its digest is returned. Saving it again makes it the newest."""
    digest, now = profile.digest, now_wall_ns()
    save_new(
        session,
        ImportanceProfileRow,
        {
            "digest": digest,
            "model_digest": profile.model_digest,
            "task": profile.task,
            "split_digest": profile.split_digest,
            "method": profile.method,
            "base_fidelity": profile.base_fidelity,
            "rows": profile.rows,
            "reliability_ppm": profile.reliability_ppm,
            "profile_json": document(profile),
            "created_wall_ns": now,
        },
    )
    table = ImportanceProfileRow
    session.execute(update(table).where(table.digest == digest).values(created_wall_ns=now))
    return digest


def latest_importance(
    session: Session, model_digest: str, task: str, method: Method | None = None
) -> ImportanceProfile | None:
    """The newest profile of a model on a task by ``method`` (of two of one moment, that of the lower digest);
    None when there is none.

    Without a method: the newest exhaustive one, in its absence the newest estimate.
    """
    table = ImportanceProfileRow
    query = select(table).where(table.model_digest == model_digest, table.task == task)
    newest_first = query.order_by(table.created_wall_ns.desc(), table.digest).limit(1)
    for wanted in ("exhaustive", "gradient") if method is None else (method,):
        row = session.scalars(newest_first.where(table.method == wanted)).one_or_none()
        if row is not None:
            return _profile(row)
    return None


def importance_profiles(session: Session, model_digest: str, task: str) -> list[ImportanceProfile]:
    """The newest profile of each method that there is, in the order of ``METHODS``."""
    found = [latest_importance(session, model_digest, task, method) for method in METHODS]
    return [profile for profile in found if profile is not None]


def importance_by_digest(session: Session, digest: str) -> ImportanceProfile:
    """A profile by its digest. Raises: InputError when the store does not hold it."""
    row = session.get(ImportanceProfileRow, digest)
    if row is None:
        raise InputError(
            f"There is no importance profile {digest[:12]}.", "Make one with `stifarm importance`."
        )
    return _profile(row)


def _profile(row: ImportanceProfileRow) -> ImportanceProfile:
    return ImportanceProfile.from_json(
        row.profile_json.encode(), source=f"importance profile {row.digest[:12]}"
    )
