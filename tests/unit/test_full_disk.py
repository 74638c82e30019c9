"""Cleaning without an agent: what cannot be seen is not taken for gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.errors import DeviceFullError, StableError
from orchestrator.full_disk import agents_there, remove_content, remove_everything
from orchestrator.transports.base import Completed
from orchestrator.transports.fake import FakeTransport


class Device:
    """Answers listings as told; notes what it was told to remove."""

    def __init__(self, folder: Path, listing: bytes, *, ok: bool) -> None:
        self.removed: list[str] = []
        self._listing, self._ok = listing, ok
        self.transport = FakeTransport(folder, self._run, device="pixel")

    def _run(self, argv: Sequence[str], env: Mapping[str, str]) -> Completed:
        if argv[0] == "rm":
            self.removed += argv[3:]
            return Completed(tuple(argv), 0, b"", b"", False)
        error = b"" if self._ok else b"sh: cannot fork"
        return Completed(tuple(argv), 0 if self._ok else 1, self._listing, error, False)


def test_nothing_is_removed_where_nothing_can_be_listed(tmp_path: Path) -> None:
    device = Device(tmp_path, b"", ok=False)
    for act in (remove_content, remove_everything):
        with pytest.raises(StableError, match="/spool cannot be listed: sh: cannot fork"):
            act(device.transport, "/spool", None)
    with pytest.raises(StableError, match="/spool/bin cannot be listed"):
        agents_there(device.transport, "/spool")
    assert device.removed == []


def test_settings_that_are_to_be_put_back_keep_everything(tmp_path: Path) -> None:
    device = Device(tmp_path, b"settings.journal\n", ok=True)
    with pytest.raises(DeviceFullError, match="settings of it are to be put back"):
        remove_everything(device.transport, "/spool", None)
    assert device.removed == []
