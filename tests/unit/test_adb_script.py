"""The text around a device's commands, in every shell that may be ``sh`` on a device and is here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator.transports.adb_script import Status, StatusFilter, command_script, new_mark, status_of
from orchestrator.transports.adb_server import parse_devices, server_address, split_endpoint
from orchestrator.transports.adb_socket import ServerAddress

SHELLS = (("dash",), ("mksh",), ("busybox", "ash"))
NASTY = ("a b", "$HOME", "*", "'", '"', "", "ü", "\n", "-n", "\\")


@pytest.fixture(params=SHELLS, ids=lambda shell: str(shell[0]))
def shell(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if shutil.which(request.param[0]) is None:
        pytest.skip(f"needs {request.param[0]}")
    return tuple(request.param)


def ran(shell: tuple[str, ...], argv: list[str], **env: str) -> tuple[Status | None, bytes, bytes]:
    mark = new_mark()
    script = command_script(argv, env, mark, stdin=None, merged=False)
    done = subprocess.run(
        [*shell, "-c", script], capture_output=True, start_new_session=True, timeout=300, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL)
    status = StatusFilter(mark)
    before, _ = status.feed(done.stdout)
    return status.status, before, done.stderr


@pytest.mark.parametrize("code", [0, 1, 126, 127, 128, 137, 255])
def test_an_exit_code(shell: tuple[str, ...], code: int) -> None:
    assert ran(shell, ["sh", "-c", f"echo out; echo err >&2; exit {code}"]) == (
        Status(code, ""), b"out\n", b"err\n"
    )  # fmt: skip


@pytest.mark.parametrize("number", [1, 6, 9, 11, 15])
def test_a_signal(shell: tuple[str, ...], number: int) -> None:
    assert ran(shell, ["sh", "-c", f"kill -{number} $$"]) == (Status(-number, ""), b"", b"")


def test_arguments_and_environment(shell: tuple[str, ...]) -> None:
    script = r'for each in "$@" "$MARK"; do printf "%s\0" "$each"; done'
    _, said, _ = ran(shell, ["sh", "-c", script, "sh", *NASTY], MARK="x 'y'")
    assert said.decode().split("\0") == [*NASTY, "x 'y'", ""]


def test_what_cannot_be_run(shell: tuple[str, ...]) -> None:
    missing, denied = Status(0, "No such file or directory"), Status(0, "Permission denied")
    for name, expected in (("/no/such", missing), ("no-such", missing), ("exit", missing), ("/etc", denied)):
        assert ran(shell, [name]) == (expected, b"", b"")


def test_what_is_left_in_the_group_ends(shell: tuple[str, ...]) -> None:
    status, _, _ = ran(shell, ["sh", "-c", "sleep 600 &"])  # run() would wait for its end of the pipe
    assert status == Status(0, "")


# ------------------------------------------------------------------ outputs that come in one stream

EVERY_SHELL = pytest.mark.parametrize("shell", [*SHELLS, ("bash",)], ids=lambda each: each[0], indirect=True)


def merged(shell: tuple[str, ...], folder: Path, argv: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A command whose outputs come in one stream, and its mark; temporary files are in the folder."""
    mark = new_mark()
    process = subprocess.Popen(
        [*shell, "-c", command_script(argv, {}, mark, stdin=None, merged=True)],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, mark


@EVERY_SHELL
def test_in_one_stream_the_status_precedes_the_errors(shell: tuple[str, ...], tmp_path: Path) -> None:
    script = 'for i in 1 2 3; do echo "err $i" >&2; echo "out $i"; done; exit 7'
    process, mark = merged(shell, tmp_path, ["sh", "-c", script])
    said, _ = process.communicate(timeout=300)
    status = StatusFilter(mark)
    assert status.feed(said) == (b"out 1\nout 2\nout 3\n", b"err 1\nerr 2\nerr 3\n")
    assert status.status == Status(7, "")
    assert list(tmp_path.iterdir()) == []


@EVERY_SHELL
def test_where_the_reader_has_left_no_file_is_left(shell: tuple[str, ...], tmp_path: Path) -> None:
    go, folder = tmp_path / "go", tmp_path / "temporary"
    folder.mkdir()
    os.mkfifo(go)
    process, _ = merged(shell, folder, ["sh", "-c", 'read -r line <"$1"; echo err >&2', "sh", str(go)])
    assert process.stdout is not None
    process.stdout.close()
    go.write_text("\n")  # waits until the command reads it
    assert process.wait(timeout=300) == -signal.SIGPIPE
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------ what the host sees to


@pytest.mark.parametrize(
    ("argv", "env"), [([], {}), (["a\0b"], {}), (["a"], {"b c": ""}), (["a"], {"b": "\0"})]
)
def test_what_no_command_can_have(argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        command_script(argv, env, new_mark(), stdin=None, merged=False)


def test_a_status_line_is_found_however_it_is_cut() -> None:
    data = b"out" + b"stifarm-1 e 7\n" + b"after"
    for size in range(1, len(data) + 1):
        status = StatusFilter("stifarm-1")
        parts = [status.feed(data[at : at + size]) for at in range(0, len(data), size)]
        assert b"".join(before for before, _ in parts) == b"out"
        assert b"".join(after for _, after in parts) == b"after"
        assert status.status == Status(7, "")


@pytest.mark.parametrize("line", [b"", b" e", b" x 1", b" e 1000", b" e -1", b" e 1 1"])
def test_a_status_line_that_is_none(line: bytes) -> None:
    with pytest.raises(ValueError, match="no status"):
        status_of(line)


def test_the_list_of_devices() -> None:
    listed = parse_devices(
        "emulator-5554          device product:sdk model:Pixel_6 device:emu transport_id:1\n"
        "127.0.0.1:5601         offline transport_id:2\n"
        "ABC                    unauthorized usb:1-1 transport_id:3\n"
        "????????????           no permissions (missing udev rules?); see [http://x/y] usb:1-2\n"
        "\n"
    )
    assert [(each.serial, each.state) for each in listed] == [
        ("emulator-5554", "device"),
        ("127.0.0.1:5601", "offline"),
        ("ABC", "unauthorized"),
        ("????????????", "no permissions (missing udev rules?); see [http://x/y]"),
    ]
    assert listed[0].details["model"] == "Pixel_6"


def test_addresses() -> None:
    assert server_address(None, {}) == ServerAddress("127.0.0.1", 5037)
    assert server_address(None, {"ANDROID_ADB_SERVER_PORT": "6000"}).port == 6000
    assert server_address("lab-host:6001") == ServerAddress("lab-host", 6001)
    assert server_address("[::1]:6001") == ServerAddress("::1", 6001)
    assert split_endpoint("[fe80::1]") == ("[fe80::1]", "")
