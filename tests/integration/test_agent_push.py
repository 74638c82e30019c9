"""The native agent's way to a device: the right one, whole, once; what is broken there is mended or named."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from orchestrator.agent_push import MACHINES, bring_agent, device_architecture, remove_others
from orchestrator.errors import DeviceError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.settings import load_settings
from orchestrator.toolchain import ARCHITECTURES, build_agent
from orchestrator.transports.base import Completed
from orchestrator.transports.fake import FakeTransport
from orchestrator.transports.local import LocalTransport
from orchestrator.worker import HostWorker
from sti_runtime.journal_format import PROTOCOL_VERSION
from tests.agents import QEMU

HERE = MACHINES.get(platform.machine())
pytestmark = pytest.mark.skipif(HERE is None, reason="there is no native agent for this machine")


def executables(spool: Path) -> list[str]:
    return sorted(path.name for path in (spool / "bin").iterdir())


def written(path: Path) -> tuple[int, int, int]:
    """Which file it is and when it changed; running it changes the time of its last reading only."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def test_it_is_pushed_once_and_states_its_digest(tmp_path: Path) -> None:
    assert HERE is not None
    transport = LocalTransport("desk")
    first = bring_agent(transport, str(tmp_path))
    assert (first.architecture, first.already) == (HERE, False)
    assert first.digest == hashlib.sha256(build_agent(HERE).read_bytes()).hexdigest()
    assert Path(first.path).read_bytes() == build_agent(HERE).read_bytes()
    stamp = written(Path(first.path))
    again = bring_agent(transport, str(tmp_path))
    assert again.already
    assert written(Path(again.path)) == stamp
    assert executables(tmp_path) == [Path(first.path).name]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no-permission", "other"])
