"""Memory of a lab host's workers: one process for each device against one for all devices.

    python -m bench.hosts [--devices 4]

Each worker is the production actor on a Ray cluster of this machine; its devices are local, and it has
connected to each and been asked for its architecture. Memory is proportional (PSS): pages shared by processes
are divided among them. Ray's own processes of a node are told apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from orchestrator.inventory import Device, parse_inventory
from orchestrator.ray.pool import RayPool
from orchestrator.settings import load_settings

MB = 1_000_000


def local_devices(count: int) -> tuple[Device, ...]:
    """So many local devices."""
    listed = ", ".join(f"{{name: d{number}, transport: local, threads: 1}}" for number in range(count))
    return parse_inventory(f"version: 1\ndevices: [{listed}]".encode(), Path("inventory.yaml")).devices


def workers_memory_bytes(folder: Path, groups: Sequence[Sequence[Device]]) -> tuple[int, int]:
    """PSS of the actors, one for each group of devices, and of all of Ray's other processes."""
    with RayPool(load_settings(environ={}, cwd=folder), num_cpus=1) as pool:
        workers = [pool.host_worker(group) for group in groups]
        for worker, group in zip(workers, groups, strict=True):
            for device in group:
                worker.architecture(device.name)
        actors = others = 0
        for process in psutil.Process().children(recursive=True):
            pss = process.memory_full_info().pss
            if "HostActor" in "".join(process.cmdline()[:1]):
                actors += pss
            else:
                others += pss
    return actors, others


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=4)
    devices = local_devices(parser.parse_args().devices)
    print(f"{'devices':>8} {'workers':>8} {'workers MB':>11} {'MB a device':>12} {'Ray besides, MB':>16}")
    with tempfile.TemporaryDirectory() as folder:
        for groups in ([[device] for device in devices], [devices]):
            actors, others = workers_memory_bytes(Path(folder), groups)
            row = (len(devices), len(groups), actors / MB, actors / len(devices) / MB, others / MB)
            print("{:>8} {:>8} {:>11.0f} {:>12.1f} {:>16.0f}".format(*row))


if __name__ == "__main__":
    main()
