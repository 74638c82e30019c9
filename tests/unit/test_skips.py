"""Where everything that can be installed is, a test that is skipped for lack of it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.agent_data import REPO
from tests.conftest import COMPLETE

TESTS = """
import pytest
def test_lacks_a_program(): pytest.skip("needs strace (Debian package strace)")
@pytest.mark.skipif(True, reason="needs openssh-server")
def test_lacks_a_server(): pass
def test_lacks_a_gpu(): pytest.skip("this PyTorch finds no CUDA device")
def test_passes(): pass
"""


def test_what_can_be_installed_is_no_reason_to_skip(tmp_path: Path) -> None:
    (tmp_path / "test_these.py").write_text(TESTS)
    options = ["-q", "-c", os.devnull, "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, COMPLETE: "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "1 failed, 1 passed, 1 skipped, 1 error" in done.stdout, done.stdout + done.stderr
