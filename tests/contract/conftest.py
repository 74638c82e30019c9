"""The agents that the contract binds, what is on their device, and the stores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from agent.spool import Spool
from sti_runtime.quantizer import GOBO
from tests.agents import AGENTS, Agent, agent_called
from tests.contract.agent_world import (
    CODECS,
    FAMILIES,
    Content,
    make_content,
    spool_with,
)
from tests.contract.stores import (
    fresh_url,
    migrated_postgres,
    migrated_sqlite,
    postgres_template,
    store,
    url,
)

__all__ = ["fresh_url", "migrated_postgres", "migrated_sqlite", "postgres_template", "store", "url"]


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Content]:
    def content(family: str) -> Content:
        return make_content(tmp_path_factory.mktemp(family), FAMILIES[family], CODECS.get(family, GOBO))

    return cache(content)


@pytest.fixture(scope="module", params=AGENTS)
def agent(request: pytest.FixtureRequest) -> Agent:
    return agent_called(request.param)


@pytest.fixture
def content(contents: Callable[[str], Content]) -> Content:
    return contents("bert")


@pytest.fixture
def spool(content: Content, tmp_path: Path) -> Spool:
    """A device's spool with bundle and rows on it; the test may damage them."""
    return spool_with(content, tmp_path / "spool")
