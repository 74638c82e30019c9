"""Settings: arguments before environment before defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.settings import load_settings
from sti_runtime.errors import InputError


def test_defaults_lie_beside_the_inventory(tmp_path: Path) -> None:
    settings = load_settings(environ={}, cwd=tmp_path)
    assert settings.inventory == tmp_path / "inventory.yaml"
    assert settings.home == tmp_path / ".stifarm"
    assert settings.db_url == f"sqlite:///{tmp_path}/.stifarm/store.sqlite"
    assert not settings.db_url_given
    assert settings.spool("a") == settings.home / "devices/a"
    assert not settings.home.exists()


def test_the_environment_is_taken(tmp_path: Path) -> None:
    environ = {"STIFARM_INVENTORY": "lab/i.yaml", "STIFARM_DB_URL": "postgresql://x/y"}
    settings = load_settings(environ=environ, cwd=tmp_path)
    assert settings.inventory == tmp_path / "lab/i.yaml"
    assert settings.home == tmp_path / "lab/.stifarm"
    assert (settings.db_url, settings.db_url_given) == ("postgresql://x/y", True)
    settings = load_settings(environ={**environ, "STIFARM_HOME": str(tmp_path / "state")}, cwd=tmp_path)
    assert settings.home == tmp_path / "state"


def test_arguments_win(tmp_path: Path) -> None:
    environ = {"STIFARM_INVENTORY": "a", "STIFARM_DB_URL": "b", "STIFARM_HOME": "c"}
    settings = load_settings(
        environ=environ, home=Path("h"), inventory=Path("i"), db_url="sqlite://", cwd=tmp_path
    )
    assert (settings.home, settings.inventory) == (tmp_path / "h", tmp_path / "i")
    assert settings.db_url == "sqlite://"


def test_empty_variables_count_as_not_set(tmp_path: Path) -> None:
    environ = {"STIFARM_INVENTORY": "", "STIFARM_DB_URL": "", "STIFARM_HOME": ""}
    assert load_settings(environ=environ, cwd=tmp_path) == load_settings(environ={}, cwd=tmp_path)


def test_a_home_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for home in ("file", "file/below"):
        with pytest.raises(InputError, match="is not a folder"):
            load_settings(environ={"STIFARM_HOME": home}, cwd=tmp_path)


def test_devices_of_different_farms_on_one_machine_share_its_lock(tmp_path: Path) -> None:
    first = load_settings(environ={}, cwd=tmp_path / "a")
    second = load_settings(environ={}, cwd=tmp_path / "b")
    assert first.machine_lock == second.machine_lock
