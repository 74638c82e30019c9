"""What every agent changes on a device and puts back: at the end, after a signal, or by the next verb.

The device is a folder tree for sysfs and one for Android's root, whose ``settings`` is a shell script.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.identity import boot_id
from agent.spool import Spool
from sti_runtime.messages import (
    AndroidSetting,
    EndRecord,
    FileSetting,
    IdleSetting,
    Job,
    Setting,
    SettingReport,
    StartRecord,
)
from sti_runtime.records import canonical_json
from tests.agent_data import probes
from tests.agents import Agent
from tests.contract.agent_world import (
    a_job,
    job_path,
    journal_of,
    journal_path,
    lines_in,
    run,
    wait_for,
)
from tests.machine import Machine

SETTINGS_PROGRAM = """#!/bin/sh
cd "$(dirname "$0")/../../values" || exit 1
[ -e broken ] && exit 255
case $1 in
get) if [ -e "$2.$3" ]; then cat "$2.$3"; else echo null; fi ;;
put) [ -e "deaf" ] || printf '%s\\n' "$4" > "$2.$3" ;;
delete) rm -f "$2.$3" ;;
esac
"""
STAY, SAVER = "stay_on_while_plugged_in", "low_power"
CPU = "/sys/devices/system/cpu"
GOVERNOR = FileSetting(kind="file", path=f"{CPU}/cpufreq/policy*/scaling_governor", value="performance")
SETTINGS: tuple[Setting, ...] = (
    GOVERNOR,
    IdleSetting(kind="idle", latency_us=10),
    AndroidSetting(kind="android", namespace="global", key=STAY, value="7"),
    AndroidSetting(kind="android", namespace="global", key=SAVER, value="0"),
)


@dataclass(frozen=True)
class Device:
    """Folders that stand for a device's sysfs and Android's root."""

    sysfs: Path
    android: Path

    def file(self, name: str) -> Path:
        return self.sysfs / name.removeprefix("/sys/")

    def governor(self, policy: int) -> Path:
        return self.file(f"{CPU}/cpufreq/policy{policy}/scaling_governor")

    def value(self, key: str) -> Path:
        return self.android / "values" / f"global.{key}"

    def state(self) -> dict[str, str]:
        """All that settings may change, by name."""
        files = [*self.sysfs.rglob("scaling_governor"), *self.sysfs.rglob("disable")]
        files += (self.android / "values").iterdir()
        return {path.name + str(path.parent)[-8:]: path.read_text().strip() for path in files}


@pytest.fixture
def device(tmp_path: Path) -> Device:
    made = Device(tmp_path / "sys", tmp_path / "android")
    for policy in (0, 4):
        made.governor(policy).parent.mkdir(parents=True)
        made.governor(policy).write_text("schedutil\n")
    (made.file(f"{CPU}/cpufreq") / "policyless").mkdir()
    for cpu in (0, 11):
        for state, latency_us in enumerate((1, 10, 80)):
            folder = made.file(f"{CPU}/cpu{cpu}/cpuidle/state{state}")
            folder.mkdir(parents=True)
            (folder / "latency").write_text(f"{latency_us}\n")
            (folder / "disable").write_text("0\n")
    program = made.android / "system/bin/settings"
    program.parent.mkdir(parents=True)
    (made.android / "values").mkdir()
    made.value(SAVER).write_text("1\n")
    program.write_text(SETTINGS_PROGRAM)
    program.chmod(0o755)
    return made


@pytest.fixture
def on(agent: Agent, device: Device) -> Agent:
    """The agent on that device."""
    return agent.in_environment(STIFARM_SYSFS=str(device.sysfs), STIFARM_ANDROID=str(device.android))


def settings_job(agent: Agent, spool: Spool, *settings: Setting, **changes: Any) -> Job:
    return a_job(agent, spool, settings=settings or SETTINGS, units=probes(1), **changes)


def changed(device: Device) -> bool:
    return device.governor(0).read_text().strip() == "performance"


def started(spool: Spool, job: Job) -> tuple[SettingReport, ...]:
    payload = journal_of(spool, job)[-3].payload
    assert isinstance(payload, StartRecord)
    return payload.settings


def ended(spool: Spool, job: Job) -> tuple[SettingReport, ...]:
    payload = journal_of(spool, job)[-1].payload
    assert isinstance(payload, EndRecord)
    return payload.settings


def start_and_wait(agent: Agent, spool: Spool, job: Job, starts: int = 1) -> subprocess.Popen[bytes]:
    """Start the agent, whose unit waits for the machine; returns when it has changed the settings."""
    process = agent.start("run", job_path(spool, job), "--spool", spool.root)
    wait_for(lambda: lines_in(journal_path(spool, job)) == starts, "the start record")
    assert process.poll() is None, process.communicate()
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def restore(agent: Agent, spool: Spool) -> list[tuple[str, str, str | None]]:
    """The verb; (target, state, before) of each report."""
    code, answer = agent.call("restore", "--spool", spool.root)
    assert code == 0, answer
    reports = [SettingReport.model_validate(item) for item in answer["settings"]]
    return [(report.target, report.state, report.before) for report in reports]


def line(target: str, value: str, before: str | None, *, boot: str | None = None) -> bytes:
    """One line of the journal, as docs/job-and-journal.md has it."""
    fields = {"before": before, "boot_id": boot or boot_id(), "job": "probe/1", "target": target}
    body = canonical_json({**fields, "value": value})
    return b"0 %08x %s\n" % (zlib.crc32(body), body)


# ------------------------------------------------------------------ in a run


def test_settings_are_changed_for_the_run_and_put_back(
    on: Agent, spool: Spool, device: Device, tmp_path: Path
) -> None:
    """By a signal, after a kill by the next verb, and at the end; no verb does while the agent runs."""
    before = device.state()
    machine = Machine(tmp_path / "machine.lock")
    job = settings_job(on, spool, machine_lock=str(machine.path))
    with machine:
        process = start_and_wait(on, spool, job)
        held = device.state()
        assert held != before
        assert on.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "running"
        code, report = on.call("restore", "--spool", spool.root)
        assert (code, report["error"]["type"]) == (5, "BusyError")
        assert device.state() == held
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert device.state() == before
        assert not spool.settings.exists()
        kill(start_and_wait(on, spool, job, 2))
        assert device.state() == held
        assert spool.settings.exists()
        assert on.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "stopped"
        assert device.state() == before
        assert not spool.settings.exists()
    assert run(on, spool, job) == (0, {"state": "ended", "done": 1, "failed": 0})
    assert device.state() == before
    assert not spool.settings.exists()
    idle = [f"{CPU}/cpu{cpu}/cpuidle/state2/disable" for cpu in (0, 11)]
    expected = [
        (f"{CPU}/cpufreq/policy0/scaling_governor", "performance", "schedutil"),
        (f"{CPU}/cpufreq/policy4/scaling_governor", "performance", "schedutil"),
        (idle[0], "1", "0"),
        (idle[1], "1", "0"),
        (f"global/{STAY}", "7", None),
        (f"global/{SAVER}", "0", "1"),
    ]
    for reports, state in ((started(spool, job), "applied"), (ended(spool, job)[::-1], "restored")):
        assert [(r.target, r.value, r.before) for r in reports] == expected
        assert {(r.state, r.why) for r in reports} == {(state, "")}
    log = (job_path(spool, job).parent / "agent.log").read_text()
    assert log.count(f"Setting global/{STAY}: applied") == log.count(f"Setting global/{STAY}: restored") == 3


def without_privilege() -> None:
    """The process may not write where the mode says no, root or not (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0)


