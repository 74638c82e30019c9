"""The bundle manifest: what a bundle holds and where. Format: docs/bundle.md.

A bundle is a folder ``<digest>/`` whose ``manifest.json`` is the canonical JSON of a ``Manifest``;
the bundle's digest is the manifest's. Beside it lie flat files, each 4 KiB-aligned:
one region per fidelity (``k2.bin`` … ``k32.bin``), ``resident.bin`` and ``embeddings.bin``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sti_runtime.model import ModelConfig, Submodel
from sti_runtime.quantizer import GOBO, SENSITIVE_PPM, Quantizer
from sti_runtime.records import Digest, Integer, NonNegative, Positive, Record

ALIGNMENT = 4096
"""Bytes: every region, version and embedding table starts on such a boundary (direct IO)."""

MANIFEST_NAME = "manifest.json"
MANIFEST_CAP_BYTES = 8 << 20
RESIDENT_FILE = "resident.bin"
EMBEDDINGS_FILE = "embeddings.bin"

OutlierCount = Annotated[int, Field(ge=0, lt=2**32)]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""A bare file name: no folder, no leading dot, so nothing can leave the bundle."""


class Chunk(Record):
    """A run of a file that is verified and transferred as one: bytes [offset, offset + length)."""

    offset: NonNegative
    length: Positive
    sha256: Digest


class Version(Record):
    """One stored version of one shard: a chunk of its region file.

    ``length`` is padded to ALIGNMENT; ``payload_bytes`` is what is meant. ``outliers`` counts the
    outliers of each matrix in the order of ``shard.MATRICES`` (all zero at 32 bits).
    """

    offset: NonNegative
    length: Positive
    payload_bytes: Positive
    outliers: tuple[OutlierCount, OutlierCount, OutlierCount, OutlierCount, OutlierCount, OutlierCount]
    sha256: Digest


class Region(Record):
    """All shards at one fidelity, layer-major: version i is shard (i // M, i mod M)."""

    fidelity: Literal[2, 3, 4, 5, 6, 32]
    file: FileName
    versions: tuple[Version, ...]


class TensorEntry(Record):
    """A resident tensor in ``resident.bin``: raw little-endian float32, or "gobo6" (docs/bundle.md)."""

    name: str
    shape: tuple[Positive, ...]
    encoding: Literal["f32", "gobo6"]
    offset: NonNegative
    length: Positive
    outliers: OutlierCount


class EmbeddingTable(Record):
    """An embedding table in ``embeddings.bin``: rows of ``row_bytes``, float32, no gaps, not padded."""

    name: Literal["word", "position", "token_type"]
    rows: Positive
    row_bytes: Positive
    offset: NonNegative


class DataFile(Record):
    """A file that is not a region, with the chunks that cover it."""

    file: FileName
    bytes: Positive
    chunks: tuple[Chunk, ...]


class QuantizerInfo(Record):
    """How GOBO made the versions below 32 bits; thresholds in milli-nats of log-density."""

    name: Literal["gobo", "gobo-converged"]
    refined: bool
    outlier_log_density_milli: Integer

    @model_validator(mode="after")
    def _known(self) -> QuantizerInfo:
        if self.name == "gobo-converged" and not self.refined:
            raise ValueError("gobo-converged is refined")
        return self

    @classmethod
    def of(cls, quantizer: Quantizer) -> QuantizerInfo:
        """How the manifest records it."""
        return cls(
            name="gobo-converged" if quantizer.refinement == "converged" else "gobo",
            refined=quantizer.refinement != "none",
            outlier_log_density_milli=quantizer.outlier_log_density_milli,
        )

    @property
    def made_by(self) -> str:
        """For people."""
        return self.label

    @property
    def label(self) -> str:
        """What scores of this quantizer are kept under; the threshold is named where it is not GOBO's."""
        label = self.name if self.name != "gobo" else f"gobo-{'refined' if self.refined else 'unrefined'}"
        if self.outlier_log_density_milli == GOBO.outlier_log_density_milli:
            return label
        return f"{label}:{self.outlier_log_density_milli}"


class SensitivityInfo(Record):
    """What the sensitivities of weights were measured on: rows of a task, by the digest of the rows taken."""

    task: str = Field(min_length=1, max_length=64)
    rows: Positive
    rows_digest: Digest


