"""Campaign files, their problems by line, and what a matrix expands to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.campaigns.estimate import Amount
from orchestrator.campaigns.expand import MOST_CELLS, Content, count_batches, count_cells, expand
from orchestrator.campaigns.spec import CampaignSpec, parse_bundle, parse_preload, parse_target
from orchestrator.campaigns.spec_file import load_campaign, parse_campaign
from orchestrator.campaigns.start import Resolved, amounts_of
from orchestrator.errors import CampaignFileError
from orchestrator.inventory import parse_inventory
from sti_runtime.errors import UnitsError
from sti_runtime.policies import POLICIES, uses_preload

SHIPPED = sorted((Path(__file__).parents[2] / "campaigns").glob("*.yaml"))
DEVICES = parse_inventory(
    b"version: 1\ndevices: [{name: a, transport: local}, {name: b, transport: local, engine: native-int8}]\n",
    Path("inventory.yaml"),
).devices
CONTENTS = (Content("b" * 64, "sst-2", 10**6), Content("c" * 64, "sst-2", 10**7))


def spec(**values: object) -> CampaignSpec:
    given_values = {"version": 1, "name": "n", "kinds": ("execute",), "targets": ("1ms",), **values}
    return CampaignSpec.model_validate(given_values)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.name))
def test_shipped_campaigns_are_valid(path: Path) -> None:
    assert load_campaign(path).name == path.stem


def test_there_are_shipped_campaigns() -> None:
    assert len(SHIPPED) >= 2


def test_every_problem_has_its_line_and_remedy() -> None:
    text = b"""version: 1
