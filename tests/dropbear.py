"""A dropbear for tests, the ssh server of small boards: on a port of its own, without an sftp server."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from tests.ssh_server import SshServer, public_part

SFTP_SERVER = Path("/usr/lib/sftp-server")
"""What dropbear starts for sftp, where OpenSSH's is installed; the only place that it looks at."""


class Dropbear(SshServer):
    """Dropbear over ``folder``. It takes keys from the home that the system knows of the user, so in its
    view of the files (a mount namespace) that home is the test's own, and no sftp server is there."""

    title: ClassVar[str] = "dropbear"

    def _argv(self) -> list[str]:
        program = _program("dropbear")
        home = self.home
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        (home / ".ssh/authorized_keys").write_text(f"{public_part(self.key)}\n")
        keys = []
        for key in self.host_keys:
            keys += ["-r", str(key.with_suffix(".dropbear"))]
            argv = [_program("dropbearconvert"), "openssh", "dropbear", str(key), keys[-1]]
            subprocess.run(argv, check=True, capture_output=True)
        passwd, nothing = self.folder / "passwd", self.folder / "nothing"
        user = f"{getpass.getuser()}:x:{os.geteuid()}:{os.getegid()}::{home}:/bin/sh"
        passwd.write_text(f"{user}\n")
        nothing.touch(mode=0o644)
        steps = [f"mount --bind '{passwd}' /etc/passwd"]
        if SFTP_SERVER.exists():
            steps.append(f"mount --bind '{nothing}' {SFTP_SERVER.resolve()}")
        own = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        served = [program, "-F", "-E", "-m", "-s", *keys, "-p", f"127.0.0.1:{self.port}", "-P", "/dev/null"]
        script = "; ".join([*steps, 'exec "$@"'])
        return ["unshare", "--mount", *own, "sh", "-ec", script, "sh", *served]


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"needs {name} (Debian package dropbear-bin)")
    return found
