"""A host's side of a fleet's jobs: what is held back, what one drain holds, what an order replaces."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest

from orchestrator.errors import LinkError
from orchestrator.pump.watch import DRAIN_RECORDS, HostPump, Order, Stretch
from orchestrator.tailing import PollResult
from sti_runtime.messages import EndRecord, Job, JournalRecord

LONG_S = 60.0


def records(count: int, first: int = 0) -> tuple[JournalRecord, ...]:
    """Records of a journal; what they say does not matter here."""
    end = EndRecord(type="end", done=0, failed=0, refused=None)
    return tuple(
        JournalRecord(seq=first + number, boot_id="b", wall_ns=1, payload=end) for number in range(count)
    )


class Scripted:
    """Devices whose looks a test has written; behind the last one they run on."""

    def __init__(self) -> None:
        self.looks: dict[str, list[PollResult | Exception]] = defaultdict(list)
        self.asked: list[tuple[str, int]] = []
        self._lock = threading.Lock()

    def start_job(self, name: str, job: Job) -> bool:
        """Always there already."""
        return False

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        """The next look of a device."""
        with self._lock:
            self.asked.append((name, offset))
            look = self.looks[name].pop(0) if self.looks[name] else PollResult((), offset, "running", "")
        if isinstance(look, Exception):
            raise look
        return look


@pytest.fixture
def devices() -> Scripted:
    return Scripted()


@pytest.fixture
def pump(devices: Scripted) -> Iterator[HostPump]:
    made = HostPump(devices, lambda _: 0.0)
    yield made
    made.close()


def order(number: int, device: str = "d", offset: int = 0) -> Order:
    """An order for a device's job."""
    return Order(number, device, "probe-1", 1, offset)


def only(pump: HostPump, *orders: Order) -> Stretch:
    """The one stretch of the next drain."""
    (stretch,) = pump.exchange(orders, (), LONG_S).stretches
    return stretch


def test_records_of_a_job_that_goes_on_are_told_with_what_comes_later(
    pump: HostPump, devices: Scripted
) -> None:
    devices.looks["d"] = [
        PollResult(records(2), 100, "running", ""),
        PollResult(records(1, 2), 150, "running", ""),
        PollResult(records(1, 3), 200, "ended", ""),
    ]
    stretch = only(pump, order(1, offset=7))
    assert stretch.polled == PollResult(records(4), 200, "ended", "")
    assert devices.asked == [("d", 7), ("d", 100), ("d", 150)]


def test_what_a_job_waits_for_is_told_once(pump: HostPump, devices: Scripted) -> None:
    waits = PollResult((), 0, "running", "temperature")
    devices.looks["d"] = [waits]
    assert only(pump, order(1)).polled == waits
    devices.looks["d"] = [waits, waits, PollResult((), 0, "ended", "")]
    assert only(pump, order(2)).polled == PollResult((), 0, "ended", "")


def test_an_error_comes_behind_the_records_before_it(pump: HostPump, devices: Scripted) -> None:
    lost = LinkError("its cable is out.", device="d")
    devices.looks["d"] = [PollResult(records(2), 100, "running", ""), lost, lost]
    assert only(pump, order(1)).polled == PollResult(records(2), 100, "running", "")
    stretch = only(pump, order(2, offset=100))
    assert stretch.polled is None
    assert isinstance(stretch.error, LinkError)


def test_a_drain_is_bounded_and_holds_one_stretch_at_least(pump: HostPump, devices: Scripted) -> None:
    count = DRAIN_RECORDS // 2 + 1
    for name in ("a", "b", "c"):
        devices.looks[name] = [PollResult(records(count), count, "ended", "")]
    pump.exchange([order(1, "a"), order(2, "b"), order(3, "c")], (), 0)
    drained = [only(pump) for _ in range(3)]
    assert sorted(stretch.device for stretch in drained) == ["a", "b", "c"]


def test_a_device_is_watched_until_another_order_or_none(pump: HostPump, devices: Scripted) -> None:
    devices.looks["d"] = [PollResult((), 0, "ended", ""), PollResult((), 0, "stopped", "")]
    assert only(pump, order(1)).number == 1
    # The same order changes nothing; its stretch was given, and waits for what follows.
    assert pump.exchange([order(1)], (), 0).stretches == ()
    assert only(pump, order(2)).number == 2
    assert pump.exchange((), ["d"], 0).stretches == ()
    asked = len(devices.asked)
    assert pump.exchange((), (), 0).stretches == ()
    assert len(devices.asked) == asked
