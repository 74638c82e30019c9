"""Building a bundle from a model's tensors: quantize, pack, digest, publish. Format: docs/bundle.md.

The bundle is written to a hidden folder beside its place, flushed to storage and renamed: it is never
half there.
The same input gives the same bytes and so the same digest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sti_runtime.bundle import Bundle, embedding_shapes, resident_shapes
from sti_runtime.bundle_files import (
    HeadEncoding,
    resident_encoding,
    write_embeddings,
    write_regions,
    write_resident,
)
from sti_runtime.errors import CheckpointError, FormatError, InputError, ResourceError
from sti_runtime.manifest import (
    ALIGNMENT,
    MANIFEST_NAME,
    FisherInfo,
    Manifest,
    QuantizerInfo,
    SensitivityInfo,
)
from sti_runtime.model import ModelConfig, Submodel, tensor_shapes
from sti_runtime.pack import payload_layout
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import F32, FIDELITIES, matrix_shapes
from sti_runtime.staging import flush, flush_folder, locked, staging_folder
from sti_runtime.units import format_bytes

log = logging.getLogger(__name__)

_OUTLIER_SHARE = 0.01
"""Of the weights, allowed for when free space is checked; a Gaussian has 0.04–0.1 % at GOBO's threshold."""

_WIDER_SHARE = 0.05
"""The same with a higher threshold."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class _Request:
    """Everything that decides a bundle's bytes, besides the tensors that model_digest stands for."""

    config: ModelConfig
    model_digest: str
    untrained: bool
    submodels: tuple[Submodel, ...]
    fidelities: tuple[int, ...]
    quantizer: QuantizerInfo | FisherInfo
    head_encoding: HeadEncoding

    def is_for(self, manifest: Manifest) -> bool:
        return (
            manifest.model == self.config
            and manifest.model_digest == self.model_digest
            and manifest.untrained == self.untrained
            and manifest.submodels == self.submodels
            and manifest.fidelities == self.fidelities
            and manifest.quantizer == self.quantizer
            and all(t.encoding == resident_encoding(t.name, self.head_encoding) for t in manifest.resident)
        )


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a codec that asks how sensitive each weight is gets: ``measure`` is called if a build is needed.

    ``measure`` gives the sensitivities of all sharded weights by canonical name, of the weights' shapes.
    """

    info: SensitivityInfo
    measure: Callable[[], Mapping[str, F32]]


def build_bundle(
    model_config: ModelConfig,
    tensors: Mapping[str, F32],
    *,
    model_digest: str,
    submodels: tuple[Submodel, ...],
    untrained: bool,
    out_root: Path,
    fidelities: tuple[int, ...] = FIDELITIES,
    quantizer: Quantizer = GOBO,
    head_encoding: HeadEncoding = "f32",
    sensitivity: Sensitivity | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Build the bundle of a model into ``out_root/<digest>`` and return that folder.

    A bundle of the same ``model_digest`` and options that is already there is returned as it is.
    ``sensitivity`` is for the codec ``fisher`` and only for it.
    ``progress`` gets (shards done, shards in all).

    Raises: CheckpointError if a tensor is missing, misshapen or not finite; InputError for unknown
    fidelities or a codec without its sensitivities; ResourceError if storage runs out. In every case
    nothing is left behind.
    """
    request = _Request(
        config=model_config,
        model_digest=model_digest,
        untrained=untrained,
        submodels=submodels,
        fidelities=tuple(sorted(set(fidelities))),
        quantizer=_quantizer_info(quantizer, sensitivity),
        head_encoding=head_encoding,
    )
    if not request.fidelities or not set(request.fidelities) <= set(FIDELITIES):
        raise InputError(f"Fidelities {fidelities} are not all known.", f"Choose among {FIDELITIES}.")
    with _storage_errors(out_root):
        out_root.mkdir(parents=True, exist_ok=True)
        existing = find_bundle(out_root, request.is_for)
        if existing is not None:
            return existing.path
        _check_tensors(model_config, tensors)
        require_space(out_root, estimated_bytes(model_config, request.fidelities, quantizer))
        with staging_folder(out_root) as folder:
            regions = write_regions(
                folder,
                model_config,
                tensors,
                request.fidelities,
                quantizer=quantizer,
                sensitivities=None if sensitivity is None else sensitivity.measure(),
                progress=progress,
            )
            # The head is no shard and has no sensitivities: its six bits are GOBO's under every codec.
            resident, resident_file = write_resident(
                folder,
                model_config,
                tensors,
                quantizer=GOBO if quantizer.codec != "gobo" else quantizer,
                head_encoding=head_encoding,
            )
            tables, embeddings_file = write_embeddings(folder, model_config, tensors)
            manifest = Manifest(
                format="stifarm-bundle",
                version=1,
                model=model_config,
                model_digest=model_digest,
                untrained=untrained,
                submodels=submodels,
                quantizer=request.quantizer,
                regions=regions,
                resident=resident,
                embeddings=tables,
                files=(resident_file, embeddings_file),
            )
            with (folder / MANIFEST_NAME).open("wb") as stream:
                stream.write(manifest.to_json())
                flush(stream)
            return _publish(folder, out_root / manifest.digest)


