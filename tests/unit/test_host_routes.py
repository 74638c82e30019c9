"""Which host a call goes to, and what its device is told when that host is not there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from db.errors import StoreUnreachableError
from db.hosts import forget_host
from orchestrator.errors import HostAwayError, HostLostError, PoolError, StableError
from orchestrator.host_book import hosts_of
from orchestrator.hosts import HostOffer, SeenHost, Versions, gather, read_offer
from orchestrator.inventory import Device, parse_inventory
from orchestrator.lab_hosts import LabHosts
from orchestrator.shipping import ShippedWorker
from orchestrator.worker import HostWorker
from tests.farm_world import DESK, open_world, wait_for, write_inventory


def inventory(*names: str) -> str:
    """An inventory of local devices."""
    return f"version: 1\ndevices: [{', '.join(f'{{name: {name}, transport: local}}' for name in names)}]"


def devices(*names: str) -> tuple[Device, ...]:
    """The devices of such an inventory."""
    return parse_inventory(inventory(*names).encode(), Path("inventory.yaml")).devices


def offer(name: str, *names: str, node: str = "aa") -> HostOffer:
    """What a host with local devices offers."""
    return HostOffer(
        format="stifarm-host",
        version=1,
        versions=Versions.own(),
        name=name,
        machine="machine",
        address="192.0.2.1",
        pid=1,
        node=node,
        joined_wall_ns=1,
        home="/home",
        inventory="/inventory.yaml",
        inventory_text=inventory(*names),
        cache_bytes=1,
        left_wall_ns=0,
    )


class SomeWorker:
    """Says where it is; ``lost``: its host is gone; ``asked``: the devices it was asked about."""

    def __init__(self, where: str) -> None:
        self.where, self.lost = where, False
        self.asked: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def architecture(self, name: str) -> str:
        """The host's and the device's name, in place of one; once it is ``free``."""
        self.asked.append(name)
        assert self.free.wait(60)
        if self.lost:
            raise HostLostError("Its worker is gone.")
        return f"{self.where}/{name}"


class SomeCluster:
    """Hosts as a test says; ``workers`` by node."""

    def __init__(self, *seen: SeenHost) -> None:
        self.seen, self.reachable = seen, True
        self.workers: dict[str, SomeWorker] = {}

    def hosts(self) -> tuple[SeenHost, ...]:
        """What the board would say."""
        if not self.reachable:
            raise PoolError("Nobody answers.")
        return self.seen

    def worker_of(self, offer: HostOffer) -> ShippedWorker:
        """The worker of a host's present node."""
        found = self.workers.setdefault(offer.node, SomeWorker(f"{offer.name}-{offer.node}"))
        return cast(ShippedWorker, found)


class SomePool(SomeCluster):
    """Such a cluster with the controller's own worker."""

    def host_worker(self, devices: Sequence[Device]) -> HostWorker:
        """That of the own devices."""
        return cast(HostWorker, SomeWorker("own"))


def seen(host: HostOffer, state: Any = "present") -> SeenHost:
    """A host on the board."""
    return SeenHost(host.name, host.versions, host, state)


def lab_hosts(cluster: SomeCluster, *before: HostOffer) -> LabHosts:
    """The farm of a controller with one device."""
    return LabHosts(devices("desk"), cast(HostWorker, SomeWorker("own")), cluster, before=before)


def test_calls_go_to_the_host_that_has_the_device() -> None:
    hosts = lab_hosts(SomeCluster(seen(offer("bench1", "one")), seen(offer("bench2", "two", node="bb"))))
    assert [hosts.worker.architecture(name) for name in ("desk", "one", "two")] == [
        "own/desk",
        "bench1-aa/one",
        "bench2-bb/two",
    ]
    assert {device.name: device.host for device in hosts.farm_devices().devices} == {
        "desk": "local",
        "one": "bench1",
        "two": "bench2",
    }


def test_a_host_that_is_away_has_devices_out_of_reach() -> None:
    hosts = lab_hosts(SomeCluster(seen(offer("bench1", "one"), "away")), offer("bench3", "three"))
    for host, device in (("bench1", "one"), ("bench3", "three")):
        with pytest.raises(HostAwayError, match=f"{device}: host {host} is out of reach") as caught:
            hosts.worker.architecture(device)
        assert caught.value.device == device
        assert hosts.worker.progress(device).waits == f"{device}: host {host} is out of reach."
        assert not hosts.in_reach(device)
    assert hosts.in_reach("desk")
    assert hosts.worker.architecture("desk") == "own/desk"


def test_a_host_that_joins_again_gets_the_calls_again() -> None:
    cluster = SomeCluster(seen(offer("bench1", "one")))
    hosts = lab_hosts(cluster)
    assert hosts.worker.architecture("one") == "bench1-aa/one"
    cluster.workers["aa"].lost = True
    with pytest.raises(HostAwayError, match="host bench1 is out of reach"):
        hosts.worker.architecture("one")
    cluster.seen = (seen(offer("bench1", "one", node="cc")),)
    assert hosts.worker.architecture("one") == "bench1-cc/one"


