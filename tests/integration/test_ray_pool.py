"""Ray for real: authentication, tasks, the host's actor, and what is left after the worst ends."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
from sqlalchemy import select

from db.controllers import list_controllers
from db.models import LeaseRow
from orchestrator.errors import PoolError, SelectorError, TransientError
from orchestrator.farm import controlling, open_farm
from orchestrator.inventory import parse_inventory
from orchestrator.lab_hosts import LabHosts
from orchestrator.ray.folders import session_folder
from orchestrator.ray.pool import RayPool
from orchestrator.settings import Settings, load_settings
from orchestrator.worker import HostWorker
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.messages import Job, Lease, ProbeUnit, StartRecord
from tests.agent_data import OPEN_GATES, REPO
from tests.farm_world import agent_pid, wait_for
from tests.machine import Machine

DEVICES = parse_inventory(
    b"version: 1\ndevices: [{name: desk, transport: local, threads: 1}]", Path("inventory.yaml")
).devices


def square(number: int) -> int:
    if number == 13:
        raise InfeasiblePlanError("13 is too much.", "Take less.", smallest_target_ns=169)
    if number == 14:
        raise ValueError("a bug")
    if number == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def environment_of_worker(_: int) -> tuple[str | None, str | None]:
    return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings(environ={}, cwd=tmp_path_factory.mktemp("farm"))


@pytest.fixture(scope="module")
def pool(settings: Settings) -> Iterator[RayPool]:
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # whoever set this: the pool does not start without
    with RayPool(settings, num_cpus=2) as started:
        yield started
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    os.environ.pop("RAY_AUTH_MODE")
    if before is not None:
        os.environ["RAY_AUTH_MODE"] = before


def connect_with(address: str, token: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import ray, sys\n"
        f"ray.init(address={address!r}, log_to_driver=False)\n"
        "print('connected', ray.get(ray.put(7)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # tries to connect, seconds apart
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else it takes loopback for the machine's address
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_authentication_is_on_and_the_token_is_private(pool: RayPool, settings: Settings) -> None:
    assert settings.ray_token.stat().st_mode & 0o777 == 0o600
    assert len(settings.ray_token.read_text()) >= 32
    assert list(pool.map_tasks(environment_of_worker, [0])) == [(0, ("token", str(settings.ray_token)))]
    assert pool.start_seconds > 0


def test_only_the_right_token_connects(pool: RayPool, settings: Settings) -> None:
    right = connect_with(pool.address, settings.ray_token.read_text())
    assert "connected 7" in right.stdout, right.stderr
    wrong = connect_with(pool.address, "0" * 64)
    assert wrong.returncode != 0
    assert "connected" not in wrong.stdout
    assert "nauthenticated" in wrong.stderr or "authentication token" in wrong.stderr.lower(), wrong.stderr


def test_a_cluster_of_one_process_listens_on_loopback_only(pool: RayPool) -> None:
    assert list(pool.map_tasks(square, [2])) == [(2, 4)]  # so there is a worker
    own = psutil.Process()
    heard: dict[str, set[str]] = {}
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    heard.setdefault(connection.laddr.ip, set()).add(first_word(process))
    assert set(heard) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, heard
    assert any("gcs_server" in name for names in heard.values() for name in names)


def test_tasks_stream_their_results(pool: RayPool) -> None:
    assert dict(pool.map_tasks(square, range(10))) == {number: number * number for number in range(10)}
    assert list(pool.map_tasks(square, [])) == []


def test_items_are_taken_as_cpus_come_free(pool: RayPool) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100, 200):
            taken.append(number)
            yield number

    results = pool.map_tasks(square, items())
    next(results)
    assert len(taken) < 20
    results.close()  # type: ignore[attr-defined]


def test_an_error_of_ours_arrives_as_it_is(pool: RayPool) -> None:
    with pytest.raises(InfeasiblePlanError, match=r"13 is too much. Take less.") as caught:
        list(pool.map_tasks(square, [1, 13, 2]))
    assert caught.value.smallest_target_ns == 169


def test_another_error_is_a_pool_error_with_the_trace(pool: RayPool) -> None:
    with pytest.raises(PoolError, match=r"(?s)failed unexpectedly.*a bug"):
        list(pool.map_tasks(square, [14]))


def test_a_task_that_kills_its_worker_is_a_pool_error(
    pool: RayPool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PoolError, match="A Ray worker died"):
        list(pool.map_tasks(square, [15]))
    assert dict(pool.map_tasks(square, [3])) == {3: 9}
    assert "(raylet)" not in capfd.readouterr().out  # stdout belongs to --json


def test_a_second_pool_in_one_process_is_refused(pool: RayPool, settings: Settings) -> None:
    with pytest.raises(PoolError, match="in use"), RayPool(settings):
        pass
    assert dict(pool.map_tasks(square, [4])) == {4: 16}


def test_the_host_worker_runs_in_its_actor(pool: RayPool, settings: Settings) -> None:
    worker = pool.host_worker(DEVICES)
    facts = worker.facts("desk")
    assert facts == HostWorker(settings, DEVICES).facts("desk").model_copy(
        update={name: getattr(facts, name) for name in ("wall_ns", "storage", "thermal_zones", "current_khz")}
    )
    assert worker.poll("desk", "no-job", 1, 0, 0.0).state == "absent"
    with pytest.raises(AttributeError):
        worker.no_such_method()  # type: ignore[attr-defined]


def test_errors_of_a_device_come_through_the_actor(pool: RayPool, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    text = f"version: 1\ndevices: [{{name: broken, transport: local, workdir: {tmp_path}/file}}]"
    worker = pool.host_worker(parse_inventory(text.encode(), Path("inventory.yaml")).devices)
    with pytest.raises(Exception, match=r"broken: \S+file/bin\S+ cannot be written") as caught:
        worker.facts("broken")
    assert caught.value.device == "broken"  # type: ignore[attr-defined]


def pid_of(worker: HostWorker) -> int:
    """The process of a host's worker."""
    actor: Any = worker.actor  # type: ignore[attr-defined]
    return int(cast(Any, ray).get(actor.__ray_call__.remote(lambda _: os.getpid())))


