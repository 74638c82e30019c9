"""The text of a command for a device's shell, and its status in what the device answers. Pure functions.

adb takes one text for ``sh -c``. So the argv is quoted, and a few lines around it see to what adb lacks: they
say how the command ended (``status_of``), feed it nothing unless it has input, and end what it left in its
group. Every command's group is that of its ``sh``: adbd starts each in a session of its own. What is used is
built into mksh and POSIX shells alike: Android 6 (API 23), the oldest that is
supported, has little else.

A status line is ``MARK KIND NUMBER``: kind ``e`` exited, ``s`` killed by a signal (the number is 128 more),
``m`` missing, ``p`` not permitted. The two first look alike to ``$?``; but of a child killed by a signal a
shell says so in words, on its own standard error, which the lines catch apart. Of SIGINT and SIGPIPE it says
nothing: these two arrive as 130 and 141. (bash is always silent; no phone has it as ``sh``.) A command that
is a shell may catch a signal and exit by itself, as mksh does with 143 for SIGTERM: then it has exited.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STATUS_CAP_BYTES = 16

LOOK_UP = r"""case $1 in
*/*)if [ ! -e "$1" ];then w=m;elif [ -d "$1" ]||[ ! -x "$1" ];then w=p;else w=;fi;;
*)w=m;IFS=:
for d in $PATH;do if [ -x "$d/$1" ]&&[ ! -d "$d/$1" ];then w=;d=$d/$1;shift;set -- "$d" "$@";break;fi;done
unset IFS;;
esac
"""
"""Makes ``$1`` the path of a command, past what is built into the shell; ``w``: empty, or why there is none:
m (missing), p (not permitted). A name with a slash is a path already."""

_REFUSE = 'if [ "$w" ];then echo "$M $w 0";{drain}exit;fi\n'
# Input and output of a command are one socket on the device: where what is written there meets its end, adbd
# drops what it has not read of it yet, so the rest of the input is read behind the status.
_DRAIN = "cat >/dev/null;"
# "trap :" and not "trap ''": a command would inherit that a signal is ignored.
_BEGIN = "M={mark};trap : HUP\nset -- {argv}\n"
# The shell's own standard error is caught in s; redirections belong to the child, so that it keeps its words.
_RUN = 's=$(exec 2>&1;(exec >&3 2>&4 3>&- 4>&- 5<&-{stdin}{exports};exec "$@");echo ":$?")\n'
_SAY = 'case $s in :*)w=e;;*)w=s;;esac\necho "$M $w ${s##*:}"\n'
# Field 5 of proc_pid_stat(5) is the group: another's is never ended.
_END = 'read -r g </proc/$$/stat;g=${g##*) };g=${g#* * }\nif [ "${g%% *}" = $$ ];then kill -9 0;fi'

_APART = "exec 3>&1 4>&2\n"
_MERGED = """for d in "$TMPDIR" /data/local/tmp /tmp;do if [ "$d" ]&&[ -w "$d" ];then break;fi;done
exec 3>&1 4>"$d/.$M" 5<"$d/.$M";rm -f "$d/.$M"
"""
"""The file has no name any more when the command starts: a link that breaks ends the shell with SIGPIPE, and
nothing may be left then."""

_SAY_MERGED = "cat <&5\n"
_KILL = (
    "for f in $(grep -ls {patterns} /proc/[0-9]*/cmdline);do p=${{f#/proc/}};"
    'kill -9 -"${{p%/cmdline}}" 2>/dev/null;done;rm -f {rests}'
)


@dataclass(frozen=True)
class Status:
    """How a command ended: its ``exit_code`` (negative: by a signal), or why it could not be run."""

    exit_code: int
    refusal: str


def new_mark() -> str:
    """A word that no output has by chance."""
    return f"stifarm-{secrets.token_hex(8)}"


def command_script(
    argv: Sequence[str], env: Mapping[str, str], mark: str, *, stdin: str | None, merged: bool
) -> bytes:
    """The text for ``sh -c``. ``stdin``: the file to read input from, removed once it is open; empty: what
    the shell has; None: none.

    ``merged``: the connection carries one stream: standard output, the status line, then standard error,
    which waits in a file without a name until then. Raises: ValueError (a name or text that no command can
    have).
    """
    for name in env:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a variable")
    if not argv or any("\0" in text for text in (*argv, *env.values())):
        raise ValueError("an argument has a zero byte" if argv else "there is no argument")
    exports = "".join(f";{name}={shlex.quote(value)};export {name}" for name, value in env.items())
    file = shlex.quote(stdin or "")
    source = "" if stdin == "" else " </dev/null" if stdin is None else f" <{file};rm -f {file}"
    drain = _DRAIN if stdin == "" else ""
    text = (
        _BEGIN.format(mark=mark, argv=" ".join(map(shlex.quote, argv)))
        + LOOK_UP
        + _REFUSE.format(drain=drain)
        + (_MERGED if merged else _APART)
        + _RUN.format(stdin=source, exports=exports)
        + _SAY
        + drain
        + (_SAY_MERGED if merged else "")
        + _END
    )
    return text.encode("utf-8", errors="surrogateescape")


def kill_script(marks: Sequence[str]) -> bytes:
    """The text that ends the groups of commands with these marks, found by their command lines, and removes
    temporary files with these names."""
    # The brackets keep the text from matching itself: it stands in command lines, too.
    patterns = " ".join(f"-e '[s]{mark[1:]}'" for mark in marks)
    folders = ('"${TMPDIR:-/tmp}"', "/data/local/tmp", "/tmp")
    rests = " ".join(f"{folder}/.[s]{mark[1:]}" for mark in marks for folder in folders)
    return _KILL.format(patterns=patterns, rests=rests).encode()


class StatusFilter:
    """Takes the status line out of a stream. ``status`` is None until it has come."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._held = b""
        self._found = False
        self.status: Status | None = None

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What precedes the status line, and what follows it, of what has come."""
        self._held += data
        if self.status is not None:
            after, self._held = self._held, b""
            return b"", after
        before = b""
        if not self._found:
            at = self._held.find(self._mark)
            # Keep back what may be the beginning of the mark.
            cut = at if at >= 0 else max(0, len(self._held) - len(self._mark) + 1)
            before, self._held = self._held[:cut], self._held[cut:]
            self._found = at >= 0
        if self._found:
            line, end, after = self._held[len(self._mark) :].partition(b"\n")
            if end:
                self.status, self._held = status_of(line), b""
                return before, after
            if len(line) > _STATUS_CAP_BYTES:
                raise ValueError("the status of a command is no line")
        return before, b""

    def rest(self) -> bytes:
        """What was kept back, at the end of a stream without a status line."""
        held, self._held = self._held, b""
        return held


def status_of(line: bytes) -> Status:
    """A status line behind its mark. Raises: ValueError."""
    match = re.fullmatch(rb" ([esmp]) ([0-9]{1,3})", line)
    if match is None:
        raise ValueError(f"{line[:40]!r} is no status of a command")
    kind, number = match[1], int(match[2])
    if kind == b"s":
        return Status(128 - number, "")
    refusals = {b"m": "No such file or directory", b"p": "Permission denied"}
    return Status(number & 0xFF, refusals.get(kind, ""))
