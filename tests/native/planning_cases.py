"""Random samples, bundles, devices and budgets, and what the host makes of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from orchestrator.toolchain import SOURCE_FOLDERS
from sti_runtime.errors import InfeasiblePlanError, StifarmError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.messages import ComputeSample, FixedSample, IoSample
from sti_runtime.model import Submodel, all_submodels
from sti_runtime.plan import Policy
from sti_runtime.policies import POLICIES, Exact, plan_policy
from sti_runtime.profile import PPM, DeviceProfile
from sti_runtime.profile_fit import fit_profile
from sti_runtime.records import canonical_json
from sti_runtime.shard import FIDELITIES
from tests.native.sanitized import ENVIRONMENT, build_sanitized
from tests.unit.planning_data import PAGE, make_importance, make_manifest

LARGEST = 2**63 - 1
POLICY_NAMES: tuple[Policy, ...] = get_args(Policy)
NATIVE_POLICIES = tuple(name for name in POLICY_NAMES if not isinstance(POLICIES[name], Exact))
"""Those that the executable plans too."""

ANSWER_LIMIT_S = 600.0


def agent_with_sanitizers() -> list[str]:
    """The whole agent, built to stop at any invalid access, overflow or leak. Skips where there is no gcc."""
    return [str(build_sanitized("address,undefined", *sorted(SOURCE_FOLDERS[1].glob("*.c"))))]


def ask(command: Sequence[str], documents: Iterable[Any]) -> list[bytes]:
    """The executable's answers to documents, one line each."""
    text = b"".join(canonical_json(document) + b"\n" for document in documents)
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        env=os.environ | ENVIRONMENT,
        timeout=ANSWER_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (command, done.returncode, done.stdout[-300:], done.stderr[-2000:])
    return done.stdout.splitlines()


def error_line(error: StifarmError) -> bytes:
    """How the executable says an error of the tree."""
    fields: dict[str, Any] = {"remedy": error.remedy, "type": type(error).__name__, "what": error.what}
    if isinstance(error, InfeasiblePlanError):
        fields["smallest_target_ns"] = error.smallest_target_ns
    return canonical_json({"error": fields})


def spread(rng: random.Random, most: int, least: int = 0) -> int:
    """A value of any magnitude from ``least`` to ``most``, the ends included."""
    bits = rng.randint(0, most.bit_length())
    return rng.choice((least, most)) if rng.random() < 0.05 else max(least, min(most, rng.getrandbits(bits)))


# ------------------------------------------------------------------ fit


@dataclass(frozen=True)
class FitCase:
    """What a fit is made from."""

    widths: tuple[int, ...]
    fidelities: tuple[int, ...]
    io: tuple[IoSample, ...]
    beside: tuple[IoSample, ...]
    compute: tuple[ComputeSample, ...]
    fixed: tuple[FixedSample, ...]
    sequence_length: int
    emulated: bool

    def document(self) -> dict[str, Any]:
        """What the executable gets: compute samples in two results, and one result that has none."""
        compute = [sample.model_dump() for sample in self.compute]
        beside = [sample.model_dump() for sample in self.beside]
        half, some = len(compute) // 2, len(beside) // 2
        computed = {"io_mode": "direct", "kind": "profile-compute", "readings": []}
        return {
            "bundle": "b" * 64,
            "emulated": self.emulated,
            "engine": "native",
            "fidelities": self.fidelities,
            "queue_depth": 4,
            "results": [
                {"kind": "probe", "sensors": None, "verified": None},
                computed | {"samples": compute[:half], "reads": beside[:some]},
                {
                    "io_mode": "direct",
                    "kind": "profile-io",
                    "readings": [],
                    "samples": [s.model_dump() for s in self.io],
                },
                computed | {"samples": compute[half:], "reads": beside[some:]},
                {"kind": "profile-fixed", "readings": [], "samples": [s.model_dump() for s in self.fixed]},
            ],
            "sequence_length": self.sequence_length,
            "threads": 2,
            "widths": self.widths,
        }

    def profile(self) -> DeviceProfile:
        """The host's fit. Raises: InputError; ValidationError when a figure is 2^63 or more."""
        return fit_profile(
            bundle="b" * 64,
            engine="native",
            sequence_length=self.sequence_length,
            threads=2,
            queue_depth=4,
            emulated=self.emulated,
            widths=self.widths,
            fidelities=self.fidelities,
            io=self.io,
            beside=self.beside,
            compute=self.compute,
            fixed=self.fixed,
        )

    def expected(self) -> bytes:
        """The line that must come back."""
        try:
            return self.profile().to_json()
        except StifarmError as error:
            return error_line(error)
        except ValidationError:
            return canonical_json(
                {
                    "error": {
                        "remedy": "Profile the device again; samples are in ns and bytes.",
                        "type": "InputError",
                        "what": "The samples give a figure of 2^63 or more.",
                    }
                }
            )