def test_a_replaced_host_worker_goes_with_its_process(pool: RayPool) -> None:
    before, after = pool.host_worker(DEVICES), pool.host_worker(DEVICES)
    hosts = LabHosts(DEVICES, before, pool)
    facts, pid = hosts.worker.facts("desk"), pid_of(before)
    hosts.own_changed(DEVICES, after, pool.end_worker)
    wait_for(lambda: not psutil.pid_exists(pid), "the replaced worker to end")
    assert hosts.worker.facts("desk").identity == facts.identity
    assert psutil.pid_exists(pid_of(after))


def test_a_job_goes_on_when_its_actor_is_killed(pool: RayPool, settings: Settings, tmp_path: Path) -> None:
    worker = pool.host_worker(DEVICES)
    local = HostWorker(settings, DEVICES)
    with Machine(tmp_path / "machine.lock") as machine:  # so the job does not end before the actor does
        job = probe_job(local.facts("desk").identity, units=20, machine_lock=str(machine.path))
        assert worker.start_job("desk", job)
        pid = agent_pid(Path(local.spool("desk")) / f"jobs/{job.id}/1")
        ray.kill(worker.actor, no_restart=False)  # type: ignore[attr-defined]
        assert worker.poll("desk", job.id, 1, 0, 0.0).state == "running"
    records, offset, state = 0, 0, "running"
    while state == "running":
        polled = worker.poll("desk", job.id, 1, offset, 5.0)
        offset, state = polled.next_offset, polled.state
        records += len(polled.records)
    assert (state, records) == ("ended", 22)
    start = local.poll("desk", job.id, 1, 0, 0.0).records
    assert sum(isinstance(record.payload, StartRecord) for record in start) == 1  # one agent, never resumed
    # Its journal ends a moment before it does.
    wait_for(lambda: not psutil.pid_exists(pid), "the ended agent to leave the process table")


def probe_job(identity: str, units: int, machine_lock: str) -> Job:
    return Job(
        format="stifarm-job",
        version=1,
        id="job-1",
        attempt=1,
        lease=Lease(store="test", counter=1, takeover=False),
        device=identity,
        bundle=None,
        task_data=None,
        engine="native",
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=machine_lock,
        emulation=None,
        gates=OPEN_GATES,
        units=tuple(ProbeUnit(number=number, kind="probe") for number in range(units)),
    )


