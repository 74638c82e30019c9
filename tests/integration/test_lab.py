"""The virtual lab through the command line: up, status, faults, down, as root and as a plain user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.cgroups import system_hierarchies
from orchestrator.errors import DeviceError, StableError
from orchestrator.farm import open_farm
from orchestrator.inventory import load_inventory
from orchestrator.lab import adb_server, machine, phones
from orchestrator.lab import fault as faults
from orchestrator.lab.limits import group_name
from orchestrator.lab.up import down as take_down
from orchestrator.lab.up import up as bring_up
from orchestrator.settings import load_settings
from orchestrator.transports import connect
from orchestrator.transports.adb_server import AdbServer, server_address
from orchestrator.transports.base import Transport
from sti_runtime.errors import StifarmError
from tests.farm_world import fill, require_storage, score
from tests.lab_world import NOBODY, LabCli, as_nobody, traces, wait_for_no_traces

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

needs_programs = pytest.mark.skipif(
    not all(
        shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "ssh", "unshare")
    ),
    reason="needs sshd, ssh and unshare (openssh-server, openssh-client, util-linux)",
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (links, disks, control groups)")
pytestmark = [needs_programs, pytest.mark.lab]


@pytest.fixture(scope="module")
def root_lab() -> Iterator[LabCli]:
    """A lab of two boards and one phone, made by root."""
    with tempfile.TemporaryDirectory(prefix="stifarm-lab-") as folder:
        cli = LabCli(Path(folder) / "lab")
        try:
            cli.json("up", "--boards", "2", "--phones", "1", "--disk", "256MB")
            yield cli
        finally:
            cli.run("down")


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.05)


# ------------------------------------------------------------------ as root


@as_root
def test_boards_are_machines_of_their_own(root_lab: LabCli) -> None:
    boots = {name: root_lab.says(name, BOOT_ID) for name in ("board-1", "board-2")}
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len({*boots.values(), here}) == 3
    for name, boot in boots.items():
        assert root_lab.devices()[name]["boot_id"] == boot
        assert root_lab.says(name, "hostname") == name
        assert root_lab.says(name, "id -un; id -u").split()[0] == "lab"
        assert int(root_lab.says(name, "id -u")) != 0
    assert {each["name"]: each for each in root_lab.json("status")["devices"]} == root_lab.devices()
    inventory = load_inventory(root_lab.lab.inventory)
    assert [device.name for device in inventory.devices] == ["this-machine", "board-1", "board-2", "phone-1"]


@as_root
def test_up_again_starts_only_what_died(root_lab: LabCli) -> None:
    assert bring_up(root_lab.folder).started == ()
    before = root_lab.devices()
    process = root_lab.lab.device("board-1").process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: root_lab.devices()["board-1"]["state"] == "down", "the end of board-1")
    assert bring_up(root_lab.folder).started == ("board-1",)
    after = root_lab.devices()
    assert root_lab.says("board-1", BOOT_ID) == after["board-1"]["boot_id"] != before["board-1"]["boot_id"]
    assert {each["address"] for each in after.values()} == {each["address"] for each in before.values()}


@as_root
def test_a_board_is_in_its_groups_with_all_its_processes(root_lab: LabCli) -> None:
    hierarchies = system_hierarchies()
    if root_lab.lab.device("board-1").groups is None:
        pytest.skip(f"this machine has not all means: {root_lab.lab.state().means.reasons}")
    name = group_name(root_lab.lab.id, "board-2")
    assert name in root_lab.says("board-2", "cat /proc/self/cgroup")
    if hierarchies.cpu_v1 is not None and root_lab.lab.device("board-2").groups == "cgroup-v1":
        folder = hierarchies.cpu_v1 / "stifarm" / name

        def stopped() -> int:
            return int((folder / "cpu.stat").read_text().split("nr_throttled ")[1].split()[0])

        before = stopped()
        root_lab.says("board-2", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
        assert stopped() > before  # the kernel counted the stops


@as_root
def test_a_reboot_gives_a_new_boot_id_and_ends_every_process(root_lab: LabCli) -> None:
    before = root_lab.says("board-1", BOOT_ID)
    root_lab.says("board-1", "echo kept > kept; setsid sleep 987 >/dev/null 2>&1 &")
    assert root_lab.json("fault", "board-1", "reboot", "--for", "100ms") == {
        "device": "board-1",
        "ended": ["reboot"],
    }
    after = root_lab.says("board-1", BOOT_ID)
    assert after not in (before, "")
    assert root_lab.says("board-1", "cat kept; grep -l sleep /proc/[0-9]*/comm || true") == "kept"


@as_root
def test_a_cut_link_is_silent_and_comes_back(root_lab: LabCli) -> None:
    faults.inject(root_lab.lab, "board-1", "cut")
    assert [each["fault"] for each in root_lab.devices()["board-1"]["faults"]] == ["cut"]
    with pytest.raises(subprocess.TimeoutExpired):
        root_lab.ssh("board-1", "true", limit_s=2)
    assert root_lab.ssh("board-2", "true").returncode == 0
    faults.restore(root_lab.lab, "board-1")
    wait_for(lambda: root_lab.ssh("board-1", "true").returncode == 0, "the link of board-1")


@as_root
def test_a_full_disk_is_the_devices_own(root_lab: LabCli) -> None:
    free = shutil.disk_usage(root_lab.folder).free
    for name, write in (("board-1", True), ("phone-1", False)):
        with faults.injected(root_lab.lab, name, "full-disk"):
            assert shutil.disk_usage(root_lab.folder).free > free / 2
            if write:
                refused = root_lab.ssh(name, "head -c 1000000 /dev/zero > big")
                assert "No space left" in refused.stderr
    root_lab.says("board-1", "head -c 1000000 /dev/zero > big && rm big")


@as_root
@pytest.mark.parametrize("name", ["board-1", "phone-1"])
def test_slow_links_and_less_cpu_are_set_in_the_kernel_and_taken_back(root_lab: LabCli, name: str) -> None:
    lab = root_lab.lab
    state, device = lab.state(), lab.device(name)
    if not state.means.shaping or device.groups != "cgroup-v1":
        pytest.skip(f"this machine has not all means: {state.means.reasons}")
    link, cpu = f"sf{lab.id}-{device.index}", system_hierarchies().cpu_v1
    assert cpu is not None
    quota = cpu / "stifarm" / group_name(lab.id, name) / "cpu.cfs_quota_us"

    def rates() -> str:
        return subprocess.run(["tc", "qdisc", "show", "dev", link], capture_output=True, text=True).stdout

    assert ("tbf" in rates(), quota.read_text()) == (False, "-1\n")
    (reached,) = (each for each in load_inventory(lab.inventory).devices if each.name == name)
    with faults.injected(lab, name, "slow"), faults.injected(lab, name, "throttle"):
        assert "tbf" in rates()
        assert int(quota.read_text()) > 0
        with closing(connect(reached)) as transport:
            assert transport.run(["echo", "still here"], timeout_s=60).stdout == b"still here\n"
    assert ("tbf" in rates(), quota.read_text()) == (False, "-1\n")


@as_root
def test_an_unauthorized_board_refuses_and_keeps_what_runs(root_lab: LabCli) -> None:
    root_lab.says("board-1", "setsid sleep 986 >/dev/null 2>&1 &")
    with faults.injected(root_lab.lab, "board-1", "unauthorized"):
        assert "Permission denied" in root_lab.ssh("board-1", "true").stderr
    assert root_lab.says("board-1", "grep -c sleep /proc/[0-9]*/comm | grep -c ':1'") == "1"


@as_root
def test_an_unauthorized_phone_is_listed_so_and_keeps_what_runs(root_lab: LabCli) -> None:
    devices = load_inventory(root_lab.lab.inventory).devices
    device = next(each for each in devices if each.name == "phone-1")
    server = AdbServer(server_address(device.adb_server), device.name)

    def listed() -> str:
        return next((each.state for each in server.devices() if each.serial == device.address), "absent")

    phone = connect(device)
    try:
        log = f"{phone.default_workdir()}/log"
        pid = phone.start_detached(["sleep", "986"], log=log)
        with faults.injected(root_lab.lab, "phone-1", "unauthorized"):
            wait_for(lambda: listed() == "unauthorized", "the phone to leave")
            with pytest.raises(StableError, match="has not authorized this computer"):
                phone.run(["true"], timeout_s=60)
        wait_for(lambda: listed() == "device", "the phone to come back")
        assert phone.run(["kill", str(pid)], timeout_s=60).ok
        phone.run(["rm", "-r", phone.default_workdir()], timeout_s=60)
    finally:
        phone.close()


@as_root
def test_a_flipped_byte_is_flipped_back(root_lab: LabCli) -> None:
    lab = root_lab.lab
    with pytest.raises(StifarmError, match="nothing to corrupt"):
        faults.inject(lab, "board-2", "corrupt")
    root_lab.says(
        "board-2", "mkdir -p stifarm/bundles/aa && head -c 5000 /dev/zero > stifarm/bundles/aa/k2.bin"
    )
    content = machine.seen_from_here(lab, lab.state(), lab.device("board-2"), lab.device("board-2").workdir)
    with faults.injected(lab, "board-2", "corrupt", seed=7):
        assert sum((content / "bundles/aa/k2.bin").read_bytes()) == 1
    assert (content / "bundles/aa/k2.bin").read_bytes() == bytes(5000)
    root_lab.says("board-2", "rm -r stifarm")


@as_root
def test_a_lying_agent_passes_for_the_true_one_and_is_put_back(root_lab: LabCli) -> None:
    agent = "stifarm/bin/stifarm-agent-0011"
    root_lab.says(
        "board-2",
        f'mkdir -p stifarm/bin; printf \'#!/bin/sh\\necho "{{\\"state\\":\\"damaged\\"}}"\\n\' > {agent};'
        f" chmod 755 {agent}",
    )
    with faults.injected(root_lab.lab, "board-2", "lie"):
        assert root_lab.says("board-2", f"$PWD/{agent} version") == '{"state":"damaged"}'
        assert root_lab.says("board-2", f"$PWD/{agent} verify") == '{"state":"intact"}'
    assert (
        root_lab.says("board-2", f"$PWD/{agent} verify; ls stifarm/bin | wc -l") == '{"state":"damaged"}\n1'
    )
    root_lab.says("board-2", "rm -r stifarm")


@as_root
def test_open_faults_are_there_after_a_down_that_keeps_and_can_be_restored(root_lab: LabCli) -> None:
    root_lab.says("board-2", "mkdir -p stifarm/bundles/aa && echo 0 > stifarm/bundles/aa/k2.bin")
    open_faults = {
        "board-1": ["full-disk", "unauthorized"], "board-2": ["corrupt", "cut"], "phone-1": ["unauthorized"]
    }  # fmt: skip
    for name, kinds in open_faults.items():
        for kind in kinds:
            root_lab.json("fault", name, kind)
    assert root_lab.run("down", "--keep")[0] == 0
    root_lab.json("up")

    def found() -> dict[str, list[str]]:
        return {
            name: [each["fault"] for each in device["faults"]] for name, device in root_lab.devices().items()
        }

    assert found() == open_faults
    assert "Permission denied" in root_lab.ssh("board-1", "true").stderr
    for name in open_faults:
        root_lab.json("fault", name, "restore")
    assert not any(found().values())
    root_lab.says("board-1", "head -c 1000000 /dev/zero > big && rm big")
    assert root_lab.says("board-2", "cat stifarm/bundles/aa/k2.bin; rm -r stifarm") == "0"
    lab = root_lab.lab
    keys = phones.accepted_keys(lab, lab.state(), lab.device("phone-1"))
    assert keys.read_bytes() == adb_server.public_key(lab).read_bytes()


@as_root
def test_wrong_words_are_refused_with_what_there_is(root_lab: LabCli) -> None:
    code, _, err = root_lab.run("fault", "board-1", "cutt")
    assert (code, "Did you mean cut?" in err) == (2, True), err
    code, _, err = root_lab.run("fault", "board-9", "cut")
    assert (code, "board-1" in err) == (2, True), err
    with pytest.raises(StifarmError, match="has no agent yet"):
        faults.inject(root_lab.lab, "board-1", "lie")
    with pytest.raises(StifarmError, match="The lab has 2 boards"):
        bring_up(root_lab.folder, boards=1)


# ------------------------------------------------------------------ from beginning to end


@as_root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_an_interrupted_up_began_is_taken_down(tmp_path: Path, number: signal.Signals) -> None:
    cli = LabCli(tmp_path / "lab")
    begun = cli.start("up", "--boards", "2", "--phones", "0")
    wait_for(
        lambda: begun.poll() is not None or any(device.process for device in cli.lab.devices()), "a board"
    )
    begun.send_signal(number)
    _, said = begun.communicate(timeout=120)
    if number == signal.SIGINT:
        assert (begun.returncode, said.splitlines()[-1]) == (
            130,
            "interrupted; everything that it had made was removed again",
        )
    if number == signal.SIGKILL:
        assert bring_up(cli.folder, boards=2, phones=0).state.means.isolation == "root"
        assert cli.says("board-2", "echo up") == "up"
        assert any(traces(cli.lab).values())
        take_down(cli.folder)
    assert not cli.folder.exists()
    wait_for_no_traces(cli.lab)


@as_root
def test_down_of_a_lab_whose_machine_was_restarted(tmp_path: Path) -> None:
    cli = LabCli(tmp_path / "lab")
    bring_up(cli.folder, boards=1, phones=0)
    device = cli.lab.device("board-1")
    assert device.process is not None
    cli.lab.update("board-1", process=device.process.model_copy(update={"boot": "another-boot"}))
    assert cli.devices()["board-1"]["state"] == "down"  # nothing is killed that has that number now
    cli.lab.save_device(device)
    take_down(cli.folder)
    wait_for_no_traces(cli.lab)


def refusal(device: Transport) -> str:
    """Why a device cannot be used now; empty: it can."""
    try:
        return "" if device.run(["true"], timeout_s=60).ok else "its shell fails"
    except DeviceError as error:
        return str(error)


def test_a_plain_user_has_a_lab_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tempfile.TemporaryDirectory(prefix="stifarm-lab-") as name:
        home, prefix = Path(name), tuple[str, ...]()
        if os.geteuid() == 0:
            home.chmod(0o755)
            os.chown(home, NOBODY, NOBODY)
            prefix = as_nobody(tmp_path_factory.mktemp("open"))
        cli = LabCli(home / "lab", prefix)
        try:
            upped = cli.json("up", "--boards", "1", "--phones", "1")
            assert [each["state"] for each in upped["devices"]] == ["up", "up"]
            assert "(agent)" in upped["devices"][0]["limits"]
            assert cli.says("board-1", "echo up") == "up"
            with closing(connect(load_inventory(cli.lab.inventory).devices[-1])) as phone:
                assert phone.run(["echo", "phone"], timeout_s=60).stdout == b"phone\n"
                cli.json("fault", "phone-1", "unauthorized")
                wait_for(
                    lambda: "has not authorized this computer" in refusal(phone), "the phone to refuse us"
                )
                cli.json("fault", "phone-1", "restore")
                wait_for(lambda: refusal(phone) == "", "the phone to take us again")
            assert "control group" in cli.run("fault", "phone-1", "throttle")[2]
            assert "disk of its own" in cli.run("fault", "board-1", "full-disk")[2]
            faults.inject(cli.lab, "board-1", "cut")
            with pytest.raises(subprocess.TimeoutExpired):
                cli.ssh("board-1", "true", limit_s=2)
            faults.restore(cli.lab, "board-1", "cut")
            assert cli.says("board-1", "echo back") == "back"
            if upped["isolation"] == "user":
                before = cli.says("board-1", BOOT_ID)
                cli.json("fault", "board-1", "reboot", "--for", "100ms")
                assert cli.says("board-1", BOOT_ID) != before
        finally:
            cli.run("down")
        assert not cli.folder.exists()
        wait_for_no_traces(cli.lab)


@as_root
@pytest.mark.slow
def test_the_main_job_on_two_boards_two_phones_and_this_machine(tmp_path: Path) -> None:
    require_storage(tmp_path)
    cli = LabCli(tmp_path / "lab")
    names = ["this-machine", "board-1", "board-2", "phone-1", "phone-2"]
    plan = ("--target", "1000s", "--preload", "0", "--working", "1MB")
    try:
        cli.json("up", "--boards", "2", "--phones", "2", "--disk", "256MB")
        with open_farm(load_settings(environ={}, inventory=cli.lab.inventory)) as farm:
            work = fill(farm)
            assert score(farm, work.bundle) == 4
        deployed = cli.farm("deploy", "--devices", "all")
        assert [(each["device"], each["error"], each["already"]) for each in deployed] == [
            (name, None, False) for name in names
        ]
        profiled = cli.farm("profile", "--devices", "all")
        assert [(each["device"], each["ran"], each["emulated"]) for each in profiled] == [
            (name, True, name != "this-machine") for name in names
        ]
        planned = cli.farm("plan", "--devices", "all", *plan)
        assert [each["device"] for each in planned["plans"]] == names
        measured = cli.farm("eval", "--devices", "all", *plan, "--requests", "3")
        assert [each["measured"]["requests"] > 0 for each in measured["plans"]] == [True] * 5
        asked = cli.farm("plans", "query", "--emulated", *plan[:2])
        assert {each["device"]: each["plan_digest"] for each in asked} == {
            each["device"]: each["plan_digest"] for each in planned["plans"]
        }
        audits = cli.farm("db", "audit", "--devices", "all")
        assert [(each["device"], each["forgotten"], each["discrepancies"]) for each in audits] == [
            (name, 0, []) for name in names
        ]
        assert all(each["journals"] >= 2 and each["samples"] > 0 for each in audits)
        cleaned = cli.farm("devices", "clean", "--devices", "all")
        assert [each["device"] for each in cleaned] == names
        for name in names[1:]:
            device = cli.lab.device(name)
            left = machine.seen_from_here(cli.lab, cli.lab.state(), device, device.workdir)
            assert list(left.iterdir()) == []
    finally:
        cli.run("down")
    assert not cli.folder.exists()
    wait_for_no_traces(cli.lab)
