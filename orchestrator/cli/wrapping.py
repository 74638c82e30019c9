"""Lines for a terminal: broken at blanks, but never within a command, which is there to be copied.

A command begins with a program that texts here name, also by its path, and goes on over the words behind it
until a punctuation mark ends it, or prose does: its first words may be verbs; later ones are its own if they
look like an option, an option's value, a name in capitals or a path. Where a command ends is a guess, and a
wrong one does little harm: a longer line, or a break in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len

_PROGRAM = re.compile(
    r"(?:\S*/)?(?:stifarm|adb|apt|cd|date|git|lsusb|mkdir|pip|scp|sqlite3|ssh|ssh-add|ssh-copy-id|ssh-keygen"
    r"|ssh-keyscan|sudo|systemctl|sysctl|timedatectl|udevadm)"
)
_WORD = re.compile(r"""(?:(?<![^\s=])"[^"]*"|(?<![^\s=])'[^']*'|\S)+""")
_ENDS = re.compile(r"""[.,;:)`’]["']?$""")
_OWN = re.compile(r"[^\w\s-]|[0-9_]|^[A-Z]+$")
"""A word that prose has seldom: with a sign, a digit, or in capitals."""

_JOINS = ("&&", "||", "|")
_VERBS = 3
"""So many plain words behind the program belong to it: stifarm devices check phone."""


def broken(text: str, width: int) -> list[str]:
    """Lines of ``width`` cells; a word or command that is longer has one of its own, and the terminal breaks
    it. A text of blanks is one empty line."""
    lines: list[str] = []
    for piece in pieces(text):
        if lines and cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines or [""]


def pieces(text: str) -> Iterator[str]:
    """The words of a text, each command as one."""
    command: list[str] = []
    verbs = 0
    for word in _WORD.findall(text):
        if command and _goes_on(command[-1], word, verbs):
            verbs = 0 if command[-1] in _JOINS else verbs + (not _own(word))
            command.append(word)
            continue
        if command:
            yield " ".join(command)
            command = []
        if _program(word):
            command, verbs = [word], 0
        else:
            yield word
    if command:
        yield " ".join(command)


def _goes_on(last: str, word: str, verbs: int) -> bool:
    if _ENDS.search(last) or word.startswith("("):
        return False
    return last in _JOINS or last.startswith("-") or _own(word) or verbs < _VERBS


def _own(word: str) -> bool:
    return word.startswith("-") or word in _JOINS or _OWN.search(word.rstrip(".,;:)`")) is not None


def _program(word: str) -> bool:
    return _PROGRAM.fullmatch(word.lstrip("`(\"'")) is not None
