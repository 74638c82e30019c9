"""A private PostgreSQL server for tests: own data folder, own socket, gone afterwards."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

UNAVAILABLE = (
    "needs PostgreSQL: set STIFARM_TEST_POSTGRES_URL to a server where its user may create databases, "
    "or install one (and, as root, have an account named postgres or nobody)"
)


def server_binaries() -> Path | None:
    """The folder of initdb and pg_ctl, from PATH or where Debian keeps them; None when absent."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


def unprivileged_user() -> str | None:
    """Whom to run the server as: ourselves, or as root (which PostgreSQL refuses) an account it accepts."""
    if os.geteuid() != 0:
        return getpass.getuser()
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@dataclass
class Server:
    """A running server. ``template``: its URL with "{database}" where the database's name goes; ``data``: its
    folder."""

    template: str
    data: Path
    stop: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def private_server(binaries: Path, user: str) -> Iterator[str]:
    """Run a server on a unix socket in a temporary folder; its URL without a database name."""
    with restartable_server(binaries, user) as server:
        yield server.template


@contextmanager
def restartable_server(binaries: Path, user: str) -> Iterator[Server]:
    """The same, which may be stopped, as by a crash, and started again."""
    # Not tmp_path: pytest's folders are closed to other users, and socket paths must be short.
    home = Path(tempfile.mkdtemp(prefix="stifarm-pg-"))
    data, log = home / "data", home / "log"
    switch: list[str] = []
    if os.geteuid() == 0:
        account = pwd.getpwnam(user)
        os.chown(home, account.pw_uid, account.pw_gid)
        switch = [
            "setpriv",
            f"--reuid={account.pw_uid}",
            f"--regid={account.pw_gid}",
            "--clear-groups",
        ]

    def run(*argv: str | Path) -> None:
        done = subprocess.run(
            [*switch, *map(str, argv)], cwd=home, text=True, capture_output=True, timeout=600, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{argv[0]} failed: {done.stdout}{done.stderr}")

    def start() -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off"
        run(binaries / "pg_ctl", "start", "-w", "-t", "300", "-D", data, "-l", log, "-o", options)

    def stop() -> None:
        run(binaries / "pg_ctl", "stop", "-m", "immediate", "-D", data)

    try:
        run(binaries / "initdb", "--auth=trust", "--username=stifarm", "--encoding=UTF8", "--no-sync", data)
        start()
        try:
            yield Server(f"postgresql://stifarm@/{{database}}?host={home}", data, stop, start)
        finally:
            if (data / "postmaster.pid").exists():
                stop()
    finally:
        shutil.rmtree(home)
