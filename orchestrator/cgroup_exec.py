"""Run a command inside control groups: ``python -I -S cgroup_exec.py PROCS_FILE… -- ARGV…``.

The process enters each group itself, before the exec, so that no instant of the command runs outside.
Exit 126: a group could not be entered; 127: the command could not be run. Uses the standard library only.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Write our own process id into each file, then become the command."""
    split = arguments.index("--")
    for procs in arguments[:split]:
        try:
            with open(procs, "w") as stream:  # noqa: PTH123 - pathlib would cost start-up time
                stream.write(str(os.getpid()))
        except OSError as error:
            os.write(2, f"cannot enter the control group of {procs}: {error.strerror}\n".encode())
            return 126
    try:
        os.execvp(arguments[split + 1], arguments[split + 1 :])
    except OSError as error:
        os.write(2, f"cannot run {arguments[split + 1]}: {error.strerror}\n".encode())
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
