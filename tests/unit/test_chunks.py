"""Deploy on the device: only what is lacking, verified from storage, visible whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.chunks import commit, missing, verify
from agent.errors import BusyError
from agent.housekeeping import clean, collect, forget, has
from agent.identity import device_identity, mark_emulated
from agent.locks import hold
from agent.spool import Spool
from sti_runtime.errors import DigestError, FormatError, InputError, ResourceError
from sti_runtime.manifest import MANIFEST_CAP_BYTES
from sti_runtime.records import canonical_json, sha256_hex
from tests.agent_data import accept_held, accept_pack, make_job, make_pack, manifest_of, push_job, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool")


def send(spool: Spool, bundle: Path) -> list[int]:
    """Announce and send what is asked for; returns it."""
    wanted: list[int] = missing(spool, bundle / "manifest.json")["missing"]
    if wanted:
        assert accept_pack(spool, bundle.name, make_pack(spool, bundle, wanted))["rejected"] == []
    return wanted


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def edited_manifest(bundle: Path, path: Path, **changes: object) -> Path:
    """A canonical manifest with top-level fields replaced."""
    path.write_bytes(canonical_json(json.loads((bundle / "manifest.json").read_bytes()) | changes))
    return path


def test_a_bundle_arrives_in_packs_and_appears_whole(spool: Spool, bundle: Path) -> None:
    report = missing(spool, bundle / "manifest.json")
    total = len(manifest_of(bundle).all_chunks())
    assert (report["total"], report["copied"], report["complete"]) == (total, 0, False)
    half = len(report["missing"]) // 2
    for part in (report["missing"][half:], report["missing"][:half]):
        accept_pack(spool, bundle.name, make_pack(spool, bundle, part))
        assert not spool.bundle(bundle.name).exists()
    assert commit(spool, bundle.name)["state"] == "committed"
    assert_same_files(bundle, spool.bundle(bundle.name))
    assert list(spool.incoming.iterdir()) == []
    assert missing(spool, bundle / "manifest.json")["complete"] is True
    assert commit(spool, bundle.name)["state"] == "already"


def test_an_interrupted_push_resumes(spool: Spool, bundle: Path) -> None:
    first = missing(spool, bundle / "manifest.json")["missing"]
    accept_pack(spool, bundle.name, make_pack(spool, bundle, first[:3]))
    with spool.done_list(bundle.name).open("ab") as stream:
        stream.write(b"1")  # a torn line
    assert missing(spool, bundle / "manifest.json")["missing"] == first[3:]
    send(spool, bundle)
    assert commit(spool, bundle.name)["state"] == "committed"


def test_a_corrupted_chunk_is_rejected_and_the_others_kept(spool: Spool, bundle: Path) -> None:
    wanted = missing(spool, bundle / "manifest.json")["missing"]
    pack = make_pack(spool, bundle, wanted)
    damaged = bytearray(pack.read_bytes())
    damaged[-1] ^= 1
    pack.write_bytes(damaged)
    report = accept_pack(spool, bundle.name, pack)
    assert report["rejected"] == [wanted[-1]]
    assert report["accepted"] == len(wanted) - 1
    with pytest.raises(DigestError, match="1 of"):
        commit(spool, bundle.name)
    assert send(spool, bundle) == [wanted[-1]]
    assert commit(spool, bundle.name)["state"] == "committed"


def test_a_pack_that_is_cut_short_keeps_its_whole_chunks(spool: Spool, bundle: Path) -> None:
    wanted = missing(spool, bundle / "manifest.json")["missing"]
    pack = make_pack(spool, bundle, wanted)
    with pack.open("rb+") as stream:
        stream.truncate(pack.stat().st_size - 1)
    with pytest.raises(FormatError, match=rf"ended after {len(wanted) - 1} of {len(wanted)} chunks"):
        accept_pack(spool, bundle.name, pack)
    assert missing(spool, bundle / "manifest.json")["missing"] == [wanted[-1]]


def test_what_follows_the_last_chunk_is_not_read(spool: Spool, bundle: Path) -> None:
    wanted = missing(spool, bundle / "manifest.json")["missing"]
    pack = make_pack(spool, bundle, wanted)
    with pack.open("ab") as stream:
        stream.write(bytes(100_000))
    assert accept_pack(spool, bundle.name, pack)["remaining"] == 0


def test_a_pack_commits_once_nothing_lacks(spool: Spool, bundle: Path) -> None:
    wanted = missing(spool, bundle / "manifest.json")["missing"]
    first = accept_pack(spool, bundle.name, make_pack(spool, bundle, wanted[:2]), commit=True)
    assert (first["state"], first["remaining"] > 0) == ("incoming", True)
    report = accept_pack(spool, bundle.name, make_pack(spool, bundle, wanted[2:]), commit=True)
    assert (report["state"], report["remaining"]) == ("committed", 0)
    assert_same_files(bundle, spool.bundle(bundle.name))
    assert list(spool.incoming.iterdir()) == []


def test_a_done_chunk_is_not_overwritten_by_a_damaged_one(spool: Spool, bundle: Path) -> None:
    wanted = missing(spool, bundle / "manifest.json")["missing"]
    pack = make_pack(spool, bundle, wanted)
    accept_pack(spool, bundle.name, pack)
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    assert accept_pack(spool, bundle.name, pack)["rejected"] == [wanted[-1]]
    assert commit(spool, bundle.name)["state"] == "committed"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[0, 0]\n", "distinct"),
        (b"[100000]\n", "distinct"),
        (b"[-1]\n", "distinct"),
        (b"[true]\n", "list of integers"),
        (b'{"a": 1}\n', "list of integers"),
        (b"[" * 500_000 + b"\n", "list of integers"),
        (b"not json\n", "list of integers"),
        (b"[0]", "no end"),
        (b"", "no end"),
        (b"[" + b"1," * 600_000 + b"1]\n", "no end within"),
    ],
)
def test_a_malformed_pack_is_refused(
    spool: Spool, bundle: Path, tmp_path: Path, content: bytes, cause: str
) -> None:
    missing(spool, bundle / "manifest.json")
    pack = tmp_path / "bad.pack"
    pack.write_bytes(content)
    with pytest.raises(FormatError, match=cause):
        accept_pack(spool, bundle.name, pack)


def test_chunks_of_another_bundle_are_copied_on_the_device(
    spool: Spool, bundle: Path, tmp_path: Path
) -> None:
    send(spool, bundle)
    commit(spool, bundle.name)
    wider = tiny_bundle(tmp_path, fidelities=(2, 3, 32))
    report = missing(spool, wider / "manifest.json")
    chunks = manifest_of(wider).all_chunks()
    assert {chunks[index][0] for index in report["missing"]} == {"k3.bin"}
    assert report["copied"] == len(chunks) - len(manifest_of(wider).region(3).versions)
    assert send(spool, wider) == report["missing"]
    assert commit(spool, wider.name)["state"] == "committed"
    assert_same_files(wider, spool.bundle(wider.name))


def test_a_damaged_chunk_of_another_bundle_is_asked_for_instead(
    spool: Spool, bundle: Path, tmp_path: Path
) -> None:
    send(spool, bundle)
    commit(spool, bundle.name)
    with (spool.bundle(bundle.name) / "k2.bin").open("rb+") as stream:
        stream.write(b"\xff\xff\xff\xff")
    wider = tiny_bundle(tmp_path, fidelities=(2, 3, 32))
    chunks = manifest_of(wider).all_chunks()
    asked = [(chunks[i][0], chunks[i][1].offset) for i in missing(spool, wider / "manifest.json")["missing"]]
    assert ("k2.bin", 0) in asked
    assert {file for file, _ in asked} == {"k2.bin", "k3.bin"}


def test_equal_chunks_are_sent_once(spool: Spool, tmp_path: Path) -> None:
    """Two layers of the same weights give versions of equal bytes."""
    bundle = tiny_bundle(tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    versions = manifest["regions"][0]["versions"]
    region = bundle / "k2.bin"
    data = region.read_bytes()
    size = versions[0]["length"]
    assert versions[1]["length"] == size
    region.write_bytes(data[:size] + data[:size] + data[2 * size :])
    versions[1] |= {key: versions[0][key] for key in ("sha256", "payload_bytes", "outliers")}
    raw = canonical_json(manifest)
    (bundle / "manifest.json").write_bytes(raw)
    twin = bundle.rename(tmp_path / sha256_hex(raw))
    wanted = send(spool, twin)
    assert 0 in wanted
    assert 1 not in wanted
    assert commit(spool, twin.name)["state"] == "committed"
    assert_same_files(twin, spool.bundle(twin.name))


def test_space_is_checked_before_the_first_byte(spool: Spool, bundle: Path, tmp_path: Path) -> None:
    files = json.loads((bundle / "manifest.json").read_bytes())["files"]
    last = files[-1]["chunks"][-1]
    files[-1]["chunks"].append(
        {"offset": files[-1]["bytes"], "length": 2**50, "sha256": last["sha256"][::-1]}
    )
    files[-1]["bytes"] += 2**50
    huge = edited_manifest(bundle, tmp_path / "huge.json", files=files)
    with pytest.raises(ResourceError, match=r"needs \d+ more bytes, \d+ are free"):
        missing(spool, huge)
    assert list(spool.incoming.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escape.bin", "/etc/passwd", ".hidden", "a/b", "", "manifest.json"])
def test_a_path_that_escapes_is_refused(spool: Spool, bundle: Path, tmp_path: Path, name: str) -> None:
    files = json.loads((bundle / "manifest.json").read_bytes())["files"]
    files[0]["file"] = name
    with pytest.raises(FormatError):
        missing(spool, edited_manifest(bundle, tmp_path / "bad.json", files=files))
    assert list(spool.incoming.iterdir()) == []


def test_a_truncated_overlong_or_rewritten_manifest_is_refused(
    spool: Spool, bundle: Path, tmp_path: Path
) -> None:
    raw = (bundle / "manifest.json").read_bytes()
    path = tmp_path / "manifest.json"
    bad = {
        "not a valid": raw[:-1],
        "more than": raw + b" " * MANIFEST_CAP_BYTES,
        "not canonical": raw + b" ",
        "cannot be read": None,
    }
    for cause, content in bad.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FormatError, match=cause):
            missing(spool, path)
    assert list(spool.incoming.iterdir()) == []


def test_damage_on_storage_is_found_by_commit_and_mended(spool: Spool, bundle: Path) -> None:
    send(spool, bundle)
    with (spool.incoming_bundle(bundle.name) / "k32.bin").open("rb+") as stream:
        stream.seek(5000)
        stream.write(b"\x99")
    with pytest.raises(DigestError, match=r"1 of .*k32\.bin"):
        commit(spool, bundle.name)
    assert not spool.bundle(bundle.name).exists()
    assert len(send(spool, bundle)) == 1
    assert commit(spool, bundle.name)["state"] == "committed"


def test_a_file_that_does_not_belong_is_not_committed(spool: Spool, bundle: Path) -> None:
    send(spool, bundle)
    (spool.incoming_bundle(bundle.name) / "extra.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"extra\.bin"):
        commit(spool, bundle.name)


def test_verify_sends_a_damaged_bundle_back(spool: Spool, bundle: Path) -> None:
    send(spool, bundle)
    commit(spool, bundle.name)
    assert verify(spool, bundle.name)["state"] == "intact"
    with (spool.bundle(bundle.name) / "resident.bin").open("rb+") as stream:
        stream.write(b"\x99\x99")
    report = verify(spool, bundle.name)
    assert report["state"] == "damaged"
    assert not spool.bundle(bundle.name).exists()
    assert send(spool, bundle) == report["damaged"]
    assert commit(spool, bundle.name)["state"] == "committed"
    assert_same_files(bundle, spool.bundle(bundle.name))


def test_commit_and_accept_want_an_announced_bundle(spool: Spool, tmp_path: Path) -> None:
    pack = tmp_path / "a.pack"
    pack.write_bytes(b"[]\n")
    with pytest.raises(InputError, match="not announced"):
        accept_pack(spool, "0" * 64, pack)
    with pytest.raises(InputError, match="not announced"):
        commit(spool, "0" * 64)
    with pytest.raises(InputError, match="not a digest"):
        commit(spool, "../../etc")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_order_of_packs_with_any_damage_ends_in_the_same_bundle(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, data: st.DataObject
) -> None:
    spool = Spool.open(tmp_path_factory.mktemp("spool"))
    for _ in range(4):
        wanted = missing(spool, bundle / "manifest.json")["missing"]
        part = data.draw(st.permutations(wanted))[: data.draw(st.integers(0, len(wanted)))]
        pack = make_pack(spool, bundle, part)
        content = bytearray(pack.read_bytes())
        header = content.index(b"\n") + 1
        if len(content) > header and data.draw(st.booleans()):
            content[data.draw(st.integers(header, len(content) - 1))] ^= 0x40
            pack.write_bytes(content)
        accept_pack(spool, bundle.name, pack)
    send(spool, bundle)
    assert commit(spool, bundle.name)["state"] == "committed"
    assert_same_files(bundle, spool.bundle(bundle.name))
    shutil.rmtree(spool.root)


# ------------------------------------------------------------------ task data, collect, clean


def push_task(spool: Spool, content: bytes = b"rows") -> str:
    digest = sha256_hex(content)
    spool.task_partial(digest).write_bytes(content)
    return digest


def test_task_data_is_verified_before_it_is_visible(spool: Spool) -> None:
    digest = push_task(spool)
    assert has(spool, [digest])["tasks"] == []
    assert accept_held(spool, digest)["state"] == "accepted"
    assert spool.task(digest).read_bytes() == b"rows"
    assert accept_held(spool, digest)["state"] == "already"
    assert has(spool, [digest, digest])["tasks"] == [digest]


def test_damaged_task_data_is_removed(spool: Spool) -> None:
    digest = push_task(spool)
    spool.task_partial(digest).write_bytes(b"rowz")
    with pytest.raises(DigestError, match="what came has digest"):
        accept_held(spool, digest)
    assert not spool.task_partial(digest).exists()


def test_collect_removes_what_is_not_kept(spool: Spool, bundle: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path, seed=1)
    for each in (bundle, other):
        send(spool, each)
        commit(spool, each.name)
    half = tiny_bundle(tmp_path, seed=2)
    missing(spool, half / "manifest.json")
    old, kept = push_task(spool, b"old"), push_task(spool, b"kept")
    for digest in (old, kept):
        accept_held(spool, digest)
    (spool.incoming / "stray.pack").write_bytes(b"x")
    assert collect(spool, [bundle.name, kept])["removed"] == {
        "bundles": [other.name], "incoming": [half.name], "tasks": [old],
    }  # fmt: skip
    assert [path.name for path in spool.bundles.iterdir()] == [bundle.name]
    assert list(spool.incoming.iterdir()) == []
    with pytest.raises(InputError):
        collect(spool, ["../../.."])


def test_collect_spares_what_a_running_job_needs(spool: Spool, bundle: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path, seed=1)
    for each in (bundle, other):
        send(spool, each)
        commit(spool, each.name)
    task = push_task(spool)
    accept_held(spool, task)
    push_job(spool, make_job(spool, bundle=bundle.name, task_data=task))
    with hold(spool.run_lock, wait_s=0, what="test", label="probe/1"):
        assert collect(spool, [])["removed"] == {"bundles": [other.name], "incoming": [], "tasks": []}
        with pytest.raises(BusyError, match="probe/1"):
            clean(spool)
    assert spool.task(task).exists()


def test_clean_removes_all_of_ours_and_nothing_else(spool: Spool, bundle: Path) -> None:
    mark_emulated(spool)
    before = device_identity(spool)
    send(spool, bundle)
    push_job(spool, make_job(spool))
    (spool.root / "notes.txt").write_text("mine")
    (spool.root / ".fence.json.123.partial").write_text("left by a killed agent")
    (spool.root / ".probe.77.partial").write_text("likewise")
    clean(spool)
    assert [path.name for path in spool.root.iterdir()] == ["notes.txt"]
    again = Spool.open(spool.root)
    mark_emulated(again)
    assert device_identity(again) == before


def test_forget_removes_one_job(spool: Spool) -> None:
    push_job(spool, make_job(spool))
    assert forget(spool, "probe", "1") == {"removed": True}
    assert forget(spool, "probe", "1") == {"removed": False}
    assert list(spool.jobs.iterdir()) == []


def test_what_is_here_is_told_by_digest(spool: Spool, bundle: Path, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path, seed=1)
    missing(spool, other / "manifest.json")
    send(spool, bundle)
    task = push_task(spool)
    accept_held(spool, task)

    def here(*digests: str) -> tuple[list[str], list[str], list[str]]:
        answer = has(spool, digests)
        return answer["bundles"], answer["incoming"], answer["tasks"]

    assert here(bundle.name, other.name, "0" * 64) == ([], sorted([bundle.name, other.name]), [])
    commit(spool, bundle.name)
    assert here(bundle.name, other.name, task) == ([bundle.name], [other.name], [task])
    (spool.bundle(bundle.name) / "manifest.json").write_bytes(b"{}")
    assert here(bundle.name) == ([], [], [])
    with pytest.raises(InputError, match="not a digest"):
        has(spool, ["../../etc"])
