"""Devices in a bad state or behind the wrong name: each gives a clear error, and nothing else is touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from db.devices import latest_facts
from db.documents import parse
from db.models import EventRow
from orchestrator import fleet
from orchestrator.cli.context import Session
from orchestrator.cli.doctor import examine
from orchestrator.dispatch import Request, run_job
from orchestrator.doctor import findings_of
from orchestrator.errors import AgentError, DeviceError, StableError
from orchestrator.farm import Farm, open_farm
from orchestrator.fleet import ReadyDevice
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.messages import ProbeUnit
from tests.agent_data import tiny_bundle

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@contextmanager
def farm_with(folder: Path, *devices: str) -> Iterator[tuple[Farm, HostWorker]]:
    folder.mkdir(exist_ok=True)
    (folder / "inventory.yaml").write_text(
        "version: 1\ndevices:\n" + "".join(f"  - {{{d}}}\n" for d in devices)
    )
    with open_farm(load_settings(environ={}, cwd=folder)) as farm:
        worker = HostWorker(farm.settings, farm.inventory.devices)
        try:
            yield farm, worker
        finally:
            worker.close()


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(("size=32m", *options)), "tmpfs", folder], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def one(name: str, workdir: Path) -> str:
    return f"name: {name}, transport: local, threads: 1, workdir: {workdir}"


class OtherHardware(HostWorker):
    """A worker behind whose names stands other hardware."""

    def facts(self, name: str) -> DeviceFacts:
        """As the host's, of another device."""
        return super().facts(name).model_copy(update={"identity": "0123456789abcdef"})


# ------------------------------------------------------------------ who it is


def test_other_hardware_behind_a_name_is_refused_until_it_is_probed(tmp_path: Path) -> None:
    with farm_with(tmp_path, one("dut", tmp_path / "w")) as (farm, worker):
        device = farm.inventory.devices[0]
        before_id, before = fleet.probe_device(farm, worker, device)
        swapped = OtherHardware(farm.settings, farm.inventory.devices)
        with pytest.raises(StableError, match="now other hardware") as refused:
            fleet.ready_device(farm, swapped, device, "0" * 64)
        assert f"dut: it is now other hardware (0123456789abcdef); before it was {before.identity}" in str(
            refused.value
        )
        assert "stifarm devices probe --devices dut" in refused.value.remedy
        facts = swapped.facts("dut")
        after_id = fleet.register_facts(farm, swapped, device, facts, seen=worker.look("dut"), replaced=True)
        assert after_id != before_id
        assert fleet.probe_device(farm, swapped, device)[0] == after_id
        with farm.store.reader() as session:
            events = session.scalars(select(EventRow).where(EventRow.kind == "device-replaced")).all()
            assert len(events) == 1


