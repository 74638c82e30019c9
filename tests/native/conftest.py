"""Fixtures of the native agent's tests; a file that needs another agent or content makes its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.spool import Spool
from sti_runtime.storage import direct_io_works
from tests.agent_data import tiny_bundle
from tests.agents import Agent
from tests.native.content import Content, make_content
from tests.native.core import sanitized_agent


@pytest.fixture(scope="module")
def agent() -> Agent:
    """The whole agent with the compiler's sanitizers."""
    return sanitized_agent()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An empty one."""
    return Spool.open(tmp_path / "spool")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle's folder."""
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """A bundle and task data that a profile can be taken of."""
    content = make_content(tmp_path_factory.mktemp("content"))
    if not direct_io_works(content.bundle.region_path(2)):
        pytest.skip(f"{content.bundle.path}: no direct IO here, so a profile of it would be unfit")
    return content
