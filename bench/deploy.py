"""What a deploy costs beside a plain copy of the same bytes over the same link.

    python -m bench.deploy [--rounds 7] [--rate 40] [--devices 10] [--over adb]

The device is this machine, reached by ssh or adb over a link that the kernel limits to so many MB/s (40: what
USB 2 carries; 0: not at all) and whose bytes it counts. Beside each deploy of a 100 MB bundle, its connection
included, the stock client (sftp, adb push) copies a file of the same bytes; rounds alternate. Needs root,
iproute2, and openssh or adb with AOSP's adbd (STIFARM_ADBD).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.deploy_adb import Adbd
from bench.deploy_link import Link, Sshd
from bench.figures import figure, paired_ratio
from orchestrator.inventory import parse_inventory
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from sti_runtime.bundle_build import build_bundle
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes

ENDS: dict[str, type[Sshd | Adbd]] = {"ssh": Sshd, "adb": Adbd}
MB = 1_000_000
ROWS_BYTES = 100_000
_STEP_S = 0.002


def config(layers: int = 3, vocab: int = 5000) -> ModelConfig:
    """BERT-base's width; with three layers at 32 bits and these embeddings a bundle of 100 MB."""
    head = HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes"))
    return ModelConfig(
        family="bert", layers=layers, heads=12, hidden=768, ffn=3072, vocab=vocab, positions=128,
        position_offset=0, token_types=2, layer_norm_eps=1e-12, activation="gelu", pad_id=0, head=head,
    )  # fmt: skip


def make_bundle(folder: Path) -> Path:
    """A bundle of random weights: nothing in it can be compressed or is there twice."""
    random = np.random.default_rng(1)
    model = config()
    shapes = tensor_shapes(model).items()
    return build_bundle(
        model,
        {name: random.standard_normal(shape, np.float32) for name, shape in shapes},
        model_digest=hashlib.sha256(b"bench").hexdigest(),
        submodels=all_submodels(model.layers, model.heads),
        untrained=True,
        out_root=folder,
        fidelities=(32,),
    )


@dataclass
class Rig:
    """The devices of one link and what is sent to them."""

    link: Link
    end: Sshd | Adbd
    folder: Path
    devices: int
    bundle: Path = field(init=False)
    plain: Path = field(init=False)
    rows: Path = field(init=False)

    def __post_init__(self) -> None:
        self.bundle = make_bundle(self.folder / "bundles")
        self.plain = self.folder / "plain"
        self.plain.write_bytes(b"".join(path.read_bytes() for path in sorted(self.bundle.iterdir())))
        self.rows = self.folder / "rows"
        self.rows.write_bytes(np.random.default_rng(2).bytes(ROWS_BYTES))

    def worker(self) -> HostWorker:
        """A new one: nothing is connected or known."""
        text = "version: 1\ndevices:\n" + "".join(
            f"  - {{name: d{number}, {self.end.inventory_fields()}, workdir: {self.workdir(number)}}}\n"
            for number in range(self.devices)
        )
        devices = parse_inventory(text.encode(), self.folder / "inventory.yaml").devices
        return HostWorker(load_settings(environ={}, cwd=self.folder), devices)

    def workdir(self, number: int) -> Path:
        """A device's work folder."""
        return self.folder / f"device-{number}"

    def forget(self, number: int) -> None:
        """Remove the content of a device; the agent stays."""
        for kind in ("bundles", "incoming", "tasks"):
            shutil.rmtree(self.workdir(number) / kind, ignore_errors=True)

    def deploy(self, worker: HostWorker, number: int = 0) -> int:
        """Bytes of the bundle that were sent."""
        return worker.deploy(f"d{number}", self.bundle, [self.rows])[0].bytes_sent

    def timed_deploy(self) -> int:
        """A deploy by a new worker; ns."""
        worker = self.worker()
        try:
            return _timed(lambda: self.deploy(worker))
        finally:
            worker.close()


