"""What a page of results says of its grounds: devices with their speeds, models with their submodels."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.results.figures import title_of
from orchestrator.results.gather import DeviceFound, Results
from orchestrator.results.markdown import listed, table
from orchestrator.results.provenance import limits
from orchestrator.submodel_report import submodel_table
from orchestrator.training_report import training_lines
from sti_runtime.messages import VerifiedEmulation
from sti_runtime.shard import shard_bytes
from sti_runtime.units import NONE, format_bytes, format_ns, format_rate


def devices(results: Results) -> str:
    """The devices, how they are slowed and what their runs were gated by."""
    return table(
        (
            "device",
            "what it is",
            "limits: stated",
            "verified",
            "system",
            "engine",
            "threads",
            "gates of its runs",
        ),
        [
            (
                device.row.name,
                f"emulated ({listed(device.mechanisms)})" if device.row.emulated else "as it is",
                *_limits(device),
                listed(device.systems),
                listed(device.engines),
                listed(map(str, device.threads)),
                listed(f"{count} {verdict}" for verdict, count in sorted(device.gates.items())),
            )
            for device in results.devices
        ],
    )


def _limits(device: DeviceFound) -> tuple[str, str]:
    found: VerifiedEmulation | None = device.verified
    if found is None:
        return NONE, NONE
    asked = found.emulation
    stated, verified = [], []
    if asked.io_bytes_per_s is not None:
        stated.append(f"reads {format_rate(asked.io_bytes_per_s)}")
        verified.append("?" if found.io_bytes_per_s is None else format_rate(found.io_bytes_per_s))
    if asked.cpu_share_milli is not None:
        stated.append(f"{asked.cpu_share_milli / 1000:g} of a CPU")
        verified.append("?" if found.cpu_share_milli is None else f"{found.cpu_share_milli / 1000:g}")
    return ", ".join(stated) or NONE, ", ".join(verified) or NONE


def speeds(results: Results) -> str:
    """How fast each reads and computes, and what T came to there."""
    order = {device: number for number, device in enumerate(results.by_starvation)}
    targets: dict[tuple[str, str, str], dict[str, int]] = {}
    for cell in results.cells:
        if cell.target_ns is not None:
            key = (cell.asked.device, cell.bundle, cell.asked.task)
            targets.setdefault(key, {})[cell.asked.target] = cell.target_ns
    return table(
        (
            "device", "bundle", "all shards read at 32 bits", "whole model computed", "IO ÷ compute",
            "profile", *(f"T = {target}" for target in results.targets),
        ),
        [
            (
                title_of(results, speed.device),
                speed.bundle,
                format_ns(speed.read_ns),
                format_ns(speed.compute_ns),
                f"{speed.ratio:.2f}",
                speed.profile,
                *(
                    format_ns(known[target]) if target in known else NONE
                    for known in [targets.get((speed.device, speed.bundle, speed.task), {})]
                    for target in results.targets
                ),
            )
            for speed in sorted(results.speeds, key=lambda speed: (order[speed.device], speed.bundle))
        ],
    )  # fmt: skip


def spot_checks(results: Results) -> Iterator[str]:
    """Whether the classes that devices gave are those of the evaluations."""
    if results.spot_checks:
        yield (
            "Spot check: accuracy is measured once for each plan content, on one device. The classes that"
            " timed requests gave on each device, beside those of that evaluation: "
            + "; ".join(
                f"{check.device}: {check.compared:,} compared, {check.different:,} different"
                for check in results.spot_checks
            )
            + "."
        )


def models(results: Results) -> str:
    """The bundles and the rows their accuracies are on."""
    rows = []
    named = {(cell.asked.bundle, cell.bundle, cell.asked.task) for cell in results.cells}
    for digest, name, task in sorted(named, key=lambda each: each[1:]):
        manifest = results.manifests[digest]
        model = manifest.model
        dev = {
            cell.accuracy.correct.total
            for cell in results.pick(bundle=digest, task=task)
            if cell.accuracy is not None
        }
        of = results.dev_rows.get(task, (0, 0))[1]
        rows.append(
            (
                f"{name} ({digest[:12]})",
                f"{model.family}, {model.layers} × {model.heads} × {model.hidden}",
                format_bytes(shard_bytes(model)),
                f"{len(manifest.submodels)}{', untrained' if manifest.untrained else ', trained'}",
                manifest.quantizer.label,
                task,
                listed(f"{count:,}" + (f" of {of:,}" if count < of else "") for count in sorted(dev)),
            )
        )
    return table(
        ("bundle", "layers × heads × hidden", "32-bit shards", "submodels", "quantizer", "task", "dev rows"),
        rows,
    )


def submodels(results: Results) -> Iterator[str]:
    """What each model's training brought: every submodel that plans may take, at 32 bits, on all dev rows."""
    named = {cell.asked.bundle: cell.bundle for cell in results.cells}
    for digest, name in sorted(named.items(), key=lambda each: each[1]):
        info = results.models.get(digest)
        if info is None or not info.scores:
            continue
        yield f"### Submodels of {name}"
        if lines := training_lines(info.provenance):
            yield "\n".join(f"- {line}" for line in lines)
        columns, rows, caption = submodel_table(info.scores)
        yield table([column.lstrip(">") for column in columns], rows)
        yield " ".join((*caption.split(), limits(results, of_dev=False))).rstrip()
