"""Virtual phones under stock adb clients: files, commands, authorisation, age, reboots, and their end."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import LabError
from orchestrator.lab import phone
from orchestrator.lab.adbd.packets import CNXN, HEADER_BYTES, OPEN, VERSION, pack_header
from orchestrator.lab.phone import PhoneSpec, RunningPhone
from tests.stock_adb import StockAdb, clients, stock_adb

Switch = Callable[..., RunningPhone]


@pytest.fixture
def switch_on(tmp_path: Path) -> Iterator[Switch]:
    """Starts phones, and stops them at the end."""
    folders = []

    def start(name: str = "virt", **fields: object) -> RunningPhone:
        folders.append(tmp_path / name)
        return phone.start(PhoneSpec(name, f"SERIAL-{name}", **fields), tmp_path / name)  # type: ignore[arg-type]

    yield start
    for folder in folders:
        phone.stop(folder)


@pytest.fixture(params=["system", "adbutils"])
def adb(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StockAdb]:
    client = clients().get(request.param)
    if client is None:
        pytest.skip(f"needs the adb client of {request.param}")
    with stock_adb(client, tmp_path / "home") as client_of_test:
        yield client_of_test


@pytest.fixture
def system_adb(tmp_path: Path) -> Iterator[StockAdb]:
    client = next(iter(clients().values()), None)
    if client is None:
        pytest.skip("needs an adb client")
    with stock_adb(client, tmp_path / "home") as client_of_test:
        yield client_of_test


def needs_namespaces() -> None:
    reason = phone.plain_because()
    if reason is not None:
        pytest.skip(f"needs user namespaces: {reason}")


def needs_android_tools() -> None:
    """Skips the test where a phone has this machine's shell and tools in place of Android's."""
    for name in ("mksh", "toybox", "busybox"):
        if phone.plain_because() is None and shutil.which(name) is None:
            pytest.skip(f"needs {name} (package {name}): a phone's commands")


def on_again(folder: Path) -> RunningPhone:
    """The phone, once it is back from a reboot."""
    deadline = time.monotonic() + 120
    while (running := phone.running(folder)) is None:
        assert time.monotonic() < deadline, "the phone does not come back"
        time.sleep(0.05)
    return running


def test_a_stock_client_moves_files_and_runs_commands(
    switch_on: Switch, adb: StockAdb, tmp_path: Path
) -> None:
    needs_android_tools()
    running = switch_on()
    adb.connect(running.endpoint)
    assert adb.out("get-state").strip() == b"device"
    for name, data in {"empty": b"", "ü b'$x": b"\r\n\0\xff", "large": os.urandom(5_000_000)}.items():
        source, back = tmp_path / name, tmp_path / f"{name}.back"
        source.write_bytes(data)
        adb.out("push", str(source), f"{running.workdir}/new/{name}")
        adb.out("pull", f"{running.workdir}/new/{name}", str(back))
        assert back.read_bytes() == data
    assert adb.out("exec-out", f"cat {running.workdir}/new/large") == (tmp_path / "large").read_bytes()
    assert adb("pull", f"{running.workdir}/none", str(tmp_path / "none")).returncode == 1
    done = adb("shell", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert [adb("shell", f"exit {code}").returncode for code in (0, 1, 255)] == [0, 1, 255]
    assert adb("shell", "kill -9 $$").returncode == 137
    assert adb.out("shell", "wc -c; echo", stdin=bytes(300_000)).split() == [b"300000"]
    assert adb.out("shell", "head -c 100000 /dev/zero") == bytes(100_000)
    assert b"tty" in adb.out("shell", "-tt", "tty; stty size >/dev/null || echo none")


def test_a_phone_looks_like_one_from_inside(switch_on: Switch, system_adb: StockAdb) -> None:
    running = switch_on(model="Model X", api=33, props={"ro.soc.model": "SOC-1"})
    system_adb.connect(running.endpoint)

    def said(command: str) -> str:
        return system_adb.out("shell", command).decode().strip()

    assert (
        said("getprop ro.product.model; getprop ro.soc.model; getprop ro.build.version.sdk")
        == "Model X\nSOC-1\n33"
    )
    assert said("getprop ro.stifarm.virtual; getprop none; getprop none word") == "1\n\nword"
    assert said("setprop debug.a 'b c'; getprop debug.a") == "b c"
    assert system_adb("shell", "setprop ro.serialno other").returncode == 1
    assert said("settings get global x; settings put global x 'a b'; settings get global x") == "null\na b"
    assert said("settings delete global x; settings get global x") == "Deleted 1 rows\nnull"
    assert said("svc power stayon true; settings get global stay_on_while_plugged_in") == "15"
    battery = "dumpsys battery | grep -E '^  (level|USB powered|temperature):'"
    assert said(battery) == "USB powered: true\n  level: 95\n  temperature: 250"
    assert said(f"dumpsys battery unplug; dumpsys battery set level 7; {battery}").startswith(
        "USB powered: false\n  level: 7"
    )
    assert said(f"dumpsys battery reset; {battery}").startswith("USB powered: true\n  level: 95")
    assert "Thermal Status: 0" in said("dumpsys thermalservice")
    assert said("uname -m") == "x86_64"
    if not running.plain:
        assert said("cat /proc/sys/kernel/random/boot_id") == running.boot_id
        assert said("id -u; id -un") == "2000\nshell"
        assert said("ls /etc/machine-id 2>&1; cd /data/local/tmp && pwd").endswith("/data/local/tmp")
        assert system_adb("shell", "touch /system/x").returncode == 1


def test_a_stranger_waits_until_authorised_and_leaves_when_no_longer(
    switch_on: Switch, system_adb: StockAdb
) -> None:
    running = switch_on(secure=True)
    system_adb.connect(running.endpoint)
    system_adb.wait_for_state("unauthorized")
    assert system_adb("shell", "echo in").stdout == b""
    assert phone.authorize(running.folder) == 1
    system_adb.wait_for_state("device")
    assert system_adb.out("shell", "echo in") == b"in\n"
    phone.unauthorize(running.folder)
    system_adb.wait_for_state("unauthorized")
    with pytest.raises(LabError, match="no public key of adb"):
        phone.authorize(running.folder, "AAAA")


def test_an_old_phone_has_no_exit_codes_and_a_terminal_for_all(
    switch_on: Switch, adb: StockAdb, tmp_path: Path
) -> None:
    needs_android_tools()
    running = switch_on(features="old", api=23)
    adb.connect(running.endpoint)
    assert adb("features").stdout.split() == []
    done = adb("shell", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout.replace(b"\r\n", b"\n")) == (0, b"out\nerr\n")
    assert b"inaccessible or not found" in adb("shell", "sha256sum x").stdout or running.plain
    data = os.urandom(200_000)
    (tmp_path / "source").write_bytes(data)
    adb.out("push", str(tmp_path / "source"), f"{running.workdir}/file")
    assert adb.out("exec-out", f"cat {running.workdir}/file") == data


def test_a_reboot_ends_what_ran_and_gives_a_new_boot_id(switch_on: Switch, system_adb: StockAdb) -> None:
    needs_namespaces()
    first = switch_on()
    system_adb.connect(first.endpoint)
    system_adb.out("shell", "echo kept > /data/local/tmp/kept; sleep 3600 >/dev/null 2>&1 </dev/null &")
    assert b"sleep" in system_adb.out("shell", "ps -ef | grep '[s]leep 3600'")
    phone.reboot(first.folder)
    second = on_again(first.folder)
    assert (second.endpoint, second.boots) == (first.endpoint, 2)
    assert second.boot_id != first.boot_id
    system_adb.wait_for_state("device")
    said = system_adb.out("shell", "cat /proc/sys/kernel/random/boot_id")
    assert said.decode().strip() == second.boot_id
    assert (
        system_adb.out("shell", "cat /data/local/tmp/kept; ps -ef | grep -c '[s]leep 3600'; :")
        == b"kept\n0\n"
    )


def test_stopping_leaves_no_process_and_no_mount(switch_on: Switch, system_adb: StockAdb) -> None:
    running = switch_on()
    system_adb.connect(running.endpoint)
    system_adb.out("shell", "sleep 3600 >/dev/null 2>&1 </dev/null &")
    phone.stop(running.folder)
    assert phone.running(running.folder) is None
    assert not alive_below(running.folder)
    assert str(running.folder) not in Path("/proc/self/mountinfo").read_text()
    with socket.socket() as link:
        assert link.connect_ex((running.address, running.port)) != 0
    phone.stop(running.folder)  # harmless


def test_a_phone_can_be_stopped_while_it_is_off_for_a_reboot(switch_on: Switch) -> None:
    needs_namespaces()
    running = switch_on()
    phone.reboot(running.folder, delay_s=600)
    with pytest.raises(LabError, match="switched on already"):
        phone.start(PhoneSpec("virt", "S"), running.folder)
    phone.stop(running.folder)
    assert not alive_below(running.folder)


def alive_below(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def test_what_breaks_the_protocol_is_cut_off_and_nobody_else(switch_on: Switch, system_adb: StockAdb) -> None:
    running = switch_on()
    system_adb.connect(running.endpoint)
    system_adb.out("shell", "true")
    introduction = pack_header(CNXN, VERSION, 1 << 20, 6, sum(b"host::")) + b"host::"
    for hostile in (
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        pack_header(OPEN, 1, 0, 6, 0) + b"shell:",
        pack_header(CNXN, VERSION, 16, 6, 0) + b"host::",
        introduction + pack_header(OPEN, 1, 0, 1 << 30, 0),
    ):
        with socket.create_connection((running.address, running.port), timeout=60) as link:
            link.sendall(hostile)
            answered = 0
            try:
                while block := link.recv(65536):
                    answered += len(block)
            except ConnectionResetError:
                pass
            assert answered < HEADER_BYTES + 4096
    assert system_adb.out("shell", "echo still here") == b"still here\n"


def test_a_phone_of_another_architecture_says_so(switch_on: Switch, system_adb: StockAdb) -> None:
    needs_namespaces()
    if phone.aarch64_emulator() is None:
        with pytest.raises(LabError, match="qemu-aarch64, which is not installed"):
            switch_on(architecture="aarch64")
        pytest.skip("needs qemu-aarch64 (package qemu-user)")
    running = switch_on(architecture="aarch64")
    system_adb.connect(running.endpoint)
    assert system_adb.out("shell", "uname -m; getprop ro.product.cpu.abi") == b"aarch64\narm64-v8a\n"


def test_a_phone_that_cannot_start_says_why(tmp_path: Path, switch_on: Switch) -> None:
    running = switch_on()
    with pytest.raises(LabError, match="switched on already"):
        phone.start(PhoneSpec("virt", "S"), running.folder)
    with pytest.raises(LabError, match=r"(?s)does not come up.*cannot start: .*in use"):
        phone.start(PhoneSpec("other", "S"), tmp_path / "other", running.port)
    assert not alive_below(tmp_path / "other")
    with pytest.raises(LabError, match="neither a preset"):
        phone.start(PhoneSpec("other", "S", features="future"), tmp_path / "other")
    with pytest.raises(LabError, match="not riscv"):
        phone.start(PhoneSpec("other", "S", architecture="riscv"), tmp_path / "other")
    with pytest.raises(LabError, match="not switched on"):
        phone.reboot(tmp_path / "other")
