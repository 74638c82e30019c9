"""128-bit arithmetic of two limbs against Python's integers, on every architecture's own compiler."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.agent_push import MACHINES
from orchestrator.toolchain import ARCHITECTURES, SOURCE_FOLDERS, Sources, build_agent
from tests.agents import QEMU

NATIVE = SOURCE_FOLDERS[0]
LIMB, WIDE = 2**64, 2**128
EDGES = (0, 1, 2, 999_999, 10**6, 2**32 - 1, 2**32, 2**63 - 1, 2**63, LIMB - 1, LIMB, 2**127, WIDE - 1)


def operands() -> list[tuple[int, int, int]]:
    """(a, divisor, factor): all edges with each other, then any magnitude."""
    rng = random.Random(1)

    def any_of(bits: int) -> int:
        return rng.getrandbits(rng.randint(1, bits))

    edges = [(a, b, f) for a in EDGES for b in EDGES for f in (0, 1, 10**6, LIMB - 1) if b]
    return edges + [(any_of(128), any_of(128) or 1, any_of(64)) for _ in range(3000)]


def expected(a: int, b: int, factor: int) -> list[int]:
    """What the program prints for one line."""
    wides = (
        (a % LIMB) * (b % LIMB),
        (a + b) % WIDE,
        (a - b) % WIDE,
        a * factor % WIDE,
        a // b,
        -(-a // b),
    )
    limbs = [limb for wide in wides for limb in divmod(wide, LIMB)]
    is_int = a < 2**63
    return [*limbs, (a > b) - (a < b), int(a * factor < WIDE), int(is_int), a if is_int else 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_integers_are_exact(architecture: str) -> None:
    program = Path(__file__).with_name("wide_program.c")
    emulator = shutil.which(QEMU[architecture])
    native = MACHINES.get(platform.machine()) == architecture
    if not native and emulator is None:
        pytest.skip(f"{QEMU[architecture]} is not installed (Debian package qemu-user)")
    sources = Sources((program, NATIVE / "wide.c"), (NATIVE / "wide.h",))
    path = str(build_agent(architecture, sources=sources))
    command = [path] if native else [str(emulator), path]
    rows = operands()
    text = "".join(f"{a >> 64} {a % LIMB} {b >> 64} {b % LIMB} {factor}\n" for a, b, factor in rows)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=600, check=True)
    answers = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(answers) == len(rows)
    for row, answer in zip(rows, answers, strict=True):
        assert answer == expected(*row), row