name: Nightly
kinds: [profile, execut]
targets: [100ms, 3 apples]
policies: [sti, stii]
repeats: 0
prelode: 1MB
preload: [1MB, 1MB]
name: twice
"""
    with pytest.raises(CampaignFileError) as caught:
        parse_campaign(text, Path("c.yaml"))
    said = {problem.line: problem.what for problem in caught.value.problems}
    assert set(said) == {3, 4, 5, 6, 7, 8, 9}
    assert "execut" in said[3]
    assert "Write it like 100ms" in said[4]
    assert "Did you mean sti?" in said[5]
    assert "Did you mean preload?" in said[7]
    assert "twice" in said[8]
    assert "line 2 already" in said[9]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "must be a mapping"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"version: 1\nname: n\nkinds: execute\n", "needs targets"),
        (b"version: 2\nname: n\nkinds: health\n", "version"),
        (b"version: 1\nname: n\nkinds: health\ndeadline: soon\n", "deadline"),
        (b"version: 1\nname: n\nkinds: []\n", "kinds: it is an empty list; name one at least"),
        (b"version: 1\nname: n\nkinds: health\ndevices: []\n", "devices: it is an empty list"),
        (b"version: 1\nname: n\nkinds: health\ntargets: 2026-01-01\n", "targets"),
    ],
)
def test_bad_files(text: bytes, what: str) -> None:
    with pytest.raises(CampaignFileError, match=what):
        parse_campaign(text, Path("c.yaml"))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("targets: [1s, 60]", "targets.1: 60 has no unit. Write it like 60ms."),
        ("targets: 0.5", "targets: 0.5 has no unit. Write it like 0.5ms."),
        ("targets: ['60']", "targets: '60' has no unit. Write it like 60ms or 0.5 of whole-model compute."),
        ("preload: [0, 1MB]", "preload.0: 0 has no unit. Write it like 0MB."),
        ("preload: 1", "preload: 1 has no unit. Write it like 1MB."),
        ("working: 4", "working: 4 has no unit. Write it like 4MB."),
        ("deadline: 4", "deadline: 4 has no unit. Write it like 4h."),
        ("deadline: '60'", "deadline: '60' has no unit. Write it like 60ms or 60s."),
        ("deadline: -4", "deadline: -4 has no unit."),
    ],
)
def test_a_number_without_its_unit_is_told_with_the_one_that_may_be_meant(field: str, said: str) -> None:
    text = f"version: 1\nname: n\nkinds: health\n{field}\n"
    with pytest.raises(CampaignFileError) as caught:
        parse_campaign(text.encode(), Path("c.yaml"))
    (problem,) = caught.value.problems
    assert (problem.line, problem.what) == (4, said)


def test_targets_are_times_or_shares_of_whole_model_compute() -> None:
    assert parse_target("100ms").target_ns == 100_000_000
    assert parse_target("0.5  of whole-model compute").share_ppm == 500_000
    for wrong in ("0ms", "0 of whole-model compute", "half of whole-model compute", "5", "1.5 of the model"):
        with pytest.raises(UnitsError):
            parse_target(wrong)


def test_preload_buffers_are_sizes_or_shares_of_the_shards() -> None:
    assert parse_preload("1MB").resolved(7) == 1_000_000
    assert parse_preload("0.6  % of 32-bit shards").resolved(42_467_328) == 254_803
    assert parse_preload("100% of 32-bit shards").resolved(10) == 10
    assert parse_preload("0 % of 32-bit shards") != parse_preload("0MB")
    for wrong in ("101 % of 32-bit shards", "half of 32-bit shards", "1 apple", "1 % of 6-bit shards"):
        with pytest.raises(UnitsError, match="Write it like 1MB or"):
            parse_preload(wrong)
    asked = spec(preload=("0MB", "0 % of 32-bit shards", "1 % of 32-bit shards"))
    assert [size.text for size in asked.preload_sizes] == ["0MB", "1 % of 32-bit shards"]
    cells = {
        (batch.bundle_digest, cell.preload): cell.preload_bytes
        for batch in expand(asked, DEVICES, CONTENTS, seed=1)
        if batch.kind == "execute"
        for cell in batch.cells
    }
    assert {cells["b" * 64, "0MB"], cells["c" * 64, "0MB"]} == {0}
    assert cells["b" * 64, "1 % of 32-bit shards"] == 10_000
    assert cells["c" * 64, "1 % of 32-bit shards"] == 100_000


def test_a_bundle_may_name_its_task() -> None:
    assert parse_bundle("minilm-rte for rte") == ("minilm-rte", "rte")
    assert parse_bundle("for") == ("for", None)
    assert parse_bundle("minilm") == ("minilm", None)


def test_policies_without_a_use_for_preload_have_one_cell_for_each_target() -> None:
    asked = spec(policies=("sti", "load-exec"), preload=("0MB", "1MB", "2MB"))
    (batch,) = [b for b in expand(asked, DEVICES[:1], CONTENTS[:1], seed=1) if b.kind == "execute"]
    assert Counter(cell.policy for cell in batch.cells) == {"sti": 3, "load-exec": 1}
    (alone,) = [cell for cell in batch.cells if cell.policy == "load-exec"]
    assert (alone.preload, alone.preload_bytes) == (None, 0)


def test_what_a_kind_needs_comes_before_it() -> None:
    kinds = ("health", "profile", "execute", "evaluate")
    batches = list(expand(spec(kinds=kinds, repeats=2), DEVICES[:1], CONTENTS[:1], seed=1))
    assert [batch.kind for batch in batches] == [
        "importance", "health", "profile", "profile", "execute", "execute", "evaluate"
    ]  # fmt: skip
    assert [batch.number for batch in batches] == list(range(7))
    assert [batch.fresh for batch in batches if batch.kind == "profile"] == [True, True]


def test_a_need_that_was_not_asked_takes_what_the_store_has() -> None:
    batches = list(expand(spec(), DEVICES, CONTENTS, seed=1))
    assert Counter((batch.kind, batch.fresh) for batch in batches) == {
        ("importance", False): 2, ("profile", False): 4, ("execute", True): 4
    }  # fmt: skip


def test_importance_that_is_asked_counts_as_work() -> None:
    (asked,) = expand(spec(kinds=("importance",), targets=()), DEVICES[:1], CONTENTS[:1], seed=1)
    assert (asked.kind, asked.fresh) == ("importance", True)
    (rows, *_) = expand(spec(importance_rows=6), DEVICES[:1], CONTENTS[:1], seed=1)
    assert (rows.kind, rows.fresh) == ("importance", True)


def test_ablations_and_exact_are_policies() -> None:
    asked = ("wide-first", "exact", "no-slack", "uniform", "random", "exact-io", "sti-0mb")
    assert spec(policies=asked).planning_policies == tuple(name for name in POLICIES if name in asked)
    with pytest.raises(ValueError, match=r"called 'exakt'. Did you mean exact"):
        spec(policies=("exakt",))


def test_policies_of_one_question_are_never_parted_and_orders_differ_by_seed() -> None:
    targets = tuple(f"{n}ms" for n in range(1, 14))
    asked = spec(targets=targets, preload=("0MB", "1MB"), policies=tuple(POLICIES))
    batches = [b for b in expand(asked, DEVICES[:1], CONTENTS[:1], seed=1) if b.kind == "execute"]
    using = sum(map(uses_preload, POLICIES))
    for batch in batches:
        assert len(batch.cells) <= MOST_CELLS
        groups = Counter((cell.target, cell.preload) for cell in batch.cells)
        assert all(
            count == (using if preload else len(POLICIES) - using) for (_, preload), count in groups.items()
        )
        assert len({cell.target for cell in batch.cells}) == len(batch.cells) // (len(POLICIES) + using)
    orders = [
        [cell.target for batch in expand(asked, DEVICES[:1], CONTENTS[:1], seed=seed) for cell in batch.cells]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


@given(
    kinds=st.lists(
        st.sampled_from(["health", "importance", "profile", "execute", "evaluate"]), min_size=1, unique=True
    ),
    targets=st.integers(1, 9),
    preload=st.integers(1, 3),
    policies=st.integers(1, len(POLICIES)),
    repeats=st.integers(1, 3),
    engines=st.sampled_from([(), ("native",), ("native", "native-int8")]),
)
def test_the_count_is_what_expands_and_no_cell_comes_twice(
    kinds: list[str], targets: int, preload: int, policies: int, repeats: int, engines: tuple[str, ...]
) -> None:
    asked = spec(
        kinds=tuple(kinds),
        targets=tuple(f"{n}ms" for n in range(1, targets + 1)),
        preload=tuple(f"{n}MB" for n in range(preload)),
        policies=tuple(POLICIES)[:policies],
        repeats=repeats,
        engines=engines,
    )
    batches = list(expand(asked, DEVICES, CONTENTS, seed=3))
    cells = [(replace(b, number=0, cells=()), replace(c, number=0)) for b in batches for c in b.cells]
    assert len(cells) == count_cells(asked, DEVICES, CONTENTS) == len(set(cells))
    if "evaluate" in kinds:
        of_one = [
            b for b in batches if b.kind == "evaluate" and b.device == "a" and b.bundle_digest == "b" * 64
        ]
        assert len(of_one) == count_batches(asked) * max(1, len(engines))


def test_an_estimate_counts_what_expands() -> None:
    asked = spec(
        kinds=("health", "profile", "execute", "evaluate"),
        targets=tuple(f"{n}ms" for n in range(1, 14)),
        policies=tuple(POLICIES),
        repeats=2,
        requests=7,
        engines=("native", "native-int8"),
    )
    made: dict[tuple[str | None, str], Amount] = {}
    for batch in expand(asked, DEVICES, CONTENTS, seed=1):
        before = made.get((batch.device, batch.kind), Amount(0, 0))
        parts = len(batch.cells) * (asked.requests if batch.kind == "execute" else 1)
        made[batch.device, batch.kind] = Amount(before.batches + 1, before.parts + parts)
    assert amounts_of(Resolved(asked, DEVICES, CONTENTS)) == made


def test_a_million_cells_are_counted_without_being_made() -> None:
    targets = tuple(f"{n}us" for n in range(1, 1001))
    preload = tuple(f"{n}kB" for n in range(100))
    asked = spec(targets=targets, preload=preload, repeats=1000)
    assert count_cells(asked, DEVICES, CONTENTS) > 400_000_000
