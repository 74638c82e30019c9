"""Integer programs: where a search is ended, and that it ends there every time."""

from __future__ import annotations

import random

from sti_runtime.integer_program import Program, relax, solve

BITS = (2, 3, 4, 5, 6)


def hard(shards: int) -> Program:
    """One of five versions for every shard, under budgets that overlap."""
    rng, program = random.Random(3), Program()
    columns = [[program.add_binary(rng.random() * bits) for bits in BITS] for _ in range(shards)]
    for mine in columns:
        program.add_row([(column, 1.0) for column in mine], 1.0, 1.0)
    for _ in range(shards // 4):
        among = rng.sample(columns, shards // 2)
        costs = [
            (column, bits * rng.uniform(0.8, 1.2))
            for mine in among
            for column, bits in zip(mine, BITS, strict=True)
        ]
        program.at_most(costs, 3.3 * len(among))
    return program


def test_a_search_that_is_ended_has_a_bound_and_ends_the_same_every_time() -> None:
    program = hard(60)
    relaxed = relax(program)
    assert relaxed is not None
    ended = [solve(program, gap=0.0, nodes=10_000, checks=10) for _ in range(2)]
    assert ended[0] == ended[1]
    longer = solve(program, gap=0.0, nodes=10_000, checks=60)
    assert ended[0] is not None
    assert longer is not None
    assert longer.chosen is not None
    found = sum(program.gains[column] for column in longer.chosen)
    assert found < longer.bound < ended[0].bound <= relaxed.bound * (1 + 1e-9)


def test_without_a_limit_it_goes_to_the_end() -> None:
    program = hard(12)
    solution = solve(program, gap=0.0, nodes=100_000)
    assert solution is not None
    assert solution.chosen is not None
    assert abs(sum(program.gains[column] for column in solution.chosen) - solution.bound) < 1e-6
