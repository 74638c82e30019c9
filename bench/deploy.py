"""What a deploy costs: first, and with nothing to send, to the three devices of the shipped inventory.

    python -m bench.deploy [--rounds 20]

Controller start-up (Ray) is printed beside it. Everything happens in a temporary home.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from db.statistics import median_interval
from orchestrator import fleet
from orchestrator.cli.demo import NAME, prepare
from orchestrator.demo.demo_task import TASK
from orchestrator.dispatch import Worker
from orchestrator.farm import Farm, open_farm
from orchestrator.inventory import Device
from orchestrator.measure import Work
from orchestrator.ray_pool import RayPool
from orchestrator.settings import load_settings

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="stifarm-bench-") as folder:
        shutil.copy(ROOT / "inventory.yaml", folder)
        settings = load_settings(environ={}, cwd=Path(folder))
        with open_farm(settings) as farm:
            bundle = prepare(farm, quiet=True)
            work = Work.of(farm, bundle, TASK.name)
            rows = settings.tasks / f"{work.task_data}.safetensors"
            devices = farm.inventory.devices
            with RayPool(settings) as pool:
                worker = pool.host_worker(devices)
                first_s = _deploy(farm, worker, devices, bundle.bundle.path, rows)
                again_s = [_deploy(farm, worker, devices, bundle.bundle.path, rows) for _ in range(rounds)]
            size = sum(bundle.bundle.file_sizes().values())
    interval = median_interval([round(s * 1e9) for s in again_s])
    bounds = "" if interval is None else f" [{interval.low / 1e6:.1f}, {interval.high / 1e6:.1f}]"
    print(f"bundle {NAME}: {size / 1e6:.1f} MB, {len(devices)} devices, one after the other")
    print(f"controller start-up (Ray)   {pool.start_seconds:8.2f} s")
    print(f"first deploy                {first_s:8.2f} s")
    print(
        f"no-change deploy, median of {rounds}: {statistics.median(again_s) * 1e3:.1f} ms"
        f"{bounds} (95 %), largest {max(again_s) * 1e3:.1f} ms"
    )


def _deploy(farm: Farm, worker: Worker, devices: tuple[Device, ...], bundle: Path, rows: Path) -> float:
    began = time.perf_counter()
    for result in fleet.deploy(farm, worker, devices, bundle, [rows]):
        if result.error is not None:
            raise result.error
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
