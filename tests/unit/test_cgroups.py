"""Control groups, the pure parts, and what is written where (in a folder that stands for a hierarchy)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cgroups import (
    MIN_QUOTA_US,
    CgroupUnavailableError,
    Hierarchies,
    apply_limits,
    block_device,
    cpu_limits,
    find_hierarchies,
    io_limits,
    launch_prefix,
    quota_and_period_us,
)

V1_MOUNTS = """\
proc /proc proc rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/blkio cgroup rw,blkio 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""


def test_hierarchies_are_found_in_the_mounts() -> None:
    root = Path("/sys/fs/cgroup")
    assert find_hierarchies(V1_MOUNTS) == Hierarchies(root / "cpu,cpuacct", root / "blkio", root / "unified")
    assert find_hierarchies("cgroup2 /sys/fs/my\\040group cgroup2 rw 0 0\n") == Hierarchies(
        None, None, Path("/sys/fs/my group")
    )
    assert find_hierarchies("") == Hierarchies(None, None, None)


@given(st.integers(1, 1_000_000))
def test_a_quota_is_short_and_gives_the_share(share_milli: int) -> None:
    quota_us, period_us = quota_and_period_us(share_milli)
    assert quota_us >= MIN_QUOTA_US
    assert MIN_QUOTA_US <= period_us <= 1_000_000
    assert abs(quota_us * 1000 / period_us - share_milli) <= share_milli * 0.001
    if share_milli <= 2000:
        assert quota_us <= 2000


def test_limits_of_version_1(tmp_path: Path) -> None:
    hierarchies = Hierarchies(tmp_path / "cpu", tmp_path / "blkio", None)
    cpu, io = cpu_limits(hierarchies, "a", 250), io_limits(hierarchies, "a", 4_000_000, "254:0")
    assert cpu.mechanism == io.mechanism == "cgroup-v1"
    assert cpu.writes == (("cpu.cfs_period_us", "4000"), ("cpu.cfs_quota_us", "1000"))
    assert io.writes == (("blkio.throttle.read_bps_device", "254:0 4000000"),)
    assert launch_prefix([io, cpu])[-3:] == (
        str(tmp_path / "blkio/stifarm/a/cgroup.procs"),
        str(tmp_path / "cpu/stifarm/a/cgroup.procs"),
        "--",
    )
    assert launch_prefix([]) == ()


def test_version_2_is_taken_where_it_hands_out_the_controller(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    hierarchies = Hierarchies(None, tmp_path / "blkio", tmp_path)
    cpu = cpu_limits(hierarchies, "a", 1500)
    assert (cpu.mechanism, cpu.writes) == ("cgroup-v2", (("cpu.max", "1500 1000"),))
    assert io_limits(hierarchies, "a", 10, "8:0").mechanism == "cgroup-v1"
    (tmp_path / "cgroup.subtree_control").write_text("cpu io\n")
    io = io_limits(hierarchies, "a", 10, "8:0")
    assert (io.mechanism, io.writes) == ("cgroup-v2", (("io.max", "8:0 rbps=10"),))
    assert len(launch_prefix([cpu, io])) == len(launch_prefix([cpu]))  # one group, entered once


def test_no_hierarchy_and_one_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    nothing = Hierarchies(None, None, None)
    with pytest.raises(CgroupUnavailableError, match="offers CPU limits"):
        cpu_limits(nothing, "a", 250)
    with pytest.raises(CgroupUnavailableError, match="offers limits of reading"):
        io_limits(nothing, "a", 250, "8:0")
    (tmp_path / "file").write_text("")
    blocked = Hierarchies(tmp_path / "file", None, None)
    with pytest.raises(CgroupUnavailableError, match="cannot be set up: Not a directory"):
        apply_limits([cpu_limits(blocked, "a", 250)])
    plain = Hierarchies(tmp_path, None, None)  # a folder, but no hierarchy: its files do not appear
    with pytest.raises(CgroupUnavailableError, match="cannot be set up: No such file"):
        apply_limits([cpu_limits(plain, "a", 250)])


def test_the_whole_disk_below_a_partition_is_limited(tmp_path: Path) -> None:
    import os

    device = tmp_path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    sys_dev = tmp_path / "dev"
    (sys_dev / "disk/part1").mkdir(parents=True)
    (sys_dev / "disk/dev").write_text("8:0\n")
    with pytest.raises(CgroupUnavailableError, match="is on no block device"):
        block_device(tmp_path, sys_dev)
    (sys_dev / name).symlink_to("disk/part1")
    (sys_dev / "disk/part1/partition").write_text("1\n")
    assert block_device(tmp_path, sys_dev) == "8:0"