def test_other_hardware_behind_a_name_gets_no_content(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    with farm_with(tmp_path, one("dut", tmp_path / "w")) as (farm, worker):
        device = farm.inventory.devices[0]
        fleet.probe_device(farm, OtherHardware(farm.settings, farm.inventory.devices), device)
        (refused,) = fleet.deploy(farm, worker, [device], *content)
        assert isinstance(refused.error, StableError)
        assert "dut: it is now other hardware" in refused.error.what
        assert "before it was 0123456789abcdef" in refused.error.what
        assert "stifarm devices probe --devices dut" in refused.error.remedy
        assert {path.name for path in (tmp_path / "w").iterdir() if any(path.iterdir())} == {"bin"}
        fleet.register_facts(farm, worker, device, worker.facts("dut"), replaced=True)
        (deployed,) = fleet.deploy(farm, worker, [device], *content)
        assert deployed.error is None
        assert [report.already for report in deployed.reports] == [False, False]


def content_of(folder: Path) -> tuple[Path, list[Path]]:
    """A bundle and a file that stands for task data."""
    rows = folder / "rows.safetensors"
    rows.write_bytes(b"rows")
    return tiny_bundle(folder / "bundles"), [rows]


def test_what_the_host_saw_stays_in_the_store(tmp_path: Path) -> None:
    with farm_with(tmp_path, one("dut", tmp_path / "w")) as (farm, worker):
        device = farm.inventory.devices[0]
        seen = worker.look("dut")
        device_id = fleet.register_facts(farm, worker, device, worker.facts("dut"), seen=seen)
        fleet.probe_device(farm, worker, device)
        with farm.store.reader() as session:
            row = latest_facts(session, device_id)
            assert row is not None
            kept = parse(row.facts_json)["host_seen"]
        assert kept == parse_back(seen.stable())
        assert "clock_s" not in kept


def parse_back(values: Mapping[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def test_two_names_for_one_device_are_refused_with_both_lines(tmp_path: Path) -> None:
    entries = (one("desk", tmp_path / "a"), one("table", tmp_path / "b"))
    with farm_with(tmp_path, *entries) as (farm, worker):
        desk, table = farm.inventory.devices
        fleet.probe_device(farm, worker, desk)
        with pytest.raises(
            StableError, match=r"table: it is the same device as desk .*lines 3 and 4 of inventory"
        ):
            fleet.probe_device(farm, worker, table)
        fleet.probe_device(farm, worker, desk)


class WorkerOfTwoHosts(HostWorker):
    """Says of ``table`` that it hangs on a lab host."""

    def host(self, name: str) -> str:
        """The lab host's name, or what the device's own worker says."""
        return "bench1" if name == "table" else super().host(name)


def test_two_names_for_one_device_are_refused_with_both_inventories(tmp_path: Path) -> None:
    entries = (one("desk", tmp_path / "a"), one("table", tmp_path / "b"))
    with farm_with(tmp_path, *entries) as (farm, _):
        worker = WorkerOfTwoHosts(farm.settings, farm.inventory.devices)
        desk, table = farm.inventory.devices
        fleet.probe_device(farm, worker, desk)
        with pytest.raises(
            StableError,
            match=r"line 3 of inventory.yaml and line 4 of the inventory of lab host bench1 lead to it\.",
        ):
            fleet.probe_device(farm, worker, table)
        worker.close()


def test_a_device_of_another_farm_is_taken_over_only_explicitly(tmp_path: Path) -> None:
    workdir = tmp_path / "device"
    with farm_with(tmp_path / "first", one("dut", workdir)) as (first, worker):
        device_id, _ = fleet.probe_device(first, worker, first.inventory.devices[0])
        with fleet.leased(first, device_id) as lease:
            worker.collect("dut", (), lease)
        with farm_with(tmp_path / "second", one("mine", workdir)) as (second, other):
            other_id, _ = fleet.probe_device(second, other, second.inventory.devices[0])
            with fleet.leased(second, other_id) as lease:
                with pytest.raises(AgentError, match="belongs to store") as refused:
                    other.collect("mine", (), lease)
                assert "stifarm devices take-over --devices mine" in refused.value.remedy
                other.take_over("mine", lease)
                other.collect("mine", (), lease)
        with fleet.leased(first, device_id) as lease, pytest.raises(AgentError, match="belongs to store"):
            worker.collect("dut", (), lease)


def test_a_device_of_another_farm_gets_neither_content_nor_jobs_before_it_is_taken_over(
    tmp_path: Path,
) -> None:
    workdir, content = tmp_path / "device", content_of(tmp_path)
    with farm_with(tmp_path / "first", one("dut", workdir)) as (first, worker):
        dut = first.inventory.devices[0]
        device_id, _ = fleet.probe_device(first, worker, dut)
        with fleet.leased(first, device_id) as lease:
            worker.deploy("dut", *content, lease)
        (agent,) = (workdir / "bin").iterdir()
        agent_of_the_first = agent.rename(agent.with_name("stifarm-agent-0123456789abcdef"))
        with farm_with(tmp_path / "second", one("mine", workdir)) as (second, other):
            mine = second.inventory.devices[0]
            newer = tiny_bundle(tmp_path / "bundles", seed=1), content[1]
            (refused,) = fleet.deploy(second, other, [mine], *newer)
            assert isinstance(refused.error, AgentError)
            assert "stifarm devices take-over --devices mine" in refused.error.remedy
            assert list((workdir / "incoming").iterdir()) == []
            # With nothing to send a deploy changes nothing; a job is refused by the agent itself.
            assert fleet.deploy(second, other, [mine], *content)[0].error is None
            request = probe_request(fleet.ready_device(second, other, mine, content[0].name))
            with pytest.raises(AgentError, match="belongs to store") as failed:
                run_job(second.store, other, second.owner, request)
            assert list((workdir / "jobs").iterdir()) == []
            assert agent_of_the_first.is_file()
            assert "stifarm devices take-over --devices mine" in failed.value.remedy
            with fleet.leased(second, request.device_id) as lease:
                other.take_over("mine", lease)
            assert fleet.deploy(second, other, [mine], *newer)[0].error is None
            assert not agent_of_the_first.exists()
            assert run_job(second.store, other, second.owner, request).complete
        (lost,) = fleet.deploy(first, worker, [dut], *content)
        assert isinstance(lost.error, AgentError)  # the new owner's deploy has removed what it does not know
        assert "stifarm devices take-over --devices dut" in lost.error.remedy


def probe_request(ready: ReadyDevice) -> Request:
    """One reading of the sensors, as a job."""
    return Request(
        device=ready.name,
        device_id=ready.device_id,
        agent_digest=ready.facts.agent_digest,
        target=ready.target,
        kind="probe",
        bundle=None,
        task_data=None,
        units=(ProbeUnit(number=0, kind="probe"),),
    )


# ------------------------------------------------------------------ work folders


@NEEDS_ROOT
def test_a_noexec_work_folder_is_named(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "m", "noexec") as folder,
        farm_with(tmp_path, one("dut", folder / "w")) as (farm, worker),
    ):
        with pytest.raises(DeviceError, match="does not run there") as failed:
            worker.facts("dut")
        assert "noexec" in failed.value.remedy
        found = findings(farm, worker)
        assert any("is mounted noexec" in text for text in found)


@NEEDS_ROOT
def test_a_read_only_work_folder_is_named(tmp_path: Path) -> None:
    with mounted(tmp_path / "m") as folder, farm_with(tmp_path, one("dut", folder / "w")) as (farm, worker):
        (folder / "w").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(DeviceError, match="Read-only file system"):
            worker.facts("dut")
        found = findings(farm, worker)
        assert any("mounted read-only" in text and "Read-only file system" in text for text in found)


@NEEDS_ROOT
def test_a_full_work_folder_is_named(tmp_path: Path) -> None:
    with mounted(tmp_path / "m") as folder, farm_with(tmp_path, one("dut", folder / "w")) as (farm, worker):
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={folder / 'fill'}", "bs=1M"], capture_output=True, check=False
        )
        with pytest.raises(DeviceError, match="No space left on device"):
            worker.facts("dut")
        assert any("0 B free" in text or "nothing can be written" in text for text in findings(farm, worker))


def test_a_work_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with farm_with(tmp_path, one("dut", tmp_path / "file" / "w")) as (farm, worker):
        with pytest.raises(DeviceError, match="dut: "):
            worker.facts("dut")
        assert any("nothing can be written" in text for text in findings(farm, worker))


def findings(farm: Farm, worker: HostWorker) -> list[str]:
    """What doctor finds wrong with the first device."""
    session = Session(farm, farm.inventory.devices, worker, pool=None)
    found = findings_of(examine(session, farm.inventory.devices[0]))
    return [finding.text for finding in found if finding.state != "ok"]