def test_what_is_broken_there_is_replaced(tmp_path: Path, damage: str) -> None:
    transport = LocalTransport("desk")
    path = Path(bring_agent(transport, str(tmp_path)).path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("#!/bin/sh\necho hello\n")
    elif damage == "other":
        path.write_text('#!/bin/sh\necho \'{"agent_digest":"0","protocol":1}\'\n')
    else:
        path.write_bytes(whole)
    path.chmod(0o644 if damage == "no-permission" else 0o755)
    assert not bring_agent(transport, str(tmp_path)).already
    assert path.read_bytes() == whole
    assert executables(tmp_path) == [path.name]


def test_other_agents_are_removed_not_before_it_is_asked_for_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    names = {"stifarm-agent-0123456789abcdef", "stifarm-agent-0.partial", "mine"}
    for name in names:
        (tmp_path / "bin" / name).touch()
    path = bring_agent(LocalTransport("desk"), str(tmp_path)).path
    assert set(executables(tmp_path)) == {*names, Path(path).name}
    remove_others(LocalTransport("desk"), path)
    assert executables(tmp_path) == ["mine", Path(path).name]


class Machine:
    """A device that says it is another machine and runs what is pushed to it under an emulator."""

    def __init__(self, root: Path, machine: str, prefix: tuple[str, ...] = ()) -> None:
        self.root, self.machine, self.prefix = root, machine, prefix

    def __call__(self, argv: tuple[str, ...], env: Mapping[str, str]) -> Completed:
        if argv[0] == "uname":
            return Completed(argv, 0, f"{self.machine}\n".encode(), b"", False)
        moved = [str(self.root / word.lstrip("/")) if word.startswith("/spool") else word for word in argv]
        if argv[0].startswith("/spool"):
            if not Path(moved[0]).exists():
                raise StableError(f"{argv[0]} cannot be run: no such file.", device="phone")
            moved = [*self.prefix, *moved]
        try:
            done = subprocess.run(moved, capture_output=True, check=False)
        except OSError as error:
            raise StableError(f"{argv[0]} cannot be run: {error.strerror}.", device="phone") from error
        return Completed(argv, done.returncode, done.stdout, done.stderr, False)


@pytest.mark.parametrize(
    ("machine", "architecture"), [("aarch64", "aarch64"), ("armv7l", "armv7"), ("armv8l", "armv7")]
)
def test_a_phone_gets_its_own_architecture(
    tmp_path: Path, machine: str, architecture: str, which: Callable[[str], str]
) -> None:
    prefix = () if architecture == HERE else (which(QEMU[architecture]),)
    transport = FakeTransport(tmp_path, Machine(tmp_path, machine, prefix), device="phone")
    agent = bring_agent(transport, "/spool")
    assert (agent.architecture, agent.already) == (architecture, False)
    assert transport.path(agent.path).read_bytes() == build_agent(architecture).read_bytes()
    assert bring_agent(transport, "/spool").already


@pytest.fixture
def which() -> Callable[[str], str]:
    """The path of a program, or a skip."""
    import shutil

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed (Debian package qemu-user)")
        return found

    return find


def test_a_wrong_architecture_is_named_after_two_tries(tmp_path: Path) -> None:
    """The machine says one thing and is another: what is pushed cannot be executed."""
    other = next(name for name in ("aarch64", "x86_64") if name != HERE)
    transport = FakeTransport(tmp_path, Machine(tmp_path, other), device="phone")
    if (
        subprocess.run(["sh", "-c", str(build_agent(other)) + " version"], capture_output=True).returncode
        == 0
    ):
        pytest.skip(f"this kernel runs {other} executables by itself (binfmt_misc)")
    with pytest.raises(StableError, match=rf"phone: the agent for {other} was sent twice .*Exec format"):
        bring_agent(transport, "/spool")
    pushes = [argv for argv in transport.commands if argv[0] == "chmod"]
    assert len(pushes) == 2


@pytest.mark.parametrize("machine", ["riscv64", "", "i686"])
def test_an_unknown_machine_is_told_what_there_is(tmp_path: Path, machine: str) -> None:
    transport = FakeTransport(tmp_path, Machine(tmp_path, machine), device="phone")
    with pytest.raises(StableError) as caught:
        device_architecture(transport)
    assert (machine or "unknown") in caught.value.what
    assert all(name in caught.value.remedy for name in ARCHITECTURES)
    assert "engine: torch" in caught.value.remedy


def test_an_agent_of_another_protocol_is_refused(tmp_path: Path) -> None:
    digest = hashlib.sha256(build_agent(HERE or "").read_bytes()).hexdigest()

    def handler(argv: tuple[str, ...], env: Mapping[str, str]) -> Completed:
        said = platform.machine() if argv[0] == "uname" else f'{{"agent_digest":"{digest}","protocol":7}}'
        return Completed(argv, 0, said.encode(), b"", False)

    with pytest.raises(StableError, match=f"protocol 7, this stifarm {PROTOCOL_VERSION}"):
        bring_agent(FakeTransport(tmp_path, handler), "/spool")


def test_storage_that_forbids_execution_is_named(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "noexec,size=4m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs root: mounts a tmpfs")
    try:
        with pytest.raises(StableError, match=r"Permission denied.*noexec"):
            bring_agent(LocalTransport("desk"), str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_worker_mends_an_agent_between_two_calls(tmp_path: Path) -> None:
    text = b"version: 1\ndevices: [{name: desk, transport: local, workdir: work}]"
    devices = parse_inventory(text, tmp_path / "inventory.yaml").devices
    worker = HostWorker(load_settings(environ={}, cwd=tmp_path), devices)
    facts = worker.facts("desk")
    assert facts.engines == ("native", "native-int8")
    assert worker.architecture("desk") == HERE
    (path,) = (tmp_path / "work/bin").iterdir()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts.agent_digest
    path.unlink()
    path.write_bytes(b"\x7fELF")
    assert worker.facts("desk").agent_digest == facts.agent_digest
    worker.clean("desk")
    assert list((tmp_path / "work").iterdir()) == []
    assert worker.facts("desk").agent_digest == facts.agent_digest
    worker.close()


def test_a_failing_build_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"desk: its agent cannot be built.*XDG_CACHE_HOME"):
        bring_agent(LocalTransport("desk"), str(tmp_path / "spool"))
