"""The native agent's deploy beside the Python agent's: same verbs, same answers, same files.

The executable is built with sanitizers; a test that needs the real one says why. Python's half of each
comparison runs in this process.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent import chunks
from agent.spool import Spool
from sti_runtime.records import canonical_json, sha256_hex
from tests.agent_data import (
    accept_pack,
    make_pack,
    manifest_of,
    task_piece,
    tiny_bundle,
)
from tests.agents import Agent
from tests.native.core import (
    call,
    files_below,
    same_answer,
)


def test_a_deploy_with_any_damage_goes_the_same_way_on_both(
    agent: Agent, bundle: Path, tmp_path: Path
) -> None:
    """Random packs, damaged, cut, repeated; content damaged on storage; a bundle that shares chunks."""
    rng = random.Random(9)
    spools = (Spool.open(tmp_path / "native"), Spool.open(tmp_path / "python"))
    manifest = bundle / "manifest.json"
    both = partial(same_answer, agent, spools)

    def take(packs: Sequence[Path]) -> dict[str, Any]:
        words = ("accept", bundle.name)
        return both(words, lambda s: accept_pack(s, bundle.name, packs[1]), stdin=packs[0])

    for _ in range(6):
        wanted = both(("missing", manifest), lambda s: chunks.missing(s, manifest))["missing"]
        part = rng.sample(wanted, rng.randrange(len(wanted) + 1))
        packs = [make_pack(spool, bundle, part) for spool in spools]
        data = bytearray(packs[0].read_bytes())
        header = data.index(b"\n") + 1
        if len(data) > header:
            data[rng.randrange(header, len(data))] ^= 0x10
            del data[rng.randrange(header, len(data)) :]
        for pack in packs:
            pack.write_bytes(data)
        take(packs)
        both(("commit", bundle.name), lambda s: chunks.commit(s, bundle.name))
        assert files_below(spools[0].root) == files_below(spools[1].root)
    wanted = both(("missing", manifest), lambda s: chunks.missing(s, manifest))["missing"]
    packs = [make_pack(spool, bundle, wanted) for spool in spools]
    report = take(packs)
    assert report["remaining"] == 0
    for spool in spools:
        with (spool.incoming_bundle(bundle.name) / "k32.bin").open("r+b") as stream:
            stream.seek(5000)
            stream.write(b"\x99")
    damaged = both(("commit", bundle.name), lambda s: chunks.commit(s, bundle.name))
    assert damaged["error"]["type"] == "DigestError"
    assert "1 of" in damaged["error"]["what"]
    wanted = both(("missing", manifest), lambda s: chunks.missing(s, manifest))["missing"]
    assert len(wanted) == 1
    packs = [make_pack(spool, bundle, wanted) for spool in spools]
    take(packs)
    assert both(("commit", bundle.name), lambda s: chunks.commit(s, bundle.name))["state"] == "committed"
    assert both(("commit", bundle.name), lambda s: chunks.commit(s, bundle.name))["state"] == "already"
    assert both(("missing", manifest), lambda s: chunks.missing(s, manifest))["complete"]
    assert both(("verify", bundle.name), lambda s: chunks.verify(s, bundle.name))["state"] == "intact"

    wider = tiny_bundle(tmp_path, fidelities=(2, 3, 32))
    for spool in spools:
        with (spool.bundle(bundle.name) / "k2.bin").open("r+b") as stream:
            stream.write(b"\xff\xff\xff\xff")
        (spool.bundles / "no-bundle").mkdir()
    report = both(("missing", wider / "manifest.json"), lambda s: chunks.missing(s, wider / "manifest.json"))
    assert 0 < report["copied"] < report["total"]
    verdict = both(("verify", bundle.name), lambda s: chunks.verify(s, bundle.name))
    assert (verdict["state"], verdict["damaged"]) == ("damaged", [0])
    assert files_below(spools[0].root) == files_below(spools[1].root)


@pytest.mark.parametrize("native_first", [True, False])
def test_one_agent_begins_a_deploy_and_the_other_ends_it(
    agent: Agent, spool: Spool, bundle: Path, native_first: bool
) -> None:
    """Each step by the agent that did not do the one before."""
    manifest = bundle / "manifest.json"
    natives = itertools.cycle([native_first, not native_first])

    def step(verb: str, *words: Any) -> dict[str, Any]:
        return deploy_verb(agent, spool, next(natives), verb, *words)

    wanted = step("missing", manifest)["missing"]
    half = wanted[::2]
    report = step("accept", bundle.name, make_pack(spool, bundle, half))
    assert report["remaining"] == len(wanted) - len(half)
    rest = step("missing", manifest)["missing"]
    assert sorted(half + rest) == wanted
    assert step("accept", bundle.name, make_pack(spool, bundle, rest))["remaining"] == 0
    assert step("commit", bundle.name)["state"] == "committed"
    assert step("verify", bundle.name)["state"] == "intact"
    assert step("missing", manifest)["complete"]
    for path in bundle.iterdir():
        assert (spool.bundle(bundle.name) / path.name).read_bytes() == path.read_bytes()
    assert list(spool.incoming.iterdir()) == []


def deploy_verb(agent: Agent, spool: Spool, native: bool, verb: str, *words: Any) -> dict[str, Any]:
    """A verb by one of the two agents; the last word of `accept` is the file that is its input."""
    if not native:
        return accept_pack(spool, *words) if verb == "accept" else getattr(chunks, verb)(spool, *words)
    options = {"stdin": words[-1]} if verb == "accept" else {}
    code, report = call(agent, spool, verb, *(words[:-1] if options else words), **options)
    assert code == 0, report
    return report


@pytest.mark.parametrize("native", [True, False])
def test_a_torn_line_of_the_done_list_never_becomes_a_whole_one(
    agent: Agent, spool: Spool, bundle: Path, native: bool
) -> None:
    """Power fails while "12" of "123" is written; the next numbers are appended behind it. The list of what
    has arrived counts no more after that."""
    manifest = bundle / "manifest.json"
    do = partial(deploy_verb, agent, spool, native)
    wanted = do("missing", manifest)["missing"]
    do("accept", bundle.name, make_pack(spool, bundle, wanted[:3]))
    with spool.done_list(bundle.name).open("ab") as stream:
        stream.write(b"%d" % wanted[-1])
    do("accept", bundle.name, make_pack(spool, bundle, wanted[3:5]))
    spool.arrived_list(bundle.name).unlink()
    for reader in (True, False):
        assert deploy_verb(agent, spool, reader, "missing", manifest)["missing"] == wanted[5:]
    nonsense = b"-1\n999999999\n9999999999\n 1\n1 \nx\n\n0x1\n" + b"7" * 5000 + b"\n"
    spool.done_list(bundle.name).write_bytes(nonsense)
    assert do("missing", manifest)["missing"] == wanted


@pytest.mark.parametrize("native", [True, False])
def test_what_a_killed_announcement_leaves_is_no_part_of_the_bundle(
    agent: Agent, spool: Spool, bundle: Path, native: bool
) -> None:
    do = partial(deploy_verb, agent, spool, native)
    do("missing", bundle / "manifest.json")
    (spool.incoming_bundle(bundle.name) / ".manifest.json.77.partial").write_bytes(b"{")
    wanted = do("missing", bundle / "manifest.json")["missing"]
    do("accept", bundle.name, make_pack(spool, bundle, wanted))
    assert do("commit", bundle.name)["state"] == "committed"


def test_equal_chunks_are_sent_once(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    """Two layers of the same weights give versions of equal bytes."""
    bundle = tiny_bundle(tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    versions = manifest["regions"][0]["versions"]
    region = bundle / "k2.bin"
    data, size = region.read_bytes(), versions[0]["length"]
    assert versions[1]["length"] == size
    region.write_bytes(data[:size] + data[:size] + data[2 * size :])
    versions[1] |= {key: versions[0][key] for key in ("sha256", "payload_bytes", "outliers")}
    (bundle / "manifest.json").write_bytes(canonical_json(manifest))
    twin = bundle.rename(tmp_path / sha256_hex(canonical_json(manifest)))
    wanted = call(agent, spool, "missing", twin / "manifest.json")[1]["missing"]
    assert 0 in wanted
    assert 1 not in wanted
    pack = make_pack(spool, twin, wanted)
    report = call(agent, spool, "accept", twin.name, stdin=pack)[1]
    assert (report["accepted"], report["remaining"]) == (len(wanted), 0)
    assert call(agent, spool, "commit", twin.name)[1]["state"] == "committed"
    assert (spool.bundle(twin.name) / "k2.bin").read_bytes() == region_of(twin)


def region_of(bundle: Path) -> bytes:
    return (bundle / "k2.bin").read_bytes()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[0, 0]\n", "distinct"),
        (b"[100000]\n", "distinct"),
        (b"[-1]\n", "distinct"),
        (b"[99999999999999999999]\n", "distinct"),
        (b"[true]\n", "list of integers"),
        (b"[1.0]\n", "list of integers"),
        (b'{"a": 1}\n', "list of integers"),
        (b"[" * 500_000 + b"\n", "list of integers"),
        (b"not json\n", "list of integers"),
        (b"\n", "list of integers"),
        (b"[0]", "no end"),
        (b"", "no end"),
        (b"[" + b"1," * 600_000 + b"1]\n", "no end within"),
    ],
)
def test_a_malformed_pack_is_refused(
    agent: Agent, spool: Spool, bundle: Path, tmp_path: Path, content: bytes, cause: str
) -> None:
    call(agent, spool, "missing", bundle / "manifest.json")
    before = files_below(spool.root)
    pack = tmp_path / "bad.pack"
    pack.write_bytes(content)
    code, report = call(agent, spool, "accept", bundle.name, stdin=pack)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert cause in report["error"]["what"]
    assert files_below(spool.root) == before


def test_links_in_the_spool_lead_nowhere(agent: Agent, spool: Spool, bundle: Path, tmp_path: Path) -> None:
    """A file of a bundle, the done list or task data replaced by a link: what it points at stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    wanted = call(agent, spool, "missing", bundle / "manifest.json")[1]["missing"]
    region = spool.incoming_bundle(bundle.name) / "k2.bin"
    region.unlink()
    region.symlink_to(victim)
    assert call(agent, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, wanted))[0] == 2
    assert call(agent, spool, "missing", bundle / "manifest.json")[0] == 2
    assert call(agent, spool, "commit", bundle.name)[1]["error"]["type"] == "FormatError"
    region.unlink()
    call(agent, spool, "missing", bundle / "manifest.json")
    spool.done_list(bundle.name).unlink(missing_ok=True)
    spool.done_list(bundle.name).symlink_to(victim)
    assert call(agent, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, wanted))[0] == 2
    digest = sha256_hex(b"mine")
    spool.task_partial(digest).symlink_to(victim)
    assert call(agent, spool, "accept-task", digest, stdin=task_piece(spool, 0, b"mine", 4))[0] == 2
    inside = spool.bundles / "link"
    inside.symlink_to(tmp_path)
    assert call(agent, spool, "collect")[0] == 0
    assert not inside.is_symlink()
    assert victim.read_text() == "mine"


