r"""What an ssh board is told to execute, as text: pure functions. The board needs a POSIX sh, no more.

The login shell, whichever it is, gets a constant command with nothing in it to expand: an ``sh`` that reads
one line and executes it. That line (``command_line``) makes the command a process group of its own, says so
on both outputs in a line with a token that nobody else knows, waits for a line (by then the warden knows the
group: no command outlives its link), and then *becomes* the command, so that the ssh server itself reports
the command's exit code or signal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LAUNCH = "exec sh -c 'IFS= read -r line && eval \"$line\"'"
"""For the login shell."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# A server's child leads a group already (OpenSSH), or is made to. Without setsid there is none: the command's
# processes are then known by a variable in their environment. bash, but for execfail, exits without its trap.
_LINE = (
    r"nl=$(printf '\nx'); nl=${nl%x}; read -r _ _ _ _ group _ </proc/$$/stat; "
    'if [ "$group" != $$ ]; then command -v setsid >/dev/null && exec setsid sh -c "$line"; '
    "group=0; export STIFARM_RUN={token}; fi; "
    "echo; echo {token} $group; echo {token} >&2; read -r _ || exit 1; {exports}"
    "shopt -s execfail 2>/dev/null; trap 'code=$?; [ $code -lt 126 ] || echo {token} $code >&2' EXIT; "
    "exec {argv}{redirect}; "
    "code=$?; trap - EXIT; echo {token} $code >&2; exit $code"
)

WARDEN = """groups=
end() {
  if [ "$1" != 0 ]; then kill -9 "-$1" 2>/dev/null; return; fi
  for file in $(grep -ls "STIFARM_RUN=$2" /proc/[0-9]*/environ); do
    pid=${file#/proc/}; kill -9 "${pid%/environ}" 2>/dev/null
  done
}
echo; echo WARDEN-READY
while read -r verb group token; do
  if [ "$verb" = watch ]; then groups="$groups $group:$token"; continue; fi
  end "$group" "$token"
  rest=
  for each in $groups; do [ "$each" = "$group:$token" ] || rest="$rest $each"; done
  groups=$rest
  echo "$token"
done
for each in $groups; do end "${each%:*}" "${each#*:}"; done
"""
"""A process for the length of the connection: it ends what commands leave behind and, at the end of the link,
the commands themselves. Reads "watch GROUP TOKEN" and "end GROUP TOKEN", answers "end" with TOKEN."""

WARDEN_READY = b"WARDEN-READY"

REBOOT = (
    'for by in "" "sudo -n"; do\n'
    "  if command -v systemctl >/dev/null 2>&1; then $by systemctl reboot && exit 0; fi\n"
    "  $by reboot && exit 0\n"
    "done 2>&1\n"
    "exit 1"
)
"""Restarts the board: as this user where polkit permits it, else by sudo without a password."""

# Until it executes the command, a process's command line has the word in it, or is just being replaced.
DETACH = """log=$1 folder=$2; shift 2
unset STIFARM_RUN
[ -z "$folder" ] || mkdir -p -- "$folder" || exit 125
true >>"$log" || exit 125
failed=
trap 'failed=1' USR1
become=': STIFARM_LAUNCH; log=$1; shift
trap "[ \\$? -lt 126 ] || kill -USR1 $0" EXIT; shopt -s execfail 2>/dev/null
exec "$@" </dev/null >>"$log" 2>&1
code=$?; trap - EXIT; kill -USR1 $0; exit $code'
if command -v setsid >/dev/null; then setsid sh -c "$become" $$ "$log" "$@" </dev/null >/dev/null 2>&1 &
else (trap '' HUP; exec sh -c "$become" $$ "$log" "$@" </dev/null >/dev/null 2>&1) & fi
pid=$!
while [ -z "$failed" ] && read -r _ _ state _ <"/proc/$pid/stat" && [ "$state" != Z ]; do
  said=$(cat "/proc/$pid/cmdline")
  case $said in '' | *STIFARM_LAUNCH*) ;; *) break ;; esac
done 2>/dev/null
if [ -n "$failed" ]; then wait "$pid"; exit $?; fi
echo "$pid"
"""
"""Arguments: the log, its folder, the command. Prints the new process's id once it has become the command."""

_NOT_RUN = {127: "No such file or directory", 126: "Permission denied, or not a program for this machine"}


def quoted(text: str) -> bytes:
    """One word of a POSIX shell, on one line (``nl`` is a variable that holds a newline).

    Raises: ValueError for text that no argument can hold.
    """
    if "\0" in text:
        raise ValueError("a NUL byte cannot be in an argument")
    inner = text.replace("'", r"'\''").replace("\n", "'\"$nl\"'")
    return f"'{inner}'".encode(errors="surrogateescape")


def command_line(argv: Sequence[str], env: Mapping[str, str], token: str, *, has_input: bool) -> bytes:
    """The line for ``LAUNCH``'s sh. Raises: ValueError for what cannot be passed."""
    if not argv or not argv[0] or argv[0].startswith("-"):
        raise ValueError("that is no name of a command")
    exports = b""
    for name, value in env.items():
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a variable")
        exports += b"export " + name.encode() + b"=" + quoted(value) + b"; "
    parts = {
        b"{token}": token.encode(),
        b"{exports}": exports,
        b"{argv}": b" ".join(map(quoted, argv)),
        b"{redirect}": b"" if has_input else b" </dev/null",
    }
    pattern = re.compile(b"|".join(map(re.escape, parts)))
    line = pattern.sub(lambda found: parts[found[0]], _LINE.encode())
    return line + b"\n"


def not_run(stderr: bytes, exit_code: int, token: str) -> str | None:
    """Why a command was never executed; None when it was."""
    said = f"{token} {exit_code}\n".encode()
    if exit_code == 0 or not stderr.endswith(said):
        return None
    return _NOT_RUN.get(exit_code) or stderr[: -len(said)].decode(errors="replace").strip()[-200:]


def not_started(exit_code: int) -> str | None:
    """Why ``DETACH`` could not execute the command; None for another failure of it."""
    return _NOT_RUN.get(exit_code)