def fit_case(rng: random.Random) -> FitCase:
    """Most are what devices give; some are degenerate, of extreme magnitudes, or lack usable samples."""
    kind = rng.choices(("usual", "degenerate", "extreme", "lacking"), (12, 4, 3, 1))[0]
    widths = tuple(rng.sample((1, 2, 3, 4, 6, 12), rng.randint(1, 3)))
    fidelities = tuple(rng.sample(FIDELITIES, rng.randint(1, 4)))
    io, compute, fixed = _SAMPLERS[kind](rng, widths, fidelities)
    wanted_widths = widths if rng.random() < 0.7 else (*widths, *widths, rng.randint(1, 12))
    wanted = fidelities if rng.random() < 0.7 else tuple(rng.sample(FIDELITIES, rng.randint(0, 6)))
    beside, compute = _beside(rng, io), _with_reads(rng, compute)
    return FitCase(wanted_widths, wanted, io, beside, compute, fixed, rng.randint(1, 512), rng.random() < 0.5)


Samples = tuple[tuple[IoSample, ...], tuple[ComputeSample, ...], tuple[FixedSample, ...]]


def _io(versions: int, bytes_: int, duration_ns: int, *, valid: bool = True) -> IoSample:
    return IoSample(
        versions=versions,
        bytes=min(bytes_, LARGEST),
        storage_bytes=0,
        duration_ns=min(duration_ns, LARGEST),
        mode_asked="direct",
        mode_proven="cached",
        throttled=False,
        valid=valid,
    )


def _beside(rng: random.Random, io: Sequence[IoSample]) -> tuple[IoSample, ...]:
    """Some of the reads again, mostly slower; sometimes too few of them, or none."""

    def again(sample: IoSample) -> IoSample:
        slower = rng.randint(800_000, 3_000_000)
        return _io(
            sample.versions, sample.bytes, sample.duration_ns * slower // PPM, valid=rng.random() < 0.95
        )

    count = rng.choice((0, 3, *(5, 8, 20) * 4)) if io else 0
    return tuple(again(rng.choice(io)) for _ in range(count))


def _with_reads(rng: random.Random, compute: Sequence[ComputeSample]) -> tuple[ComputeSample, ...]:
    """None, some or all of the layers with reads beside, mostly slower for it."""
    share, most = rng.choice((0.0, 0.5, 0.5, 0.5, 0.9, 1.0)), rng.choice((10**7, 10**7, LARGEST))

    def slowed(sample: ComputeSample) -> ComputeSample:
        compute_ns = sample.compute_ns * rng.randint(900_000, 2_000_000) // PPM
        return sample.model_copy(
            update={"read_bytes": spread(rng, most, 1), "compute_ns": min(compute_ns, LARGEST)}
        )

    return tuple(slowed(sample) if rng.random() < share else sample for sample in compute)


def _compute(
    width: int,
    fidelity: int,
    decompress_ns: int,
    compute_ns: int,
    *,
    read_bytes: int = 0,
    warmup: bool = False,
    throttled: bool = False,
) -> ComputeSample:
    return ComputeSample(
        width=width,
        fidelity=fidelity,
        read_bytes=read_bytes,
        decompress_ns=decompress_ns,
        compute_ns=compute_ns,
        throttled=throttled,
        warmup=warmup,
    )


