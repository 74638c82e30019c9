"""One body over every transport: what orchestrator/transports/base.py promises."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import CommandTimeoutError, DeviceError, MissingFileError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.transports import connect
from orchestrator.transports.base import Transport

PYTHON = sys.executable


@pytest.fixture(params=["local"])
def inventory_text(request: pytest.FixtureRequest) -> str:
    return f"version: 1\ndevices: [{{name: under-test, transport: {request.param}}}]"


@pytest.fixture
def transport(inventory_text: str) -> Iterator[Transport]:
    opened = connect(parse_inventory(inventory_text.encode(), Path("inventory.yaml")).devices[0])
    yield opened
    opened.close()


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_run_returns_exit_code_and_both_outputs(transport: Transport) -> None:
    done = transport.run(
        [PYTHON, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"], timeout_s=300
    )
    assert (done.exit_code, done.stdout, done.stderr, done.truncated) == (7, b"out\n", b"err\n", False)
    assert not done.ok
    assert done.error_text() == "err"


def test_run_passes_arguments_untouched_and_adds_the_environment(transport: Transport) -> None:
    nasty = ["a b", "$HOME", "*", "'", '"', "a;b", "`x`", "", "ü", "\n"]
    code = "import os,sys,json; print(json.dumps([sys.argv[1:], os.environ['MARK'], 'PATH' in os.environ]))"
    done = transport.run([PYTHON, "-c", code, *nasty], timeout_s=300, env={"MARK": "x y"})
    assert json.loads(done.stdout) == [nasty, "x y", True]


def test_commands_do_not_inherit_the_hosts_secrets_or_thread_settings(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "import os; print(sorted(os.environ))"
    listed = transport.run([PYTHON, "-c", code], timeout_s=300).stdout
    assert b"RAY_" not in listed
    assert b"OMP_" not in listed


def test_run_feeds_its_input_block_by_block(transport: Transport) -> None:
    blocks = [b"first\n", b"", os.urandom(1 << 20), b"last"]
    counted = transport.run(["sh", "-c", "head -c 6; wc -c"], timeout_s=300, stdin=iter(blocks))
    assert counted.stdout.split() == [b"first", str((1 << 20) + 4).encode()]


def test_a_command_need_not_read_its_input(transport: Transport) -> None:
    done = transport.run(["true"], timeout_s=300, stdin=(bytes(1 << 16) for _ in range(1000)))
    assert done.exit_code == 0


def test_a_failing_source_of_input_ends_the_command(transport: Transport) -> None:
    class SourceError(Exception):
        pass

    def source() -> Iterator[bytes]:
        yield b"half"
        raise SourceError

    with pytest.raises(SourceError):
        transport.run(["cat"], timeout_s=300, stdin=source())


def test_run_caps_both_outputs(transport: Transport) -> None:
    code = "import sys; sys.stdout.write('o' * 300000); sys.stderr.write('e' * 300000)"
    done = transport.run([PYTHON, "-c", code], timeout_s=300, output_cap_bytes=1000)
    assert (done.stdout, done.stderr, done.truncated) == (b"o" * 1000, b"e" * 1000, True)
    assert done.exit_code == 0


def test_run_kills_the_whole_group_at_its_timeout(transport: Transport, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os,subprocess,sys,time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)"
    )
    began = time.monotonic()
    for limit_s in (2, 8, 32, 128):  # enough for this machine to start both
        with pytest.raises(CommandTimeoutError, match=rf"(?s)under-test: .* did not end within {limit_s} s"):
            transport.run([PYTHON, "-c", code], timeout_s=limit_s)
        if pids.exists() and pids.read_text():
            break
    assert time.monotonic() - began < 600, "it waited for the command's own end"
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_run_leaves_no_background_process_and_does_not_wait_for_it(transport: Transport) -> None:
    code = (
        "import subprocess,sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    began = time.monotonic()
    done = transport.run([PYTHON, "-c", code], timeout_s=120)
    assert time.monotonic() - began < 600, "it waited for what the command left behind"
    wait_for(lambda: not alive(int(done.stdout)))


def test_a_command_that_is_not_there_is_a_stable_error(transport: Transport) -> None:
    with pytest.raises(StableError, match="under-test: /no/such/program"):
        transport.run(["/no/such/program"], timeout_s=5)


def test_push_and_pull_round_trip_with_progress(transport: Transport, tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    source = tmp_path / "source"
    source.write_bytes(content)
    remote = str(tmp_path / "device/deep er/file.bin")
    seen: list[tuple[int, int]] = []
    transport.push(source, remote, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(content), len(content))
    assert seen == sorted(seen)
    back = tmp_path / "host/deep/back.bin"
    transport.pull(remote, back)
    assert back.read_bytes() == content
    assert transport.read_from(remote, 0, 10) == content[:10]


def test_an_empty_file_travels(transport: Transport, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    transport.push(tmp_path / "empty", str(tmp_path / "there"))
    assert transport.read_from(str(tmp_path / "there"), 0, 10) == b""


def test_push_replaces_a_file_as_a_whole(transport: Transport, tmp_path: Path) -> None:
    old, new, remote = tmp_path / "old", tmp_path / "new", tmp_path / "device/file"
    old.write_bytes(b"old" * 1000)
    new.write_bytes(b"new" * 2_000_000)
    transport.push(old, str(remote))
    seen: set[bytes] = set()
    transport.push(new, str(remote), progress=lambda *_: seen.add(remote.read_bytes()[:3]))
    assert seen == {b"old"}
    assert remote.read_bytes() == new.read_bytes()


def test_a_failed_push_leaves_the_old_file_and_no_rest(transport: Transport, tmp_path: Path) -> None:
    source, remote = tmp_path / "source", tmp_path / "device/file"
    source.write_bytes(b"x" * 3_000_000)
    remote.parent.mkdir()
    remote.write_bytes(b"old")

    class CutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        raise CutError

    with pytest.raises(CutError):
        transport.push(source, str(remote), progress=cut)
    assert [path.name for path in remote.parent.iterdir()] == ["file"]
    assert remote.read_bytes() == b"old"


def test_push_of_a_missing_file_and_to_an_impossible_place(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(StableError, match="on the host does not exist"):
        transport.push(tmp_path / "nothing", str(tmp_path / "there"))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StableError, match="under-test"):
        transport.push(tmp_path / "file", str(tmp_path / "file/below"))


def test_pull_of_a_missing_file(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        transport.pull(str(tmp_path / "nothing"), tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("offset", "limit", "expected"),
    [(0, 4, b"0123"), (4, 100, b"456789"), (10, 5, b""), (500, 5, b""), (9, 1, b"9"), (0, 0, b"")],
)
def test_read_from(transport: Transport, tmp_path: Path, offset: int, limit: int, expected: bytes) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert transport.read_from(str(tmp_path / "file"), offset, limit) == expected


def test_read_from_a_missing_file_and_a_folder(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        transport.read_from(str(tmp_path / "nothing"), 0, 1)
    with pytest.raises(DeviceError, match="under-test"):
        transport.read_from(str(tmp_path), 0, 1)


def test_a_detached_process_has_a_session_and_a_log_of_its_own(transport: Transport, tmp_path: Path) -> None:
    log = tmp_path / "deep/agent.log"
    code = (
        "import os,sys,time\n"
        "print(os.getsid(0), sys.stdin.read(), os.environ['MARK'], flush=True)\n"
        "time.sleep(600)"
    )
    pid = transport.start_detached([PYTHON, "-c", code], log=str(log), env={"MARK": "m"})
    try:
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
        assert log.read_text().split() == [str(pid), "m"]
        assert alive(pid)
    finally:
        os.kill(pid, 9)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())  # nobody of ours keeps it as a zombie


def test_a_detached_process_appends_to_its_log(transport: Transport, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for number in (1, 2):
        transport.start_detached([PYTHON, "-c", f"print({number})"], log=str(log))
        wait_for(lambda number=number: len(log.read_text().split()) == number)  # type: ignore[misc]
    assert log.read_text().split() == ["1", "2"]


def test_a_detached_command_that_is_not_there(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(StableError, match="/no/such/program cannot be started: No such file"):
        transport.start_detached(["/no/such/program"], log=str(tmp_path / "log"))


def test_a_detached_process_outlives_the_host_process(
    transport: Transport, inventory_text: str, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.inventory import parse_inventory\n"
        "from orchestrator.transports import connect\n"
        "device = parse_inventory(sys.argv[1].encode(), Path('i')).devices[0]\n"
        "pid = connect(device).start_detached([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " log=sys.argv[2])\n"
        "print(pid, flush=True)\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    log = str(tmp_path / "log")
    killed = transport.run([PYTHON, "-c", script, inventory_text, log], timeout_s=300)
    assert killed.exit_code == -9, killed.error_text()
    pid = int(killed.stdout)
    try:
        time.sleep(0.3)
        assert alive(pid)
    finally:
        os.kill(pid, 9)


def test_several_threads_use_one_transport(transport: Transport, tmp_path: Path) -> None:
    answers: dict[int, bytes] = {}

    def work(number: int) -> None:
        (tmp_path / f"s{number}").write_bytes(bytes([number]) * 100_000)
        transport.push(tmp_path / f"s{number}", str(tmp_path / f"d{number}"))
        done = transport.run([PYTHON, "-c", f"print({number})"], timeout_s=300)
        answers[number] = done.stdout.strip() + transport.read_from(str(tmp_path / f"d{number}"), 99_999, 9)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number).encode() + bytes([number]) for number in range(4)}
