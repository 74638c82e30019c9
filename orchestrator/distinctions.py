"""What tells the plans of one listing apart: the columns in which they differ, and no others. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from db.plan_answers import PlanAnswer
from orchestrator.measure import Answer
from sti_runtime.plan import Policy
from sti_runtime.policies import takes_its_own_buffers, uses_preload
from sti_runtime.units import format_bytes

IMPORTANCE = "importance"
"""The name of the distinction by importance profile."""


@dataclass(frozen=True)
class Ranking:
    """The importance profile that a plan's shards were ranked by. ``method``: None where it is not known."""

    digest: str
    method: str | None


@dataclass(frozen=True)
class Asked:
    """What a plan of a listing answers, or what has no plan. None: not known, or no use to the policy."""

    task: str | None
    policy: Policy
    target_ns: int
    preload_bytes: int | None
    working_bytes: int | None
    ranking: Ranking | None

    @classmethod
    def by(cls, answer: PlanAnswer) -> Asked:
        """Of a plan."""
        plan = answer.plan
        return cls(
            answer.task,
            plan.policy,
            plan.target_ns,
            plan.preload_bytes,
            plan.working_bytes,
            ranking_of(answer),
        )

    @classmethod
    def without_plan(cls, answer: Answer) -> Asked:
        """Of a question that has none."""
        asked = answer.question
        own = takes_its_own_buffers(asked.policy)
        return cls(
            None,
            asked.policy,
            asked.target_ns,
            asked.preload_bytes if uses_preload(asked.policy) else None,
            None if own else asked.working_bytes,
            None,
        )


def ranking_of(answer: PlanAnswer) -> Ranking | None:
    """What a plan's shards were ranked by; None of a policy that ranks none."""
    found = next((ref for ref in answer.profiles if ref.kind == "importance"), None)
    return None if found is None else Ranking(found.digest, found.method)


@dataclass(frozen=True)
class Distinction:
    """A column that tells plans apart, with a cell for each of them; None where there is nothing to show."""

    name: str
    cells: tuple[str | None, ...]
    right: bool = False

    @property
    def column(self) -> str:
        """Its heading; with ">" where it is right-aligned."""
        return f">{self.name}" if self.right else self.name


def distinctions(listed: Sequence[Asked]) -> list[Distinction]:
    """The columns in which these differ, in order; buffers and importance among those of one task and policy.

    What a policy chooses itself differs with T as its plans do: such buffers count where T is the same.
    """

    def alike(one: Asked) -> Hashable:
        return one.task, one.policy, one.target_ns if takes_its_own_buffers(one.policy) else None

    found = []
    if _differ(listed, lambda one: one.task):
        found.append(Distinction("task", tuple(one.task for one in listed)))
    if _differ(listed, lambda one: one.policy):
        found.append(Distinction("policy", tuple(one.policy for one in listed)))
    if _differ(listed, lambda one: one.preload_bytes, alike):
        found.append(Distinction("|S|", _sizes([one.preload_bytes for one in listed]), right=True))
    if _differ(listed, lambda one: one.working_bytes, alike):
        found.append(Distinction("W", _sizes([one.working_bytes for one in listed]), right=True))
    if _differ(listed, lambda one: one.ranking, alike):
        found.append(Distinction(IMPORTANCE, _rankings([one.ranking for one in listed])))
    return found


def _differ(
    listed: Sequence[Asked],
    value: Callable[[Asked], Hashable],
    among: Callable[[Asked], Hashable] = lambda _: None,
) -> bool:
    """Whether two of those that are alike in ``among`` have other values; None is no value."""
    values: dict[Hashable, set[Hashable]] = {}
    for one in listed:
        if (known := value(one)) is not None:
            values.setdefault(among(one), set()).add(known)
    return any(len(each) > 1 for each in values.values())


def _sizes(sizes: Sequence[int | None]) -> tuple[str | None, ...]:
    """Sizes for people, exact where rounded ones would be the same."""
    texts = {size: format_bytes(size) for size in sizes if size is not None}
    if len(set(texts.values())) < len(texts):
        texts = {size: f"{size:,} B" for size in texts}
    return tuple(None if size is None else texts[size] for size in sizes)


def _rankings(rankings: Sequence[Ranking | None]) -> tuple[str | None, ...]:
    """Profiles by method, by digest where methods are the same."""
    texts = {one: one.method or one.digest[:12] for one in rankings if one is not None}
    if len(set(texts.values())) < len(texts):
        texts = {one: f"{one.method or ''} {one.digest[:12]}".strip() for one in texts}
    return tuple(None if one is None else texts[one] for one in rankings)