def _fixed(
    parts: Sequence[int], *, asked: int, stored: int, warmup: bool = False, throttled: bool = False
) -> FixedSample:
    return FixedSample(
        embed_io_ns=parts[0],
        embed_compute_ns=parts[1],
        head_ns=parts[2],
        bytes=asked,
        storage_bytes=stored,
        mode_asked="buffered",
        mode_proven="unknown",
        throttled=throttled,
        warmup=warmup,
    )


def _usual(rng: random.Random, widths: Sequence[int], fidelities: Sequence[int]) -> Samples:
    """A line with noise and disturbances; layers whose cost grows with the width."""
    alpha_ns, ps_per_byte, unit = rng.randint(0, 400_000), rng.randint(1, 20_000), rng.randint(1, 40) * PAGE
    shard_ns, slice_ns = rng.randint(0, 300_000), rng.randint(1_000, 2_000_000)

    def noise() -> int:
        slow = rng.choice((2, 5, 20)) if rng.random() < 0.1 else 1
        return slow * rng.randint(970_000, 1_200_000)

    def read() -> IoSample:
        width, fidelity = rng.choice(widths), rng.choice(fidelities)
        bytes_ = width * fidelity * unit
        fitted = width * alpha_ns + bytes_ * ps_per_byte // 1000
        return _io(width, bytes_, fitted * noise() // PPM, valid=rng.random() < 0.95)

    io = tuple(read() for _ in range(rng.randint(8, 40)))
    compute = tuple(
        _compute(
            width,
            fidelity,
            width * shard_ns * fidelity * noise() // (8 * PPM),
            width * slice_ns * noise() // PPM,
            warmup=repeat == 0,
            throttled=rng.random() < 0.05,
        )
        for width in widths
        for fidelity in fidelities
        for repeat in range(rng.randint(4, 10))
    )
    bytes_ = rng.randint(1, 100) * PAGE
    fixed = tuple(
        _fixed(
            [rng.randint(0, 3_000_000) * noise() // PPM for _ in range(3)],
            asked=bytes_,
            stored=bytes_ if rng.random() < 0.9 else 0,
            warmup=repeat == 0,
            throttled=rng.random() < 0.05,
        )
        for repeat in range(rng.randint(4, 14))
    )
    return io, compute, fixed


def _degenerate(rng: random.Random, widths: Sequence[int], fidelities: Sequence[int]) -> Samples:
    """Few distinct values, zeros, reads of one size, falling lines."""
    size, kind = rng.choice((1, PAGE, 37 * PAGE)), rng.randrange(5)

    def read() -> IoSample:
        width, fidelity = rng.choice(widths), rng.choice(FIDELITIES)
        return (
            _io(rng.randint(1, 3), size, rng.randint(0, 3)),
            _io(width, size, 1_000),
            _io(width, width * size, width * rng.randint(1, 9)),
            _io(1, fidelity * size, 100_000 - fidelity * 1_000),
            _io(1, fidelity * size, fidelity * fidelity * 100),
        )[kind]

    io = tuple(read() for _ in range(rng.randint(1, 14)))
    compute = tuple(
        _compute(rng.choice(widths), rng.choice(fidelities), rng.randint(0, 4), rng.choice((0, 0, 1, 7)))
        for _ in range(rng.randint(1, 12))
    )
    fixed = tuple(
        _fixed([rng.randint(0, 1)] * 3, asked=1, stored=rng.randint(0, 1)) for _ in range(rng.randint(1, 9))
    )
    return io, compute, fixed


def _extreme(rng: random.Random, widths: Sequence[int], fidelities: Sequence[int]) -> Samples:
    """Any magnitude up to 2^63 - 1, together or beside usual figures."""
    most_ns, most_bytes = (rng.choice((10**6, 10**12, 2**55, LARGEST)) for _ in range(2))
    most_versions = rng.choice((12, LARGEST))
    io = tuple(
        _io(spread(rng, most_versions, 1), spread(rng, most_bytes, 1), spread(rng, most_ns))
        for _ in range(rng.randint(1, 14))
    )
    most_width = rng.choice((12, LARGEST))
    compute = tuple(
        _compute(
            spread(rng, most_width, 1) if rng.random() < 0.5 else rng.choice(widths),
            rng.choice(fidelities),
            spread(rng, most_ns),
            spread(rng, most_ns),
        )
        for _ in range(rng.randint(1, 12))
    )
    fixed = tuple(
        _fixed(
            [spread(rng, most_ns) for _ in range(3)],
            asked=spread(rng, most_bytes),
            stored=spread(rng, most_bytes),
        )
        for _ in range(rng.randint(1, 9))
    )
    return io, compute, fixed


def _lacking(rng: random.Random, widths: Sequence[int], fidelities: Sequence[int]) -> Samples:
    """One kind has no usable sample, or a fidelity is not one of ours."""
    io, compute, fixed = _usual(rng, widths, fidelities)
    fault = rng.randrange(5)
    if fault == 0:
        io = tuple(_io(s.versions, s.bytes, s.duration_ns, valid=False) for s in io)
    elif fault == 1:
        compute = tuple(s.model_copy(update={"warmup": True}) for s in compute)
    elif fault == 2:
        fixed = ()
    elif fault == 3:
        strange = (1, 7, 33, 2**32 + 2, LARGEST)
        compute = (*compute, *(_compute(1, rng.choice(strange), 5, 5) for _ in range(3)))
    else:
        io, compute = (), ()
    return io, compute, fixed


_SAMPLERS = {"usual": _usual, "degenerate": _degenerate, "extreme": _extreme, "lacking": _lacking}


# ------------------------------------------------------------------ plan


@dataclass(frozen=True)
class World:
    """A bundle's manifest and an importance profile, as files: what the questions to one process share."""

    manifest: Manifest
    importance: ImportanceProfile | None
    folder: Path

    def command(self, agent: Sequence[str]) -> list[str]:
        """The executable, ready for questions."""
        manifest, importance = self.folder / "manifest.json", self.folder / "importance.json"
        manifest.write_bytes(self.manifest.to_json())
        named: list[str] = []
        if self.importance is not None:
            importance.write_bytes(self.importance.to_json())
            named = ["--importance", str(importance)]
        return [*agent, "plan", "--lines", "--bundle", str(manifest), *named]


@dataclass(frozen=True)
class PlanCase:
    """One question about a world."""

    profile: DeviceProfile
    target_ns: int
    preload_bytes: int
    working_bytes: int
    policy: Policy
    slack: bool
    seed: int

    def document(self) -> dict[str, Any]:
        """What the executable gets."""
        return {**vars(self), "profile": self.profile.model_dump(mode="json")}

    def expected(self, world: World) -> tuple[bytes, int]:
        """The line that must come back, and the smallest T that works where this T does not (else 0)."""
        try:
            plan = plan_policy(
                self.policy,
                world.manifest,
                world.importance,
                self.profile,
                target_ns=self.target_ns,
                preload_bytes=self.preload_bytes,
                working_bytes=self.working_bytes,
                seed=self.seed,
                slack=self.slack,
            )
        except StifarmError as error:
            smallest_ns = error.smallest_target_ns if isinstance(error, InfeasiblePlanError) else 0
            return error_line(error), smallest_ns
        return plan.to_json(), 0


def world(rng: random.Random, folder: Path) -> World:
    """A bundle of up to 6 × 4 shards. Sizes mostly rise with fidelity; a few bundles are absurdly large."""
    layers, heads = rng.randint(1, 6), rng.randint(1, 4)
    fidelities: Sequence[int] = FIDELITIES
    if rng.random() < 0.25:
        fidelities = sorted(rng.sample(FIDELITIES, rng.randint(1, 5)))
    lengths = _lengths(rng, layers * heads, fidelities)
    submodels = all_submodels(layers, heads)
    if rng.random() < 0.7:
        submodels = tuple(_submodel(rng, layers, heads) for _ in range(rng.randint(1, 4)))
    manifest = make_manifest(
        layers,
        heads,
        lambda layer, slice_, k: lengths[layer * heads + slice_][fidelities.index(k)],
        fidelities=fidelities,
        submodels=submodels,
        untrained=rng.random() < 0.3,
    )
    return World(manifest, _importance(rng, layers, heads), folder)


def _submodel(rng: random.Random, layers: int, heads: int) -> Submodel:
    kept = tuple(sorted(rng.sample(range(layers), rng.randint(1, layers))))
    return Submodel(kept=kept, width=rng.randint(1, heads))


def _lengths(rng: random.Random, shards: int, fidelities: Sequence[int]) -> list[list[int]]:
    style = rng.choices(("proportional", "random", "large", "absurd"), (8, 8, 3, 1))[0]
    unit = rng.choice((1, 3, 18))
    rows = []
    for _ in range(shards):
        if style == "proportional":
            pages = [max(1, k * unit + rng.randint(-1, 1)) for k in fidelities]
        elif style == "random":
            pages = [rng.randint(1, 12) for _ in fidelities]
            pages = sorted(pages) if rng.random() < 0.8 else pages
        elif style == "large":
            pages = sorted(rng.choice((64, 128, 256, rng.randint(60, 300))) for _ in fidelities)
        else:
            pages = [spread(rng, 2 ** rng.choice((30, 44)), 1) for _ in fidelities]
        rows.append([count * PAGE for count in pages])
    return rows


def _importance(rng: random.Random, layers: int, heads: int) -> ImportanceProfile | None:
    fault = rng.random()
    if fault < 0.05:
        return None
    if fault < 0.08:
        layers += 1
    made = make_importance(layers, heads, [rng.randint(-3, 9) for _ in range(layers * heads)])
    scores = tuple(
        row.model_copy(update={"score": row.score.model_copy(update={"correct": rng.randint(0, 3)})})
        for row in made.scores
    )
    digest = "e" * 64 if fault > 0.98 else made.model_digest
    base = rng.choice((*(2,) * 20, 3, 3, 6))
    return made.model_copy(update={"scores": scores, "model_digest": digest, "base_fidelity": base})


def plan_case(rng: random.Random, where: World) -> PlanCase:
    """A question whose T lies about where plans begin to exist."""
    profile = _profile(rng, where.manifest)
    sizes = [v.length for region in where.manifest.regions for v in region.versions]
    layer = sum(sorted(sizes)[: where.manifest.model.heads])
    preload_bytes = rng.choice(
        (0, layer, sum(sizes), spread(rng, LARGEST), *(rng.randint(0, 16) * layer // 4,) * 4)
    )
    working_bytes = rng.choice(
        (1 << 40, LARGEST, sum(sizes), spread(rng, 4 * layer, 1), *(rng.randint(2, 16) * layer // 2,) * 3)
    )
    if rng.random() < 0.4:  # part of layer 0, and reads that wait for room
        preload_bytes, working_bytes = rng.randint(1, layer), rng.randint(2, 6) * layer // 2
    return PlanCase(
        profile=profile,
        target_ns=_target(rng, where.manifest, profile),
        preload_bytes=min(preload_bytes, LARGEST) if rng.random() < 0.99 else -1,
        working_bytes=max(0 if rng.random() < 0.01 else 1, min(working_bytes, LARGEST)),
        policy=rng.choice((*("sti",) * 12, "sti-0mb", "random", *NATIVE_POLICIES)),
        slack=rng.random() < 0.75,
        seed=rng.choice((0, 1, 12345, 2**32)),
    )


def _target(rng: random.Random, manifest: Manifest, profile: DeviceProfile) -> int:
    widths = {row.width for row in profile.compute}
    fitting = [s for s in manifest.submodels if s.width in widths]
    if not fitting or rng.random() < 0.05:
        return min(LARGEST, spread(rng, LARGEST))
    submodel = rng.choice(fitting)
    region = rng.choice(manifest.regions)
    compute_ns = profile.fixed_p95.total_ns + submodel.depth * profile.t_comp_ns(submodel.width)
    reads_ns = sum(
        profile.io.budget_ns(region.versions[layer * manifest.model.heads + slice_].length)
        for layer in submodel.kept
        for slice_ in range(submodel.width)
    )
    return max(0, min(LARGEST, compute_ns + reads_ns * rng.choice((-5, 0, 10, 20, 40, 70, 100, 150)) // 100))


def _profile(rng: random.Random, manifest: Manifest) -> DeviceProfile:
    style = rng.choices(("usual", "small", "extreme"), (6, 3, 1))[0]
    most = {"usual": 10 ** rng.randint(5, 7), "small": 40, "extreme": 2 ** rng.choice((40, 55, 59, 63)) - 1}[
        style
    ]

    def ns() -> int:
        return rng.randint(0, most) if style != "extreme" else spread(rng, most)

    def rows(key: str, keys: Iterable[int]) -> list[dict[str, int]]:
        made = []
        for value in keys:
            median_ns = ns()
            p95_ns = median_ns + rng.randint(0, median_ns // 3) if rng.random() < 0.9 else ns()
            made.append({key: value, "median_ns": median_ns, "p95_ns": min(p95_ns, LARGEST), "samples": 9})
        return made

    def fixed() -> dict[str, int]:
        return {"embed_io_ns": ns(), "embed_compute_ns": ns(), "head_ns": ns(), "samples": 9}

    widths: list[int] = sorted({s.width for s in manifest.submodels} | {rng.randint(1, 5)})
    fidelities = list(FIDELITIES if rng.random() < 0.5 else manifest.fidelities)
    fault = rng.random()
    if fault < 0.02:
        widths = widths[1:] or [7]
    elif fault < 0.04:
        fidelities = fidelities[1:] or [2]
    elif fault < 0.07:
        widths, fidelities = [*widths, widths[0]], [*fidelities, rng.choice(fidelities)]
    io = {
        "usual": (
            rng.randint(0, 50_000),
            rng.randint(1, 10 ** rng.randint(3, 6)),
            rng.randint(900_000, 3_000_000),
        ),
        "small": (rng.randint(0, 30), rng.randint(0, 3), rng.choice((1, 500_000, PPM, PPM + 1))),
        "extreme": (spread(rng, most), spread(rng, most), spread(rng, most, 1)),
    }[style]
    beside_ppm = spread(rng, LARGEST, PPM) if style == "extreme" else rng.randint(PPM, 4 * PPM)
    ps_per_byte = spread(rng, LARGEST) if style == "extreme" else rng.randint(0, 1 + io[1])
    document = {
        "format": "stifarm-device-profile",
        "version": 1,
        "bundle": manifest.digest if rng.random() < 0.8 else "0" * 64,
        "engine": rng.choice(("torch", "native")),
        "sequence_length": rng.randint(1, 512),
        "threads": 2,
        "queue_depth": 4,
        "emulated": rng.random() < 0.5,
        "io": {
            "alpha_ns": io[0],
            "ps_per_byte": io[1],
            "p95_ppm": io[2],
            "error_ppm": 0,
            "samples": 9,
            "beside_ppm": PPM if rng.random() < 0.3 else beside_ppm,
            "beside_samples": 9,
        },
        "compute": rows("width", widths),
        "decompress": rows("fidelity", fidelities),
        "read_cost": {
            "median_layer_ns": rng.choice((0, ns())),
            "p95_layer_ns": rng.choice((0, ns())),
            "median_ps_per_byte": rng.choice((0, ps_per_byte)),
            "p95_ps_per_byte": rng.choice((0, ps_per_byte)),
            "samples": 9,
        },
        "fixed_median": fixed(),
        "fixed_p95": fixed(),
        "unfit": ["io: made up"] if rng.random() < 0.2 else [],
    }
    return DeviceProfile.from_json(json.dumps(document).encode(), source="test")