def test_what_cannot_be_changed_is_reported_and_the_run_goes_on(
    on: Agent, spool: Spool, device: Device, tmp_path: Path
) -> None:
    device.governor(0).chmod(stat.S_IRUSR)
    (tmp_path / "outside").write_text("0\n")
    for name, target in (("out", tmp_path / "outside"), ("in", device.governor(4))):
        device.file(f"/sys/devices/{name}").symlink_to(target)
    device.file("/sys/devices/empty").touch()
    device.file("/sys/devices/long").write_text("x" * 300)
    (device.android / "values" / "deaf").touch()
    paths = {name: f"/sys/devices/{name}" for name in ("nothing", "none*/x", "out", "empty", "long", "in")}
    job = settings_job(
        on,
        spool,
        GOVERNOR,
        *(FileSetting(kind="file", path=path, value="performance") for path in paths.values()),
        AndroidSetting(kind="android", namespace="global", key=STAY, value="7"),
    )
    code, report = run(on, spool, job, preexec_fn=without_privilege)
    assert (code, report) == (0, {"state": "ended", "done": 1, "failed": 0})
    found = {r.target: (r.state, r.before, r.why) for r in started(spool, job)}
    locked, second = (f"{CPU}/cpufreq/policy{number}/scaling_governor" for number in (0, 4))
    state, before, why = found.pop(locked)
    assert (state, before) == ("not-applied", "schedutil")
    assert "Permission denied" in why
    assert found.pop(second) == ("applied", "schedutil", "")
    assert found.pop(paths["in"]) == ("applied", "performance", "it was so before")
    causes = [
        "No such file",
        "no such file on this device",
        "leads out of sysfs",
        "is empty",
        "could not be put",
    ]
    for path, cause in zip(paths.values(), causes, strict=False):
        state, before, why = found.pop(path)
        assert (state, before, cause in why) == ("not-applied", None, True), why
    state, before, why = found.pop(f"global/{STAY}")
    assert (state, before, why.startswith("it reads back ")) == ("not-applied", None, True)
    assert found == {}
    assert device.state()[f"scaling_governor{str(device.governor(4).parent)[-8:]}"] == "schedutil"
    assert {r.state for r in ended(spool, job)} == {"restored"}
    assert not spool.settings.exists()


