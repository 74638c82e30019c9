"""Noticing that the inventory file has changed."""

from __future__ import annotations

from pathlib import Path

_Stamp = tuple[int, int, int] | None
"""(inode, size, time of change in ns); None: the file is not there."""


class InventoryWatch:
    """Looks at a file again and again; a change counts when two looks in a row see the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._seen = self._stamp()

    def changed(self) -> bool:
        """Whether the file is another than when this was last true; a file that is gone is no change."""
        before, self._seen = self._seen, self._stamp()
        if self._seen is None or self._seen != before or self._seen == self._known:
            return False
        self._known = self._seen
        return True

    def _stamp(self) -> _Stamp:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
