"""The verb agent build, on a cache that holds what it asks for or cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.toolchain import ARCHITECTURES, build_agent
from sti_runtime.records import sha256_hex


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["agent", "build", *words])
    except SystemExit as done:
        code = int(done.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_prints_path_size_and_digest_of_every_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "--json")
    assert code == 0
    built = json.loads(out)
    assert [item["architecture"] for item in built] == list(ARCHITECTURES)
    for item in built:
        data = Path(item["path"]).read_bytes()
        assert item == {
            "architecture": item["architecture"],
            "path": str(build_agent(item["architecture"])),
            "sha256": sha256_hex(data),
            "bytes": len(data),
        }


def test_several_can_be_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "--arch", "armv7,x86_64", "--arch", "armv7")
    assert code == 0
    lines = [line for line in out.splitlines() if "stifarm-agent-" in line]
    assert [line.split()[0] for line in lines] == ["armv7", "x86_64"]
    assert "2 executables" in err


def test_an_unknown_one_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "--arch", "arm7")
    assert (code, out) == (2, "")
    assert "--arch 'arm7' is unknown." in err
    assert "armv7" in err


def test_a_cache_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = command(capsys, "--arch", "x86_64")
    assert code == 1
    assert str(tmp_path / "file") in err.replace("\n", "")
    assert "XDG_CACHE_HOME" in err
