"""Emulation inside the agent: its accounting, not the machine's clock, is what is compared."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from agent.throttle import AgentThrottle, ReadPacer, owed_sleep_ns, sleep_until, throttle_for
from sti_runtime.engine import NoThrottle
from sti_runtime.messages import Emulation
from sti_runtime.units import NS_PER_S


@given(
    rate=st.integers(1000, 10**10),
    reads=st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**7)), min_size=1, max_size=40),
)
def test_a_paced_device_never_delivers_faster_than_its_rate(rate: int, reads: list[tuple[int, int]]) -> None:
    pacer, now_ns, last_ns = ReadPacer(rate), 0, 0
    for gap_ns, bytes_ in reads:
        now_ns += gap_ns
        due_ns = pacer.due_ns(now_ns, bytes_)
        # One device: busy until the read before has ended, and idle time earns no burst.
        assert due_ns - max(now_ns, last_ns) == -(-bytes_ * NS_PER_S // rate)
        last_ns = due_ns
    assert pacer.paced_bytes * NS_PER_S <= rate * last_ns


def test_a_section_at_half_a_cpu_takes_twice_its_cpu_time() -> None:
    assert owed_sleep_ns(cpu_ns=10, wall_ns=10, share_milli=500) == 10
    assert owed_sleep_ns(cpu_ns=20, wall_ns=10, share_milli=500) == 30  # two threads
    assert owed_sleep_ns(cpu_ns=20, wall_ns=10, share_milli=2000) == 0
    assert owed_sleep_ns(cpu_ns=10, wall_ns=50, share_milli=500) == 0


def test_waits_never_end_early() -> None:
    for wait_ns in (0, 30_000, 2_000_000):
        deadline_ns = time.monotonic_ns() + wait_ns
        sleep_until(deadline_ns)
        assert time.monotonic_ns() >= deadline_ns
    throttle = AgentThrottle(io_bytes_per_s=10_000_000, cpu_share_milli=250)
    start_ns = time.monotonic_ns()
    throttle.after_read(start_ns, 50_000)
    assert time.monotonic_ns() - start_ns >= 5_000_000
    start_ns = time.monotonic_ns()
    with throttle.compute():
        cpu_ns = time.process_time_ns()
        while time.process_time_ns() - cpu_ns < 3_000_000:
            pass
    assert time.monotonic_ns() - start_ns >= 12_000_000


def test_only_the_agents_own_mechanism_throttles() -> None:
    none = Emulation(io_bytes_per_s=None, io_mechanism=None, cpu_share_milli=None, cpu_mechanism=None)
    kernel = Emulation(
        io_bytes_per_s=1000, io_mechanism="cgroup-v2", cpu_share_milli=100, cpu_mechanism="cgroup-v1"
    )
    mixed = Emulation(
        io_bytes_per_s=1000, io_mechanism="cgroup-v2", cpu_share_milli=900, cpu_mechanism="agent"
    )
    assert isinstance(throttle_for(None), NoThrottle)
    assert isinstance(throttle_for(none), NoThrottle)
    assert isinstance(throttle_for(kernel), NoThrottle)
    throttle = throttle_for(mixed)
    assert isinstance(throttle, AgentThrottle)
    start_ns = time.monotonic_ns()
    throttle.after_read(start_ns, 1_000_000_000)
    assert time.monotonic_ns() - start_ns < 60 * NS_PER_S, "reads are the kernel's to limit"
