"""Run a program of others once it is written down: ``python -I -S gate.py -- ARGV…``. See ``launch``.

Says ``here``, waits for a line on its input (end of file: it ends), then becomes the program, whose output
goes to the log. Exit 127: it cannot be run. Uses the standard library only.
"""

import os
import sys


def main(argv: list[str]) -> int:
    """Wait, then exec."""
    os.write(1, b"here\n")
    if not sys.stdin.readline():
        return 1
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
