"""Known hosts: which keys a server may show. Only reads; nothing is ever accepted here.

Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

CAP_BYTES = 16 << 20
"""Longest known hosts file that is read."""


@dataclass(frozen=True)
class KnownKey:
    """A key that some line records. ``kind``: as in "ssh-ed25519"; ``blob``: its public part on the wire."""

    kind: str
    blob: bytes
    revoked: bool
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.kind} {fingerprint(self.blob)} ({self.file}:{self.line})"


def fingerprint(blob: bytes) -> str:
    """A public key's fingerprint as ``ssh-keygen -lf`` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def recorded_name(host: str, port: int) -> str:
    """How known hosts files call a server."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def read_known_hosts(files: Iterable[Path], name: str) -> tuple[KnownKey, ...]:
    """The keys that the files record for ``name``; a file that is not there records none. Raises: OSError."""
    found: list[KnownKey] = []
    for file in files:
        try:
            with file.open("rb") as stream:
                text = stream.read(CAP_BYTES).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            continue
        found += keys_of(text.splitlines(), name, file)
    return tuple(found)


def keys_of(lines: Sequence[str], name: str, file: Path) -> list[KnownKey]:
    """The keys that the lines of one file record for ``name``. Lines that nobody could read are skipped,
    as are certificate authorities: a server is known by its own key."""
    found = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", "@revoked"):
            continue
        if not _matches(fields[0], name):
            continue
        try:
            blob = base64.b64decode(fields[2], validate=True)
        except binascii.Error:
            continue
        found.append(KnownKey(fields[1], blob, marker == "@revoked", file, number))
    return found


def _matches(patterns: str, name: str) -> bool:
    """Whether a line's first field names ``name``: plain, with wildcards, negated or hashed."""
    if patterns.startswith("|1|"):
        return _is_hash_of(patterns, name)
    matched = False
    for pattern in patterns.lower().split(","):
        # "[" is no wildcard here, but part of a name with a port.
        if fnmatchcase(name, pattern.lstrip("!").replace("[", "[[]")):
            if pattern.startswith("!"):
                return False
            matched = True
    return matched


def _is_hash_of(field: str, name: str) -> bool:
    _, _, salt, digest = [*field.split("|"), "", ""][:4]
    try:
        own = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(own, base64.b64decode(digest))
    except binascii.Error:
        return False