def find_bundle(out_root: Path, wanted: Callable[[Manifest], bool]) -> Bundle | None:
    """The first sound bundle under ``out_root`` whose manifest is ``wanted``; damaged ones are logged."""
    for path in sorted(out_root.iterdir()):
        if path.name.startswith(".") or not (path / MANIFEST_NAME).exists():
            continue
        try:
            bundle = Bundle.open(path)
        except FormatError as error:
            log.warning("passing over a damaged bundle: %s", error)
            continue
        if wanted(bundle.manifest):
            return bundle
    return None


def estimated_bytes(config: ModelConfig, fidelities: tuple[int, ...], quantizer: Quantizer = GOBO) -> int:
    """Bytes that a bundle takes on storage, a little more rather than less."""
    shapes = tuple(matrix_shapes(config).values())
    weights = sum(math.prod(shape) for shape in shapes)
    none = (0,) * len(shapes)
    wider = quantizer.outlier_log_density_milli > GOBO.outlier_log_density_milli
    outliers = int(weights * (_WIDER_SHARE if wider else _OUTLIER_SHARE))
    shard = 0
    for bits in fidelities:
        payload = payload_layout(shapes, bits, none).payload_bytes
        shard += _padded(payload + (0 if bits == 32 else 8 * outliers), ALIGNMENT)
    data = sum(
        4 * math.prod(shape) + ALIGNMENT
        for shape in (*resident_shapes(config).values(), *embedding_shapes(config).values())
    )
    return config.layers * config.heads * shard + data + (1 << 20)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises: ResourceError if the file system of ``folder`` has not ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"{folder}: {format_bytes(free)} free, the bundle needs about {format_bytes(needed_bytes)}.",
            "Free space, choose fewer fidelities or another folder; nothing was written.",
        )


def _quantizer_info(quantizer: Quantizer, sensitivity: Sensitivity | None) -> QuantizerInfo | FisherInfo:
    if quantizer.codec == "fisher" and sensitivity is not None:
        return FisherInfo.of(quantizer, sensitivity.info)
    if quantizer.codec == "fisher":
        raise InputError(
            "The codec fisher weighs every weight by how sensitive a task is to it, and no task is given.",
            "Name one with --task, or build with --codec gobo, which needs none.",
        )
    if sensitivity is not None:
        raise InputError(
            f"The codec {quantizer.codec} does not look at sensitivities.",
            "Leave the task out, or build with --codec fisher.",
        )
    return QuantizerInfo.of(quantizer)


def _check_tensors(config: ModelConfig, tensors: Mapping[str, F32]) -> None:
    remedy = "Import the checkpoint again."
    for name, shape in tensor_shapes(config).items():
        if name not in tensors:
            raise CheckpointError(f"The model lacks the tensor {name}.", remedy)
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise CheckpointError(
                f"{name} is {tensor.dtype} of shape {tensor.shape}, not float32 of {shape}.", remedy
            )
        # The extremes are not finite if any element is not, and need no temporary.
        if not (np.isfinite(tensor.min()) and np.isfinite(tensor.max())):
            raise CheckpointError(f"{name} holds values that are not finite.", remedy)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@contextlib.contextmanager
def _storage_errors(out_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"{out_root}: storage ran out while a bundle was being written: {error.strerror}.",
                "Free space, choose fewer fidelities or another folder; nothing was left behind.",
            ) from error
        raise InputError(
            f"{out_root}: a bundle cannot be written there: {error.strerror}.",
            "Choose a folder that can be written.",
        ) from error


def _publish(folder: Path, target: Path) -> Path:
    """Rename the finished folder to its digest; a sound bundle already there wins."""
    flush_folder(folder)
    with locked(target.parent):
        if target.exists():
            try:
                return Bundle.open(target, verify=True).path
            except FormatError as error:
                log.warning("replacing a damaged bundle: %s", error)
                damaged = folder.with_name(f"{folder.name}-damaged")
                target.rename(damaged)
                folder.rename(target)
                shutil.rmtree(damaged)
        else:
            folder.rename(target)
        flush_folder(target.parent)
    return target
