"""Start a command detached: ``python -I -S detach.py LOG ARGV…`` prints the new process id.

Run as a program of its own so that the started process is nobody's child on the host side: it leaves no
zombie there and dies with none of the host's processes. Uses the standard library only.
"""

import os
import sys


def main(log: str, argv: list[str]) -> int:
    """Fork, make a session, point the standard streams at ``log``, exec. Exit 127: exec failed."""
    stdin = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    reader, writer = os.pipe()  # close-on-exec: end of file without a word means that exec succeeded
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for target, source in ((0, stdin), (1, output), (2, output)):
                os.dup2(source, target)
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(writer, str(error.strerror).encode())
        finally:
            os._exit(127)
    os.close(writer)
    failure = os.read(reader, 4096)
    if failure:
        os.waitpid(child, 0)
        os.write(2, failure)
        return 127
    os.write(1, f"{child}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
