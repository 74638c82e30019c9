"""Quantities for people: least durations are enough when typed, exact ones are rounded in texts."""

from __future__ import annotations

import random

import pytest

from sti_runtime.units import exact_ms, format_ns_up, in_words, many, parse_duration_ns


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 devices"), (1, "1 device"), (2, "2 devices"), (1200, "1,200 devices")]
)
def test_how_many_there_are(count: int, text: str) -> None:
    assert many(count, "device") == text


def test_a_least_duration_that_is_shown_is_enough_and_near() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        least_ns = int(10 ** rng.uniform(3, 11))
        typed_ns = parse_duration_ns(format_ns_up(least_ns).replace(" ", ""))
        assert least_ns <= typed_ns <= 1.011 * least_ns


def test_exact_durations_of_a_text_are_rounded_up_and_parse_back_as_they_are() -> None:
    assert parse_duration_ns(exact_ms(60_624_182)) == 60_624_182
    assert in_words(f"the smallest is {exact_ms(60_624_182)} there") == "the smallest is 60.7 ms there"