def test_a_host_whose_worker_cannot_be_had_is_away() -> None:
    class Silent(SomeCluster):
        def worker_of(self, offer: HostOffer) -> ShippedWorker:
            raise HostLostError("Ray did not start its worker.")

    hosts = lab_hosts(Silent(seen(offer("bench1", "one"))))
    with pytest.raises(HostAwayError, match="one: host bench1 is out of reach"):
        hosts.worker.architecture("one")


def test_a_replaced_worker_is_ended_with_the_last_call_of_it() -> None:
    before, after, ended = SomeWorker("before"), SomeWorker("after"), queue.Queue[HostWorker]()
    hosts = LabHosts(devices("desk"), cast(HostWorker, before), SomeCluster())
    before.free.clear()
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(hosts.worker.architecture, "desk") for _ in range(2)]
        wait_for(lambda: len(before.asked) == 2, "both calls")
        hosts.own_changed(devices("desk", "new"), cast(HostWorker, after), ended.put)
        assert [hosts.worker.architecture(name) for name in ("desk", "new")] == ["after/desk", "after/new"]
        assert ended.empty()
        before.free.set()
        assert [call.result(60) for call in calls] == ["before/desk"] * 2
    assert ended.get(timeout=60) is cast(HostWorker, before)
    assert hosts.worker.architecture("desk") == "after/desk"
    assert ended.empty()


def test_a_host_that_the_cluster_does_not_name_is_away_until_it_is_forgotten(tmp_path: Path) -> None:
    write_inventory(tmp_path, DESK)
    gone, stays, pool = offer("bench1", "one"), offer("bench2", "two"), SomePool()
    pool.seen = (seen(gone), seen(stays, "away"))
    with open_world(tmp_path) as farm:
        hosts = hosts_of(farm, pool)
        pool.seen = ()  # another head node, which nobody has joined yet
        with pytest.raises(HostAwayError, match="host bench1 is out of reach"):
            wait_for(lambda: not hosts.worker.architecture("one"), "the host to be missed")
        assert [device.name for device in farm.inventory.devices] == ["desk", "one", "two"]
        with farm.store.session() as session:
            forget_host(session, "bench1")
        wait_for(lambda: "one" not in hosts.farm_devices().hosts, "the host to be forgotten")
        assert [device.name for device in farm.inventory.devices] == ["desk", "two"]
        with pytest.raises(StableError, match="one: no host offers it"):
            hosts.worker.architecture("one")
        with pytest.raises(HostAwayError, match="host bench2 is out of reach"):
            hosts.worker.architecture("two")
        pool.seen = (seen(gone),)
        wait_for(lambda: hosts.in_reach("one"), "the host to join again")


def test_where_it_is_not_known_which_hosts_are_counted_on_none_is_dropped() -> None:
    def away() -> frozenset[str]:
        raise StoreUnreachableError("The store is away.")

    own = cast(HostWorker, SomeWorker("own"))
    hosts = LabHosts(devices("desk"), own, SomeCluster(), before=[offer("bench1", "one")], remembered=away)
    with pytest.raises(HostAwayError, match="host bench1 is out of reach"):
        hosts.worker.architecture("one")


def test_without_a_head_node_only_the_own_devices_are_in_reach() -> None:
    cluster = SomeCluster()
    cluster.reachable = False
    hosts = lab_hosts(cluster, offer("bench1", "one"))
    assert hosts.worker.architecture("desk") == "own/desk"
    with pytest.raises(HostAwayError):
        hosts.worker.architecture("one")


def test_a_name_of_two_hosts_is_nobodys() -> None:
    found = gather(devices("desk", "one"), [offer("bench2", "one", "two"), offer("bench1", "two")])
    assert [device.name for device in found.devices] == ["desk"]
    assert dict(found.refused) == {
        "one": "two hosts name it: the controller itself and bench2.",
        "two": "two hosts name it: bench1 and bench2.",
    }


def test_an_offer_of_any_version_is_read_or_refused() -> None:
    good = offer("bench1", "one")
    assert read_offer("bench1", good.to_json(), frozenset({"aa"})).state == "present"
    assert read_offer("bench1", good.to_json(), frozenset()).state == "away"
    endless = b'{"versions": {"stifarm": "", "ray": "", "python": "", "protocol": 1e999}}'
    for data in (b"", b"[]", b'{"versions": {"stifarm": "99"}}', b'{"versions": 3}', endless, b"[" * 9999):
        found = read_offer("bench1", data, frozenset())
        assert (found.state, found.offer) == ("refused", None)
        assert "against none" in found.refused
    broken = good.model_copy(update={"inventory_text": "version: 1\ndevices: [{}]"})
    refused = read_offer("bench1", broken.to_json(), frozenset({"aa"}))
    assert refused.state == "refused"
    assert "bench1:/inventory.yaml:2" in refused.refused
