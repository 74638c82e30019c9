"""Names of the inventory are no text for any shell, and what others have on a device stays theirs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.inventory import load_inventory
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from tests.adb_side import Daemon, Server
from tests.agent_data import tiny_bundle
from tests.farm_world import write_inventory
from tests.ssh_server import SshServer

PLACE = "PLACE"
NASTY = [
    "x; touch PLACE", "$(touch PLACE)", "`touch PLACE`", "x && touch PLACE", "x | touch PLACE &", "a b  c",
    "!", "'", '"', "it's", "-rf", "--help", "*", "?[a-z]", "~", "#", "\\", "\\n", "$HOME", "%s", "ü",
    "{a,b}", ":x",
]  # fmt: skip
ALL = "-r 'it' \"$(touch PLACE)\" `touch PLACE`; touch PLACE & * \\ #ü"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.fixture(params=["ssh", "adb"])
def fields(request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path) -> str:
    """How a device of this machine is reached."""
    if request.param == "ssh":
        server = SshServer(tmp_path / "sshd")
        server.start()
        stack.callback(server.stop)
        return server.fields()
    daemon = Daemon(tmp_path / "daemon")
    stack.callback(daemon.kill)
    adb = Server(tmp_path / "server")
    stack.callback(adb.kill)
    return f'transport: adb, address: "{daemon.address}", adb_server: "{adb.address}"'


def started(stack: ExitStack, farm: Path) -> HostWorker:
    devices = load_inventory(farm / "inventory.yaml").devices
    worker = HostWorker(load_settings(environ={}, cwd=farm), devices)
    stack.callback(worker.close)
    return worker


def test_a_work_folder_has_the_name_that_was_given(fields: str, stack: ExitStack, tmp_path: Path) -> None:
    there, pwned = tmp_path / "there", tmp_path / "pwned"
    there.mkdir()
    folders = [f"{there}/{name.replace(PLACE, str(pwned))}" for name in NASTY]
    lines = [
        f"{{name: d{number}, {fields}, workdir: {json.dumps(folder, ensure_ascii=False)}}}"
        for number, folder in enumerate(folders)
    ]
    write_inventory(tmp_path, *lines)
    worker = started(stack, tmp_path)
    for number in range(len(folders)):
        assert worker.look(f"d{number}").values.get("write_problem") is None
    assert all(Path(folder).is_dir() for folder in folders)
    assert {path.name for path in there.iterdir()} == {
        Path(folder).relative_to(there).parts[0] for folder in folders
    }
    assert not pwned.exists()


def test_all_of_the_work_is_done_in_such_a_folder(fields: str, stack: ExitStack, tmp_path: Path) -> None:
    pwned = tmp_path / "pwned"
    folder = tmp_path / "there" / ALL.replace(PLACE, str(pwned))
    write_inventory(
        tmp_path, f"{{name: board, {fields}, workdir: {json.dumps(str(folder), ensure_ascii=False)}}}"
    )
    worker = started(stack, tmp_path)
    bundle = tiny_bundle(tmp_path / "bundles")
    worker.facts("board")
    worker.deploy("board", bundle)
    assert (folder / "bundles" / bundle.name).is_dir()
    worker.verify("board", bundle.name)
    assert worker.journals("board") == []
    worker.clean("board")
    assert list(folder.iterdir()) == []
    assert not pwned.exists()


# ------------------------------------------------------------------ neighbours


def stifarm(farm: Path, *argv: str) -> int:
    """The exit code of a verb."""
    options = ["--home", str(farm / "home"), "--inventory", str(farm / "inventory.yaml")]
    with pytest.raises(SystemExit) as ended:
        main([*options, *argv])
    return int(ended.value.code or 0)


def test_an_adb_server_of_another_version_keeps_all_that_its_user_has(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = shutil.which("adb")
    if system is None:
        pytest.skip("needs the system's adb (Debian: apt install adb)")
    server = Server(tmp_path / "server", program=system)
    stack.callback(server.kill)
    ours, theirs = (Daemon(tmp_path / name) for name in ("ours", "theirs"))
    for daemon in (ours, theirs):
        stack.callback(daemon.kill)

    def adb(*argv: str) -> str:
        done = subprocess.run(
            [system, *argv], env=server.environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout

    adb("connect", theirs.address)
    adb("-s", theirs.address, "forward", "tcp:0", "tcp:9")
    before = adb("forward", "--list")
    assert theirs.address in before
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
    write_inventory(
        tmp_path,
        f'{{name: phone, transport: adb, address: "{ours.address}", threads: 1, workdir: {tmp_path}/there}}',
    )
    pid = server.pid
    stifarm(tmp_path, "doctor")
    bundle = tiny_bundle(tmp_path / "bundles")
    worker = started(stack, tmp_path)
    worker.look("phone")
    worker.facts("phone")
    assert worker.deploy("phone", bundle)[0].chunks_sent > 0
    worker.clean("phone")
    assert server.running()
    assert server.pid == pid
    assert adb("forward", "--list") == before
    listed = adb("devices").split()
    assert listed[listed.index(theirs.address) + 1] == "device"


def test_a_users_session_on_a_board_stays_open(stack: ExitStack, tmp_path: Path) -> None:
    program = shutil.which("ssh")
    if program is None:
        pytest.skip("needs ssh (Debian: apt install openssh-client)")
    server = SshServer(tmp_path / "sshd")
    server.start()
    stack.callback(server.stop)
    options = [f"UserKnownHostsFile={server.known_hosts}", "BatchMode=yes", "IdentitiesOnly=yes"]
    session = subprocess.Popen(
        [program, "-F", "none", "-p", str(server.port), "-i", str(server.key)]
        + [word for option in options for word in ("-o", option)]
        + ["127.0.0.1", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stack.callback(session.wait)
    stack.callback(session.kill)
    assert session.stdin is not None
    assert session.stdout is not None

    def answers(line: bytes) -> bool:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(line)
        session.stdin.flush()
        return session.stdout.readline() == line

    assert answers(b"before\n")
    write_inventory(tmp_path, f"{{name: board, {server.fields()}, threads: 1, workdir: {tmp_path}/there}}")
    worker = started(stack, tmp_path)
    worker.look("board")
    worker.facts("board")
    assert worker.deploy("board", tiny_bundle(tmp_path / "bundles"))[0].chunks_sent > 0
    assert answers(b"between\n")
    worker.clean("board")
    worker.close()
    assert answers(b"after\n")
