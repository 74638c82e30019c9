"""What a daemon offers: the presets of phones of several ages, and the banner that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.lab.adbd.compression import CODECS
from orchestrator.lab.adbd.packets import PAYLOAD_CAP_BYTES, VERSION, VERSION_CHECKSUM

_STAT = ("shell_v2", "cmd", "stat_v2", "fixed_push_mkdir")
_MODERN = (*_STAT, "ls_v2", "fixed_push_symlink_timestamp", "sendrecv_v2", "sendrecv_v2_dry_run_send")
KNOWN = (*_MODERN, *(f"sendrecv_v2_{name}" for name in ("brotli", "lz4", "zstd")))
"""Features that can be offered, as adb names them."""


@dataclass(frozen=True)
class Offer:
    """What a daemon speaks. ``pty_only``: commands of the first shell service get a terminal too."""

    features: tuple[str, ...]
    version: int = VERSION
    payload_bytes: int = PAYLOAD_CAP_BYTES
    pty_only: bool = False


PRESETS: Mapping[str, Offer] = {
    # Android 6: no exit codes, no separate stderr, checksums.
    "old": Offer((), version=VERSION_CHECKSUM, payload_bytes=256 << 10, pty_only=True),
    # Android 9: exit codes, 64-bit stat; files go uncompressed.
    "stat": Offer(_STAT),
    # Android 12 and later, as far as the installed packages compress.
    "modern": Offer((*_MODERN, *(f"sendrecv_v2_{name}" for name in CODECS))),
}


def offer_of(text: str) -> Offer:
    """An offer from a preset's name or a list of features with commas. Raises: ValueError."""
    if text in PRESETS:
        return PRESETS[text]
    names = tuple(filter(None, text.split(",")))
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is neither a preset ({', '.join(PRESETS)}) nor a feature ({', '.join(KNOWN)})"
        )
    missing = [n for n in names if n.rpartition("_")[2] in ("brotli", "lz4", "zstd") and n[12:] not in CODECS]
    if missing:
        raise ValueError(f"{missing[0]} needs a package that is not installed")
    return Offer(names)


def banner(properties: Mapping[str, str], features: tuple[str, ...]) -> bytes:
    """What the daemon introduces itself with: its product, and what it can."""
    known = "".join(
        f"{name}={properties[name]};"
        for name in ("ro.product.name", "ro.product.model", "ro.product.device")
        if name in properties
    )
    return f"device::{known}features={','.join(features)}".encode()


def parse_properties(text: str) -> dict[str, str]:
    """Properties from the lines ``name=value`` of a build.prop; comments and other lines are skipped."""
    pairs = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, found, value in pairs if found and name.strip()}
