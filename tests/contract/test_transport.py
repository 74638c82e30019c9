"""One body over every transport: what orchestrator/transports/base.py promises.

What a device may lack is not used: commands need ``sh`` and what both toybox and coreutils have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

from orchestrator.device_facts.seen import look
from orchestrator.errors import CommandTimeoutError, DeviceError, MissingFileError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.transports import connect
from orchestrator.transports.base import Transport
from tests.contract.transport_worlds import WORLDS, World, make_world

NASTY = ["a b", "$HOME", "*", "'", '"', "a;b", "`x`", "", "ü 漢", "\n", "-n", "\\", "a\n\nb ", "{x,y}", "~"]


@pytest.fixture(scope="session", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with make_world(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture
def transport(world: World) -> Iterator[Transport]:
    opened = connect(parse_inventory(world.inventory_text.encode(), Path("inventory.yaml")).devices[0])
    yield opened
    opened.close()


@pytest.fixture
def there(world: World) -> PurePosixPath:
    """A new folder on the device."""
    return world.new_folder()


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


# ------------------------------------------------------------------ run


def test_run_returns_exit_code_and_both_outputs(transport: Transport) -> None:
    done = transport.run(["sh", "-c", "echo out; echo err >&2; exit 7"], timeout_s=300)
    assert (done.exit_code, done.stdout, done.stderr, done.truncated) == (7, b"out\n", b"err\n", False)
    assert not done.ok
    assert done.error_text() == "err"
    assert done.argv == ("sh", "-c", "echo out; echo err >&2; exit 7")


def test_a_device_has_answered_once_a_command_has_ended(transport: Transport) -> None:
    assert not transport.answered
    transport.run(["sh", "-c", "exit 1"], timeout_s=300)
    assert transport.answered


def test_exit_codes_arrive_exactly(transport: Transport) -> None:
    codes = list(range(256))

    def exit_code(code: int) -> int:
        return transport.run(["sh", "-c", f"exit {code}"], timeout_s=300).exit_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(exit_code, codes)) == codes


@pytest.mark.parametrize("signal_number", [9, 15, 6])
def test_a_command_killed_by_a_signal_has_a_negative_exit_code(
    transport: Transport, signal_number: int
) -> None:
    # Not the shell is killed, which may catch signals, but what it becomes.
    script = (
        'echo before; (until read -r _ name _ </proc/$$/stat && [ "$name" = "(sleep)" ]; do :; done;'
        f" exec kill -{signal_number} $$) & exec sleep 600"
    )
    done = transport.run(["sh", "-c", script], timeout_s=300)
    assert (done.exit_code, done.stdout) == (-signal_number, b"before\n")


def test_a_command_that_catches_a_signal_has_the_exit_code_that_it_chose(transport: Transport) -> None:
    done = transport.run(["sh", "-c", "trap 'exit 143' TERM; kill -15 $$; sleep 600"], timeout_s=300)
    assert done.exit_code == 143


def test_run_passes_arguments_untouched_and_adds_the_environment(transport: Transport) -> None:
    script = r'for each in "$@" "$MARK" "${PATH:+set}"; do printf "%s\0" "$each"; done'
    done = transport.run(["sh", "-c", script, "sh", *NASTY], timeout_s=300, env={"MARK": "x 'y'\n$z"})
    assert done.stdout.decode().split("\0") == [*NASTY, "x 'y'\n$z", "set", ""]


def test_the_name_of_a_command_is_no_text_for_a_shell(transport: Transport, there: PurePosixPath) -> None:
    for name in ("exit 3", "true; exit 3", "$(exit 3)", "a=b", "\n", "-v"):
        with pytest.raises(StableError, match="under-test"):
            transport.run([name], timeout_s=300)


def test_commands_do_not_inherit_the_hosts_secrets_or_thread_settings(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    listed = transport.run(["env"], timeout_s=300)
    assert listed.ok
    assert b"PATH=" in listed.stdout
    assert b"RAY_" not in listed.stdout
    assert b"OMP_" not in listed.stdout


def test_outputs_of_100_kb_and_binary_ones_arrive_whole(transport: Transport, there: PurePosixPath) -> None:
    script = 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo "$1$i"; echo "$1$i" >&2; done'
    done = transport.run(["sh", "-c", script, "sh", "x" * 100], timeout_s=300)
    expected = b"".join(b"x" * 100 + b"%d\n" % number for number in range(1, 1001))
    assert (done.stdout, done.stderr, done.truncated) == (expected, expected, False)
    every = "".join(f"\\{number:03o}" for number in range(256))
    done = transport.run(["sh", "-c", 'printf "$1"; printf "$1" >&2', "sh", every], timeout_s=300)
    assert (done.stdout, done.stderr) == (bytes(range(256)), bytes(range(256)))


def test_run_feeds_its_input_block_by_block(transport: Transport) -> None:
    blocks = [b"first\n", b"", os.urandom(1 << 20), b"last"]
    script = 'read -r line; echo "$line"; cat | wc -c'  # the shell takes no more than a line, as head may
    counted = transport.run(["sh", "-c", script], timeout_s=300, stdin=iter(blocks))
    assert counted.stdout.split() == [b"first", str((1 << 20) + 4).encode()]


def test_a_file_of_input_is_gone_once_the_command_has_it(
    world: World, transport: Transport, there: PurePosixPath
) -> None:
    file = str(there / "in put")
    done = transport.run(
        ["sh", "-c", 'cat; ls "$1"', "sh", str(there)], timeout_s=300, stdin=[b"x"], stdin_file=file
    )
    assert done.stdout == b"x"
    with pytest.raises(StableError):
        transport.run(["/no/such/program"], timeout_s=300, stdin=[b"x"], stdin_file=file)
    assert list(world.seen(there).iterdir()) == []


def test_a_command_without_input_sees_its_end(transport: Transport) -> None:
    assert transport.run(["cat"], timeout_s=300).stdout == b""
    assert transport.run(["cat"], timeout_s=300, stdin=[]).stdout == b""


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
    script = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2"
    done = transport.run(["sh", "-c", script], timeout_s=300, output_cap_bytes=1000)
    assert (done.stdout, done.stderr, done.truncated) == (bytes(1000), bytes(1000), True)
    assert done.exit_code == 0


def test_run_kills_the_whole_group_at_its_timeout(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    pids = world.seen(there / "pids")
    script = 'sleep 600 & echo $$ $! > "$1.new"; mv "$1.new" "$1"; sleep 600'
    began = time.monotonic()
    for limit_s in (1, 4, 16, 128):  # enough for this machine to start both
        with pytest.raises(CommandTimeoutError, match=rf"(?s)under-test: .* did not end within {limit_s} s"):
            transport.run(["sh", "-c", script, "sh", str(there / "pids")], timeout_s=limit_s)
        if pids.exists():
            break
    assert time.monotonic() - began < 600, "it waited for the command's own end"
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not world.alive(pid))  # type: ignore[misc]


def test_run_leaves_no_background_process_and_does_not_wait_for_it(
    transport: Transport, world: World
) -> None:
    began = time.monotonic()
    done = transport.run(["sh", "-c", "sleep 600 & echo $!"], timeout_s=120)
    assert time.monotonic() - began < 600, "it waited for what the command left behind"
    assert done.exit_code == 0
    wait_for(lambda: not world.alive(int(done.stdout)))


def test_a_command_that_is_not_there_is_a_stable_error(transport: Transport, there: PurePosixPath) -> None:
    for name in ("/no/such/program", "no-such-program", str(there)):
        with pytest.raises(StableError, match=f"under-test: {name} cannot be run"):
            transport.run([name], timeout_s=300)
    assert transport.run(["sh", "-c", "exit 127"], timeout_s=300).exit_code == 127


# ------------------------------------------------------------------ files


def test_push_and_pull_round_trip_with_progress(
    transport: Transport, there: PurePosixPath, tmp_path: Path
) -> None:
    content = os.urandom(3_000_001)
    source = tmp_path / "source"
    source.write_bytes(content)
    remote = str(there / "deep er/ü/file.bin")
    seen: list[tuple[int, int]] = []
    transport.push(source, remote, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(content), len(content))
    assert seen == sorted(seen)
    back = tmp_path / "host/deep/back.bin"
    pulled: list[tuple[int, int]] = []
    transport.pull(remote, back, progress=lambda done, total: pulled.append((done, total)))
    assert back.read_bytes() == content
    assert pulled[-1] == (len(content), len(content))
    assert pulled == sorted(pulled)
    assert transport.read_from(remote, 0, 10) == content[:10]
    assert transport.read_from(remote, 1_999_999, 70_000) == content[1_999_999:2_069_999]


@pytest.mark.parametrize("content", [b"", b"\r\n\n\r\x00\xff\x1a\x04" * 100, bytes(1 << 20)])
def test_any_file_travels(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "source").write_bytes(content)
    transport.push(tmp_path / "source", str(there / "file"))
    assert world.seen(there / "file").read_bytes() == content
    assert transport.read_from(str(there / "file"), 0, len(content) + 10) == content
    transport.pull(str(there / "file"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_file_names_are_no_text_for_a_shell(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    for name in ("a b", "$HOME", "'", '"', "a;b", "`x`", "new\nline", "-n", "a,0644", "*"):
        transport.push(tmp_path / "source", str(there / name))
        assert transport.read_from(str(there / name), 0, 9) == b"x"
        transport.pull(str(there / name), tmp_path / "back")
    assert len(list(world.seen(there).iterdir())) == 10


def test_push_replaces_a_file_as_a_whole(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path
) -> None:
    old, new, remote = tmp_path / "old", tmp_path / "new", there / "device/file"
    old.write_bytes(b"old" * 1000)
    new.write_bytes(b"new" * 2_000_000)
    transport.push(old, str(remote))
    seen: set[bytes] = set()
    transport.push(new, str(remote), progress=lambda *_: seen.add(world.seen(remote).read_bytes()[:3]))
    assert seen == {b"old"}
    assert world.seen(remote).read_bytes() == new.read_bytes()


def test_a_failed_push_leaves_the_old_file_and_no_rest(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path
) -> None:
    source, remote = tmp_path / "source", there / "file"
    source.write_bytes(b"x" * 3_000_000)
    world.seen(remote).write_bytes(b"old")

    class CutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        raise CutError

    with pytest.raises(CutError):
        transport.push(source, str(remote), progress=cut)

    def there_now() -> list[str]:
        names = [path.name for path in world.seen(there).iterdir()]
        return [name for name in names if not (world.keeps_partial and name.startswith("."))]

    wait_for(lambda: there_now() == ["file"])  # a daemon removes what it has begun once it sees the end
    assert world.seen(remote).read_bytes() == b"old"


def test_push_of_a_missing_file_and_to_an_impossible_place(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path
) -> None:
    with pytest.raises(StableError, match="on the host does not exist"):
        transport.push(tmp_path / "nothing", str(there / "file"))
    (tmp_path / "source").write_bytes(b"x")
    world.seen(there / "file").write_bytes(b"old")
    with pytest.raises(StableError, match="under-test"):
        transport.push(tmp_path / "source", str(there / "file/below"))
    world.seen(there / "folder").mkdir()
    with pytest.raises(StableError, match="under-test"):
        transport.push(tmp_path / "source", str(there / "folder"))
    assert list(world.seen(there / "folder").iterdir()) == []


def test_pull_of_a_missing_file(transport: Transport, there: PurePosixPath, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        transport.pull(str(there / "nothing"), tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_pull_replaces_a_file_as_a_whole(
    transport: Transport, world: World, there: PurePosixPath, tmp_path: Path
) -> None:
    world.seen(there / "file").write_bytes(b"x" * 3_000_000)
    (tmp_path / "back").write_bytes(b"old")

    class CutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        raise CutError

    with pytest.raises(CutError):
        transport.pull(str(there / "file"), tmp_path / "back", progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    assert (tmp_path / "back").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("offset", "limit", "expected"),
    [(0, 4, b"0123"), (4, 100, b"456789"), (10, 5, b""), (500, 5, b""), (9, 1, b"9"), (0, 0, b"")],
)
def test_read_from(
    transport: Transport, world: World, there: PurePosixPath, offset: int, limit: int, expected: bytes
) -> None:
    world.seen(there / "file").write_bytes(b"0123456789")
    assert transport.read_from(str(there / "file"), offset, limit) == expected


def test_read_from_a_growing_file_sees_what_is_added(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    path, whole, offset = world.seen(there / "journal"), b"", 0
    path.write_bytes(b"")
    for size in (0, 1, 4095, 70_000, 0, 200_000, 1):
        block = os.urandom(size)
        with path.open("ab") as stream:
            stream.write(block)
        whole += block
        read = transport.read_from(str(there / "journal"), offset, 1 << 20)
        assert read == block
        offset += len(read)
    assert transport.read_from(str(there / "journal"), 0, 1 << 20) == whole


def test_read_from_a_file_of_the_kernel_that_states_no_size(transport: Transport) -> None:
    read = transport.read_from("/proc/version", 0, 4096)
    assert read.startswith(b"Linux version")
    assert transport.read_from("/proc/version", 6, 7) == b"version"


def test_read_from_a_missing_file_and_a_folder(transport: Transport, there: PurePosixPath) -> None:
    with pytest.raises(MissingFileError):
        transport.read_from(str(there / "nothing"), 0, 1)
    with pytest.raises(MissingFileError):
        transport.read_from(str(there / "nothing"), 1 << 20, 1)
    with pytest.raises(MissingFileError):
        transport.read_from("/proc/2147483647/stat", 0, 4096)
    with pytest.raises(DeviceError, match="under-test") as raised:
        transport.read_from(str(there), 0, 1)
    assert not isinstance(raised.value, MissingFileError)


# ------------------------------------------------------------------ detached


def test_a_detached_process_has_a_session_and_a_log_of_its_own(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    log = there / "deep/agent.log"
    script = 'cat; echo "$MARK"; echo err >&2; exec sleep 600'
    pid = transport.start_detached(["sh", "-c", script], log=str(log), env={"MARK": "m 'n'"})
    try:
        wait_for(lambda: world.seen(log).exists() and world.seen(log).read_bytes().endswith(b"err\n"))
        assert world.seen(log).read_bytes() == b"m 'n'\nerr\n"
        assert world.alive(pid)
        assert world.session(pid) == pid
    finally:
        world.kill(pid)
    wait_for(lambda: world.gone(pid))  # nobody of ours keeps it as a zombie


def test_a_detached_process_appends_to_its_log(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    log = world.seen(there / "log")
    for number in (1, 2):
        transport.start_detached(["echo", f"{number} *"], log=str(there / "log"))
        wait_for(lambda number=number: log.read_text().count("\n") == number)  # type: ignore[misc]
    assert log.read_text() == "1 *\n2 *\n"


def test_a_detached_command_that_is_not_there(transport: Transport, there: PurePosixPath) -> None:
    with pytest.raises(StableError, match="/no/such/program cannot be started: No such file"):
        transport.start_detached(["/no/such/program"], log=str(there / "log"))


def test_a_detached_command_that_cannot_be_executed(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    """Its log is long already."""
    broken = world.seen(there / "broken")
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    world.seen(there / "log").write_text("an old line\n" * 10_000)
    with pytest.raises(StableError, match="broken cannot be") as caught:
        transport.start_detached([str(there / "broken")], log=str(there / "log"))
    assert "an old line" not in str(caught.value)


def test_a_detached_command_whose_log_cannot_be_written(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    world.seen(there / "file").write_bytes(b"")
    with pytest.raises(StableError, match="under-test"):
        transport.start_detached(["true"], log=str(there / "file/log"))


def test_a_detached_process_outlives_the_host_process(
    world: World, transport: Transport, there: PurePosixPath
) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.inventory import parse_inventory\n"
        "from orchestrator.transports import connect\n"
        "device = parse_inventory(sys.argv[1].encode(), Path('i')).devices[0]\n"
        "print(connect(device).start_detached(['sleep', '600'], log=sys.argv[2]), flush=True)\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, world.inventory_text, str(there / "log")],
        start_new_session=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    pid = int(killed.stdout)
    try:
        transport.run(["sleep", "0.3"], timeout_s=300)
        assert world.alive(pid)
    finally:
        world.kill(pid)


# ------------------------------------------------------------------ several at once


def test_several_threads_use_one_transport(
    transport: Transport, there: PurePosixPath, tmp_path: Path
) -> None:
    answers: dict[int, bytes] = {}

    def work(number: int) -> None:
        (tmp_path / f"s{number}").write_bytes(bytes([number]) * 100_000)
        transport.push(tmp_path / f"s{number}", str(there / f"d{number}"))
        done = transport.run(["echo", str(number)], timeout_s=300)
        answers[number] = done.stdout.strip() + transport.read_from(str(there / f"d{number}"), 99_999, 9)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number).encode() + bytes([number]) for number in range(8)}


def test_a_long_command_does_not_hold_up_another(
    transport: Transport, world: World, there: PurePosixPath
) -> None:
    go = there / "go"
    script = 'while [ ! -e "$1" ]; do sleep 0.05; done; echo went'
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(transport.run, ["sh", "-c", script, "sh", str(go)], timeout_s=300)
        assert transport.run(["touch", str(go)], timeout_s=300).ok
        assert waiting.result().stdout == b"went\n"


def test_the_default_work_folder_is_absolute(transport: Transport) -> None:
    assert transport.default_workdir().startswith("/")


def test_the_host_looks_at_a_device_in_one_command(transport: Transport, there: PurePosixPath) -> None:
    seen = look(transport, str(there / "work folder"))
    assert seen.clock_offset_s is not None
    assert abs(seen.clock_offset_s) < 3600
    assert any(value is not None for value in seen.values.values())