def _timed(action: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - began


def first_deploys(rig: Rig, rounds: int) -> None:
    """Against the plain copy."""
    size = rig.plain.stat().st_size
    ours: list[int] = []
    theirs: list[int] = []
    for number in range(rounds):
        steps: list[Callable[[], None]] = [
            lambda: ours.append(rig.timed_deploy()),
            lambda: theirs.append(_timed(lambda: rig.end.put(rig.plain, rig.folder / "copy"))),
        ]
        for step in steps[:: 1 if number % 2 else -1]:
            rig.forget(0)
            step()
    for name, times in (("stifarm deploy", ours), (rig.end.plain_name, theirs)):
        rates = figure([round(size * 1e9 / ns) for ns in times])
        print(f"{name:16} {figure(times).text(1e9, 2)} s, {rates.text(MB)} MB/s")
    print(f"throughput, ours ÷ theirs {paired_ratio(theirs, ours).text(digits=2)}   (at least 0.8)")


def no_change(rig: Rig, rounds: int) -> None:
    """Time and bytes on the link of a deploy that finds everything there, its connection included."""
    times: list[int] = []
    passed: list[int] = []
    for _ in range(rounds):
        before = sum(rig.link.passed_bytes())
        times.append(rig.timed_deploy())
        passed.append(sum(rig.link.passed_bytes()) - before)
    print(f"no change, connecting     {figure(times).text(1e6)} ms   (under 1 s)")
    print(f"    on the link           {figure(passed).text(1e3)} kB   (under 64 kB)")
    worker = rig.worker()
    rig.deploy(worker)
    before = sum(rig.link.passed_bytes())
    connected = [_timed(lambda: rig.deploy(worker)) for _ in range(rounds)]
    each = (sum(rig.link.passed_bytes()) - before) / rounds
    worker.close()
    print(f"no change, connected      {figure(connected).text(1e6)} ms, {each / 1e3:.1f} kB")


def interrupted(rig: Rig, rounds: int) -> None:
    """The connection is cut half-way; the worker connects again and goes on. What is sent twice?"""
    size = sum(path.stat().st_size for path in rig.bundle.iterdir())
    again = []
    for _ in range(rounds):
        rig.forget(0)
        whole = _passed(rig, lambda: rig.timed_deploy())
        rig.forget(0)
        cut = _passed(rig, lambda: _deploy_with_cut(rig, size // 2))
        again.append(max(0, cut - whole))
    print(f"sent again after a cut    {figure(again).text(1e3, 0)} kB   (at most a chunk: 2,359 kB here)")


def _passed(rig: Rig, action: Callable[[], object]) -> int:
    before = rig.link.passed_bytes()[0]
    action()
    return rig.link.passed_bytes()[0] - before


def _deploy_with_cut(rig: Rig, at_bytes: int) -> None:
    worker = rig.worker()
    ended = threading.Event()

    def cut() -> None:
        while worker.progress("d0").sent_bytes < at_bytes and not ended.wait(_STEP_S):
            pass
        rig.end.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        rig.deploy(worker)
    finally:
        ended.set()
        cutter.join()
        worker.close()


def all_at_once(rig: Rig) -> None:
    """All devices in parallel, against what the link needs for the bytes that passed."""
    worker = rig.worker()
    for number in range(rig.devices):
        worker.facts(f"d{number}")  # connects, and brings the agent
        rig.forget(number)
    before = rig.link.passed_bytes()[0]
    with ThreadPoolExecutor(rig.devices) as pool:
        took_ns = _timed(
            lambda: list(pool.map(lambda number: rig.deploy(worker, number), range(rig.devices)))
        )
    passed = rig.link.passed_bytes()[0] - before
    worker.close()
    needed_s = passed / rig.link.rate_bytes_per_s
    print(
        f"{rig.devices} devices at once        {took_ns / 1e9:.1f} s; the link needs {needed_s:.1f} s for "
        f"{passed / MB:.0f} MB: {took_ns / 1e9 / needed_s:.2f} ×   (at most 1.2)"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=40, help="MB/s; 0: not limited")
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--over", choices=ENDS, default="ssh")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="stifarm-bench-") as name,
        Link(round(options.rate * MB)) as link,
        ENDS[options.over](link, Path(name)) as end,
    ):
        rig = Rig(link, end, Path(name), options.devices)
        limit = f"{options.rate:g} MB/s" if options.rate else "not limited"
        print(f"bundle of {rig.plain.stat().st_size / MB:.1f} MB over {options.over}, link {limit}")
        rig.timed_deploy()
        first_deploys(rig, options.rounds)
        rig.timed_deploy()
        no_change(rig, options.rounds)
        interrupted(rig, min(3, options.rounds))
        if options.rate and options.devices > 1:
            all_at_once(rig)


if __name__ == "__main__":
    main()