def test_errors_survive_pickling() -> None:
    for error in (
        TransientError("what", "remedy", device="d"),
        InfeasiblePlanError("w", "r", smallest_target_ns=3),
        SelectorError("w"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


LATE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
SCRIPT = """
import sys, time
from pathlib import Path
from orchestrator.interrupts import lost_interrupts_return
from orchestrator.ray.pool import RayPool
from orchestrator.settings import load_settings
from tests.integration.test_ray_pool import square

def slow(number):
    time.sleep(600)

settings = load_settings(environ={}, home=Path(sys.argv[1]))
with lost_interrupts_return(), RayPool(settings, num_cpus=1) as pool:
    print(dict(pool.map_tasks(square, [5])), flush=True)
    list(pool.map_tasks(slow, [1, 2, 3]))
"""


def left_by(controller: int) -> list[Path]:
    """Its pool's folders. Those of a dead one are anybody's to remove, so also another test's pool's."""
    bases = {Path(tempfile.gettempdir()), Path("/tmp")}
    return [folder for base in bases for folder in base.glob(f"stifarm-ray-{controller}-*")]


def first_word(process: psutil.Process) -> str:
    """What a process is called on its command line; empty for one that has ended."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


def running(process: psutil.Process) -> bool:
    """Whether this very process, not another one under its pid, still runs."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("kill", "clean"), [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_nothing_of_ray_is_left_when_the_controller_goes(
    tmp_path: Path, kill: signal.Signals, clean: bool
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "home")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=REPO,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        while line and "{5: 25}" not in line:
            line = process.stdout.readline()
        assert "{5: 25}" in line
        children = psutil.Process(process.pid).children(recursive=True)
        late = {child.pid for child in children if first_word(child) in LATE}
        assert len(children) >= len(late) + 3
        assert left_by(process.pid)
        process.send_signal(kill)
        process.wait(120)
    # Ray's two monitoring agents notice a kill -9 late and leave by themselves within a minute.
    prompt = [child for child in children if clean or child.pid not in late]
    wait_for(lambda: not [child for child in prompt if running(child)], "Ray's processes to end")
    assert process.returncode != 0
    assert not clean or not left_by(process.pid)
    for child in children:  # those that leave late would write into what is swept
        if running(child):
            child.kill()
    wait_for(lambda: not [child for child in children if running(child)], "the late ones to end")
    session_folder().rmdir()  # what every start does first: sweep folders of dead processes
    wait_for(lambda: not left_by(process.pid), "its folders to be gone")  # another pool may be sweeping too


@pytest.mark.parametrize("listen", [(), ("--listen", "127.0.0.1:0")], ids=["alone", "head"])
def test_sigterm_while_ray_starts_leaves_nothing(tmp_path: Path, listen: tuple[str, ...]) -> None:
    (tmp_path / "inventory.yaml").write_text("version: 1\ndevices: [{name: desk, transport: local}]")
    words = ("--home", str(tmp_path / "home"), "serve", *listen)
    with (tmp_path / "said").open("wb") as said:
        command = (sys.executable, "-c", "from orchestrator.cli import main; main()", *words)
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=said, stderr=said
        )
    seen: dict[int, psutil.Process] = {}

    def starting() -> bool:
        assert process.poll() is None, (tmp_path / "said").read_text()
        seen.update({child.pid: child for child in psutil.Process(process.pid).children(recursive=True)})
        return any("gcs_server" in first_word(child) for child in seen.values())

    with process:
        wait_for(starting, "Ray to be starting")
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            with suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
                seen.update({child.pid: child for child in children})
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    what = (tmp_path / "said").read_text()
    assert process.returncode == 143, what
    assert "serving" not in what
    wait_for(lambda: not [child for child in seen.values() if running(child)], "Ray's processes to end")
    assert not left_by(process.pid)
    assert not (tmp_path / "home/head.json").exists()
    with open_farm(load_settings(environ={}, home=tmp_path / "home", cwd=tmp_path)) as farm:
        with farm.store.reader() as session:
            assert [bool(row.ended_wall_ns) for row in list_controllers(session, ended=True)] == [True]
            assert not session.scalars(select(LeaseRow).where(LeaseRow.owner.is_not(None))).all()
        with controlling(farm):  # the home is free
            pass


@pytest.mark.parametrize(
    ("stopped", "wait_s", "what"),
    [("gcs_server", "0", "A Ray node"), ("raylet", "60", "Ray")],
    ids=["head", "alone"],
)
def test_a_start_that_takes_too_long_is_told_and_leaves_nothing(
    tmp_path: Path, stopped: str, wait_s: str, what: str
) -> None:
    (tmp_path / "inventory.yaml").write_text("version: 1\ndevices: [{name: desk, transport: local}]")
    listen = () if what == "Ray" else ("--listen", "127.0.0.1:0")
    words = ("--home", str(tmp_path / "home"), "serve", "--once", *listen)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            (sys.executable, "-c", "from orchestrator.cli import main; main()", *words),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO), "RAY_gcs_server_port_wait_time_s": wait_s},
            stdout=said,
            stderr=said,
        )
    with process:
        while process.poll() is None:  # as on a machine that gives it no CPU
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.name() == stopped:
                        child.suspend()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
    shown = (tmp_path / "said").read_text()
    assert process.returncode == 1, shown
    assert "Traceback" not in shown
    assert f"error {what} could not be started: " in shown
    assert "This machine may be too busy" in " ".join(shown.split())
    assert not left_by(process.pid)
    folder = f"stifarm-ray-{process.pid}-"
    wait_for(lambda: not any(names(each, folder) for each in psutil.process_iter()), "Ray's processes to end")


def names(process: psutil.Process, folder: str) -> bool:
    """Whether a process's command line names a folder."""
    try:
        return any(folder in word for word in process.cmdline())
    except psutil.Error:
        return False
