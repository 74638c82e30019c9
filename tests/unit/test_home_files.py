"""Small files of the home: what cannot be read, locked or written is named, with what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

import pytest

from orchestrator.errors import HostError
from orchestrator.home_files import lock_file, of_storage, read_if_there, remove, write_whole
from sti_runtime.errors import ResourceError
from sti_runtime.records import Record


class Note(Record):
    """Some file of the home."""

    format: Literal["stifarm-note"]
    version: Literal[1]
    text: str


NOTE = Note(format="stifarm-note", version=1, text="here")


def read(path: Path) -> Note | None:
    return read_if_there(path, Note, HostError, "Remove it.")


def test_a_file_is_written_whole_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "home/note.json"
    assert read(path) is None
    write_whole(path, NOTE.to_json())
    assert read(path) == NOTE
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a valid Note"),
        (b"{", "not a valid Note"),
        (NOTE.to_json().replace(b'"version":1', b'"version":2'), "version 2, this stifarm knows 1"),
        (b"x" * (17 << 20), "bytes, more than"),
        (None, "cannot be read: Is a directory"),
    ],
    ids=["empty", "torn", "newer", "long", "a folder"],
)
def test_a_file_that_does_not_tell_is_named_with_the_remedy(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "note.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(HostError) as caught:
        read(path)
    assert str(path) in caught.value.what
    assert said in caught.value.what
    assert caught.value.remedy == "Remove it."


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(b"before")
    (tmp_path / f".{path.name}.{os.getpid()}.partial").mkdir()
    with pytest.raises(ResourceError, match=f"{path} cannot be written: Is a directory"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    with pytest.raises(ResourceError, match="cannot be written"):
        write_whole(path / "below", b"after")


def test_a_lock_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"{tmp_path}, which is to be locked, cannot be opened"):
        lock_file(tmp_path)
    os.close(lock_file(tmp_path / "made"))


def test_what_cannot_be_removed_stays(tmp_path: Path) -> None:
    remove(tmp_path / "nothing")
    remove(tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "Give this user the right to it"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "dmesg"),
    ],
)
def test_what_the_system_refuses_has_its_remedy(number: int, remedy: str) -> None:
    said = of_storage(OSError(number, os.strerror(number), "/home/x"))
    assert said is not None
    assert said.what == f"/home/x cannot be used: {os.strerror(number)}."
    assert remedy in said.remedy


def test_what_has_nothing_to_do_with_storage_stays_what_it_is() -> None:
    assert of_storage(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_what_is_forbidden_and_names_no_file_is_not_about_files(number: int) -> None:
    assert of_storage(PermissionError(number, os.strerror(number))) is None
    assert of_storage(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) is not None