class FisherInfo(Record):
    """How the codec ``fisher`` made the versions below 32 bits: what its sensitivities were measured on, the
    threshold by which GOBO would count outliers, and the share of them chosen by sensitivity."""

    name: Literal["fisher"]
    outlier_log_density_milli: Integer
    sensitive_ppm: Annotated[int, Field(ge=0, le=1_000_000)]
    sensitivity: SensitivityInfo

    @classmethod
    def of(cls, quantizer: Quantizer, sensitivity: SensitivityInfo) -> FisherInfo:
        """How the manifest records it."""
        return cls(
            name="fisher",
            outlier_log_density_milli=quantizer.outlier_log_density_milli,
            sensitive_ppm=SENSITIVE_PPM,
            sensitivity=sensitivity,
        )

    @property
    def made_by(self) -> str:
        """For people."""
        return f"{self.name}, sensitivities of {self.sensitivity.rows} rows of {self.sensitivity.task}"

    @property
    def label(self) -> str:
        """What scores of this codec are kept under: other sensitivities make other versions."""
        return f"{self.name}:{self.digest[:16]}"


class Manifest(Record):
    """The whole of a bundle. ``untrained``: the submodels were never trained as such."""

    format: Literal["stifarm-bundle"]
    version: Literal[1]
    model: ModelConfig
    model_digest: Digest
    untrained: bool
    submodels: tuple[Submodel, ...] = Field(min_length=1)
    quantizer: Annotated[QuantizerInfo | FisherInfo, Field(discriminator="name")]
    regions: tuple[Region, ...] = Field(min_length=1)
    resident: tuple[TensorEntry, ...]
    embeddings: tuple[EmbeddingTable, ...]
    files: tuple[DataFile, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        count = self.model.layers * self.model.heads
        names = [r.file for r in self.regions] + [f.file for f in self.files] + [MANIFEST_NAME]
        if len(set(names)) != len(names):
            raise ValueError("two files share a name")
        fidelities = [r.fidelity for r in self.regions]
        if sorted(set(fidelities)) != fidelities:
            raise ValueError("regions must be in ascending order of fidelity, one each")
        for region in self.regions:
            if len(region.versions) != count:
                raise ValueError(f"{region.file}: {len(region.versions)} versions for {count} shards")
            end = 0
            for version in region.versions:
                if version.offset != end or version.length % ALIGNMENT:
                    raise ValueError(f"{region.file}: a hole, overlap or misalignment at {end}")
                if not version.length - ALIGNMENT < version.payload_bytes <= version.length:
                    raise ValueError(f"{region.file}: a payload that does not fit its version at {end}")
                end += version.length
        for data in self.files:
            end = 0
            for chunk in data.chunks:
                if chunk.offset != end:
                    raise ValueError(f"{data.file}: a hole or overlap at {end}")
                end += chunk.length
            if end != data.bytes:
                raise ValueError(f"{data.file}: chunks cover {end} of {data.bytes} bytes")
        sizes = {f.file: f.bytes for f in self.files}
        for tensor in self.resident:
            if tensor.offset + tensor.length > sizes.get(RESIDENT_FILE, 0):
                raise ValueError(f"resident tensor {tensor.name} lies outside {RESIDENT_FILE}")
        for table in self.embeddings:
            if table.offset % ALIGNMENT or table.row_bytes != 4 * self.model.hidden:
                raise ValueError(f"embedding table {table.name} is misaligned or of a wrong row size")
            if table.offset + table.rows * table.row_bytes > sizes.get(EMBEDDINGS_FILE, 0):
                raise ValueError(f"embedding table {table.name} lies outside {EMBEDDINGS_FILE}")
        for submodel in self.submodels:
            if submodel.width > self.model.heads or any(k >= self.model.layers for k in submodel.kept):
                raise ValueError(f"submodel {submodel} is larger than the model")
            if list(submodel.kept) != sorted(set(submodel.kept)):
                raise ValueError(f"submodel {submodel}: kept layers must ascend")
        return self

    def region(self, fidelity: int) -> Region:
        """The region of one fidelity. Raises: KeyError if the bundle does not hold it."""
        for region in self.regions:
            if region.fidelity == fidelity:
                return region
        raise KeyError(fidelity)

    def shard_version(self, layer: int, index: int, fidelity: int) -> Version:
        """The version of shard (layer, index) at ``fidelity`` bits."""
        return self.region(fidelity).versions[layer * self.model.heads + index]

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Fidelities this bundle holds, ascending."""
        return tuple(region.fidelity for region in self.regions)

    def all_chunks(self) -> tuple[tuple[str, Chunk], ...]:
        """Every (file, chunk) of the bundle, versions included."""
        rows = [
            (r.file, Chunk(offset=v.offset, length=v.length, sha256=v.sha256))
            for r in self.regions
            for v in r.versions
        ]
        return tuple(rows + [(data.file, chunk) for data in self.files for chunk in data.chunks])