def test_a_file_that_does_not_belong_is_not_committed(agent: Agent, spool: Spool, bundle: Path) -> None:
    wanted = call(agent, spool, "missing", bundle / "manifest.json")[1]["missing"]
    call(agent, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, wanted))
    folder = spool.incoming_bundle(bundle.name)
    for name in ("extra.bin", ".hidden"):
        (folder / name).write_bytes(b"x")
        code, report = call(agent, spool, "commit", bundle.name)
        assert (code, report["error"]["type"]) == (1, "FormatError")
        assert f": {name} is missing, of a wrong size" in report["error"]["what"]
        (folder / name).unlink()
    with (folder / "k2.bin").open("ab") as stream:
        stream.write(b"x")
    assert ": k2.bin is missing" in call(agent, spool, "commit", bundle.name)[1]["error"]["what"]


def edited_manifest(bundle: Path, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    edit(manifest)
    path.write_bytes(canonical_json(manifest))
    return path


def test_space_is_checked_before_the_first_byte(
    agent: Agent, spool: Spool, bundle: Path, tmp_path: Path
) -> None:
    def grow(size: int) -> Callable[[dict[str, Any]], None]:
        def edit(manifest: dict[str, Any]) -> None:
            last = manifest["files"][-1]
            sha256 = last["chunks"][-1]["sha256"][::-1]
            length = min(size, 2**63 - 1 - last["bytes"])
            last["chunks"].append({"offset": last["bytes"], "length": length, "sha256": sha256})
            last["bytes"] += length

        return edit

    for size in (2**50, 2**62, 2**63 - 1):
        huge = edited_manifest(bundle, tmp_path / "huge.json", grow(size))
        code, report = call(agent, spool, "missing", huge)
        assert (code, report["error"]["type"]) == (1, "ResourceError")
        assert " more bytes, " in report["error"]["what"]
        assert list(spool.incoming.iterdir()) == []


def test_storage_that_fills_while_files_are_allocated(agent: Agent, spool: Spool, bundle: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    code, report = call(agent, spool, "missing", bundle / "manifest.json", preexec_fn=limit)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    assert call(agent, spool, "missing", bundle / "manifest.json")[0] == 0


@pytest.mark.parametrize("name", ["../../escape.bin", "/etc/passwd", ".hidden", "a/b", "", "manifest.json"])
def test_a_path_that_escapes_is_refused(
    agent: Agent, spool: Spool, bundle: Path, tmp_path: Path, name: str
) -> None:
    bad = edited_manifest(bundle, tmp_path / "bad.json", lambda m: m["files"][0].update(file=name))
    code, report = call(agent, spool, "missing", bad)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert list(spool.incoming.iterdir()) == []


def test_a_deploy_killed_at_random_moments_ends_in_the_same_bundle(
    agent: Agent, spool: Spool, bundle: Path
) -> None:
    rng = random.Random(7)
    everything = range(len(manifest_of(bundle).all_chunks()))
    for attempt in range(18):
        verb = ("missing", "accept", "commit")[attempt % 3]
        pack = make_pack(spool, bundle, everything)
        words: dict[str, tuple[object, ...]] = {
            "missing": (bundle / "manifest.json",),
            "accept": (bundle.name,),
            "commit": (bundle.name,),
        }
        started = agent.start(verb, *words[verb], "--spool", spool.root, stdin=pack)
        time.sleep(rng.uniform(0, 0.06))
        started.kill()
        started.communicate()
        if spool.bundle(bundle.name).exists():
            assert call(agent, spool, "verify", bundle.name)[1]["state"] == "intact"
            assert call(agent, spool, "collect")[1]["removed"]["bundles"] == [bundle.name]
    wanted = call(agent, spool, "missing", bundle / "manifest.json")[1]["missing"]
    call(agent, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, wanted))
    assert call(agent, spool, "commit", bundle.name)[1]["state"] == "committed"
    assert call(agent, spool, "verify", bundle.name)[1]["state"] == "intact"