def test_nothing_is_changed_that_cannot_be_journalled(on: Agent, spool: Spool, device: Device) -> None:
    before = device.state()
    spool.settings.symlink_to("/dev/full")
    job = settings_job(on, spool, GOVERNOR)
    assert run(on, spool, job)[0] == 0
    reports = started(spool, job)
    assert [r.state for r in reports] == ["not-applied", "not-applied"]
    assert all("No space left" in r.why for r in reports)
    assert (device.state(), ended(spool, job)) == (before, ())


@pytest.mark.parametrize(
    "setting",
    [
        {"kind": "file", "path": "/sys/devices/../../etc/passwd", "value": "1"},
        {"kind": "android", "namespace": "global", "key": "a b", "value": "1"},
    ],
)
def test_a_job_that_asks_for_something_else(
    on: Agent, spool: Spool, device: Device, setting: dict[str, str]
) -> None:
    job = a_job(on, spool, units=probes(1))
    document = json.loads(job_path(spool, job).read_bytes()) | {"settings": [setting]}
    job_path(spool, job).write_bytes(canonical_json(document))
    code, report = run(on, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert "settings.0" in report["error"]["what"]


# ------------------------------------------------------------------ after a kill


def test_what_somebody_changed_meanwhile_is_left_alone(
    on: Agent, spool: Spool, device: Device, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = settings_job(on, spool, machine_lock=str(machine.path))
    with machine:
        kill(start_and_wait(on, spool, job))
    device.governor(4).write_text("powersave\n")
    device.value(STAY).write_text("3\n")
    device.governor(0).write_text("schedutil\n")  # put back by hand
    found = restore(on, spool)
    assert [state for _, state, _ in found] == ["restored", "kept", *["restored"] * 2, "kept", "restored"]
    assert found[1] == (f"global/{STAY}", "kept", None)
    assert (device.governor(4).read_text(), device.value(STAY).read_text()) == ("powersave\n", "3\n")
    assert restore(on, spool) == []


def test_a_journal_with_damage_and_of_another_boot(on: Agent, spool: Spool, device: Device) -> None:
    """Every good line counts; files are reset by a reboot, Android's values are not."""
    policies = [f"{CPU}/cpufreq/policy{number}/scaling_governor" for number in (0, 4)]
    idle = f"{CPU}/cpu0/cpuidle/state2/disable"
    good = line(policies[0], "performance", "schedutil")
    spool.settings.write_bytes(
        good
        + line(policies[1], "performance", "schedutil")[:-20]
        + b"\n\xff\n\n"
        + line("/sys/devices/../../etc/passwd", "1", "0")
        + line(idle, "1", "0", boot="another")
        + line(f"global/{STAY}", "7", None, boot="another")
        + good[:30]
    )
    for policy in (0, 4):
        device.governor(policy).write_text("performance\n")
    device.file(idle).write_text("1\n")
    device.value(STAY).write_text("7\n")
    assert restore(on, spool) == [
        (f"global/{STAY}", "restored", None),
        (idle, "restored", "0"),
        (policies[0], "restored", "schedutil"),
    ]
    assert not device.value(STAY).exists()
    assert device.file(idle).read_text() == "1\n"
    assert [device.governor(policy).read_text().strip() for policy in (0, 4)] == ["schedutil", "performance"]
    assert not spool.settings.exists()


def test_what_cannot_be_put_back_is_tried_again_and_keeps_the_device_from_being_cleaned(
    on: Agent, spool: Spool, device: Device
) -> None:
    target = f"{CPU}/cpufreq/policy0/scaling_governor"
    spool.settings.write_bytes(line(f"global/{STAY}", "7", "0") + line(target, "performance", "schedutil"))
    device.governor(0).write_text("performance\n")
    device.value(STAY).write_text("7\n")
    (device.android / "values" / "broken").touch()
    assert [state for _, state, _ in restore(on, spool)] == ["restored", "not-restored"]
    assert spool.settings.read_bytes().count(b"\n") == 1
    code, report = on.call("clean", "--spool", spool.root)
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert f"global/{STAY} cannot be put back to '0'" in report["error"]["what"]
    assert spool.bundles.is_dir()
    (device.android / "values" / "broken").unlink()
    assert "settings.journal" not in on.call("clean", "--spool", spool.root)[1]["removed"]
    assert device.value(STAY).read_text() == "0\n"
    assert list(spool.root.iterdir()) == []
