"""The executable's fit is the host's, digest for digest, over random samples; what it says of bad ones."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sti_runtime.profile import DeviceProfile
from tests.agents import agent_called
from tests.native.planning_cases import agent_with_sanitizers, ask, fit_case
from tests.unit import test_profile_fit as reference

CASES = 10_000
SOME_CASES = 400


def compare(agent: Sequence[str], count: int, seed: int) -> list[bytes]:
    """Fit ``count`` random sample sets on both sides; the lines, all of which agree."""
    rng = random.Random(seed)
    cases = [fit_case(rng) for _ in range(count)]
    answers = ask([*agent, "fit", "--lines"], (case.document() for case in cases))
    assert len(answers) == count
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        assert answer == case.expected(), (number, case)
    return answers


@pytest.mark.slow
def test_ten_thousand_random_fits_are_the_hosts() -> None:
    answers = compare(agent_called("x86_64").argv, CASES, seed=20)
    documents = [json.loads(line) for line in answers]
    fits = [document for document in documents if "error" not in document]
    assert len(fits) > 0.85 * CASES
    assert len({answer for answer in answers if b'"error"' not in answer[:9]}) > 0.8 * CASES
    assert sum(not fit["unfit"] for fit in fits) > 0.1 * CASES
    assert sum(fit["io"]["alpha_ns"] > 0 and fit["io"]["ps_per_byte"] > 0 for fit in fits) > 0.3 * CASES
    assert sum(fit["io"]["alpha_ns"] == 0 for fit in fits) > 0.05 * CASES
    assert sum(fit["io"]["ps_per_byte"] == 0 for fit in fits) > 0.005 * CASES
    assert sum(fit["io"]["beside_ppm"] > 1_000_000 for fit in fits) > 0.5 * CASES
    assert sum(fit["read_cost"]["median_layer_ns"] > 0 for fit in fits) > 0.3 * CASES
    assert sum(fit["read_cost"]["median_ps_per_byte"] > 0 for fit in fits) > 0.1 * CASES
    said = {document["error"]["what"][:18] for document in documents if "error" in document}
    assert said == {
        "No usable IO sampl",
        "No usable compute ",
        "No usable fixed-co",
        "Compute samples at",
        "The samples give a",
    }


@pytest.mark.parametrize("architecture", ["aarch64", "armv7"])
def test_the_fit_is_the_same_on_every_architecture(architecture: str) -> None:
    compare(agent_called(architecture).argv, SOME_CASES, seed=21)


def test_random_fits_with_sanitizers() -> None:
    compare(agent_with_sanitizers(), SOME_CASES, seed=22)


def run(*arguments: str | Path) -> tuple[int, Any]:
    return agent_called("x86_64").call("fit", *arguments)


def document(**changes: Any) -> dict[str, Any]:
    """The samples of the host's own tests."""
    samples = {
        "bundle": "b" * 64,
        "emulated": False,
        "engine": "torch",
        "fidelities": reference.FIDELITIES,
        "queue_depth": 1,
        "results": [
            {
                "io_mode": "direct",
                "kind": "profile-io",
                "readings": [],
                "samples": [sample.model_dump() for sample in reference.line(5_000, 400)],
            },
            {
                "io_mode": "direct",
                "kind": "profile-compute",
                "readings": [],
                "samples": [s.model_dump() for s in reference.COMPUTE],
                "reads": [s.model_dump() for s in reference.BESIDE],
            },
            {"kind": "profile-fixed", "readings": [], "samples": [s.model_dump() for s in reference.FIXED]},
        ],
        "sequence_length": 32,
        "threads": 2,
        "widths": [1, 2],
    }
    return samples | changes


def test_a_file_of_samples_gives_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(document()))
    code, answer = run(path)
    assert code == 0
    profile = DeviceProfile.from_json(json.dumps(answer).encode(), source="test")
    assert profile == reference.fit()
    assert (profile.io.alpha_ns, profile.io.ps_per_byte, profile.unfit) == (5_000, 400, ())


def test_figures_pinned_for_other_implementations(tmp_path: Path) -> None:
    noise = reference.lcg(1, 120)
    samples = []
    for i, x in enumerate(noise):
        m, k = (3, 6, 9, 12)[i % 4], (2, 3, 4, 5, 6, 32)[i // 4 % 6]
        bytes_ = m * k * 18 * 4096
        fitted = m * 21_337 + bytes_ * 417 // 1000
        samples.append(reference.io(m, bytes_, fitted * (900_000 + x % 400_000) // 10**6).model_dump())
    changed = document()
    changed["results"][0]["samples"] = samples
    slower = [sample | {"duration_ns": 2 * sample["duration_ns"]} for sample in samples[:9]]
    changed["results"][1]["reads"] = slower
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(changed))
    code, answer = run(path)
    assert (code, answer["io"]) == (
        0,
        {
            "alpha_ns": 18_803,
            "ps_per_byte": 471,
            "p95_ppm": 1_153_761,
            "error_ppm": 97_724,
            "samples": 120,
            "beside_ppm": 2_060_248,
            "beside_samples": 9,
        },
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": [0]}, "widths"),
        ({"widths": [1.5]}, "widths"),
        ({"fidelities": "2"}, "fidelities"),
        ({"bundle": "b"}, "bundle"),
        ({"engine": None}, "engine"),
        ({"threads": 0}, "threads"),
        ({"more": 1}, "more"),
        ({"results": [{"kind": "profile-magic", "samples": []}]}, "results.0"),
        (
            {"results": [{"kind": "profile-fixed", "readings": [], "samples": [{"head_ns": 1}]}]},
            "results.0.samples.0",
        ),
        ({"results": [{"kind": "profile-fixed"}]}, "results.0"),
        (
            {"results": [{"io_mode": "direct", "kind": "profile-compute", "readings": [], "samples": []}]},
            "results.0",
        ),
        ({"results": [[]]}, "results.0"),
    ],
)
def test_a_malformed_document_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(document(**changes)))
    code, answer = run(path)
    assert (code, answer["error"]["type"]) == (1, "FormatError")
    assert words in answer["error"]["what"]
    assert "samples.json" in answer["error"]["what"]


def test_a_bad_line_is_answered_and_the_next_one_too() -> None:
    command = [*agent_called("x86_64").argv, "fit", "--lines"]
    good = json.dumps(document()).encode()
    lines = b"\n".join((b"{", b"", good, b"[]", good))
    done = subprocess.run(command, input=lines, capture_output=True, timeout=300, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [answer.get("error", {}).get("type") for answer in answers] == [
        "FormatError",
        "FormatError",
        None,
        "FormatError",
        None,
    ]


@pytest.mark.parametrize("arguments", [(), ("a", "b")])
def test_usage(arguments: tuple[str, ...]) -> None:
    code, answer = run(*arguments)
    assert (code, answer["error"]["type"]) == (2, "InputError")
    assert "fit --lines" in answer["error"]["remedy"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    code, answer = run(tmp_path / "absent.json")
    assert (code, answer["error"]["type"]) == (1, "FormatError")
    assert "absent.json" in answer["error"]["what"]
