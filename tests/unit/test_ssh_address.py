"""Where an ssh device is, from the inventory and the user's ssh configuration; and which keys are known."""

from __future__ import annotations

import base64
import getpass
import os
import subprocess
from pathlib import Path

import pytest

from orchestrator.errors import StableError
from orchestrator.inventory import Device, parse_inventory
from orchestrator.transports.ssh_address import Endpoint, endpoint_of
from orchestrator.transports.ssh_connect import scan_command
from orchestrator.transports.ssh_known_hosts import keys_of, read_known_hosts, recorded_name

BLOB = base64.b64encode(b"key").decode()


def device(address: str, more: str = "") -> Device:
    text = f'version: 1\ndevices: [{{name: board, transport: ssh, address: "{address}"{more}}}]'
    return parse_inventory(text.encode(), Path("/lab/inventory.yaml")).devices[0]


def configured(home: Path, text: str) -> Path:
    (home / ".ssh").mkdir()
    (home / ".ssh/config").write_text(text)
    return home


def test_without_a_configuration_the_defaults_hold(tmp_path: Path) -> None:
    found = endpoint_of(device("board.lab"), tmp_path)
    assert (found.host, found.port, found.user) == ("board.lab", 22, getpass.getuser())
    assert found.key_files[0] == tmp_path / ".ssh/id_ed25519"
    assert (found.own_keys, found.agent, found.jump) == (False, True, None)
    assert found.known_hosts == (tmp_path / ".ssh/known_hosts", Path("/etc/ssh/ssh_known_hosts"))


def test_the_configuration_names_host_user_port_keys_and_jump(tmp_path: Path) -> None:
    home = configured(
        tmp_path,
        "Host pi\n HostName 10.0.0.7\n User lab\n Port 2222\n IdentityFile /keys/pi\n"
        " UserKnownHostsFile /keys/known\n IdentitiesOnly yes\n ProxyJump me@gate:22022\n",
    )
    found = endpoint_of(device("pi"), home)
    assert (found.host, found.port, found.user) == ("10.0.0.7", 2222, "lab")
    assert (found.key_files, found.known_hosts) == ((Path("/keys/pi"),), (Path("/keys/known"),))
    assert (found.own_keys, found.agent) == (True, False)
    assert found.jump is not None
    assert (found.jump.host, found.jump.port, found.jump.user) == ("gate", 22022, "me")


def hosts_on_the_way(found: Endpoint) -> list[str]:
    return [found.host] if found.jump is None else [*hosts_on_the_way(found.jump), found.host]


def test_jumps_are_made_in_the_order_of_their_list(tmp_path: Path) -> None:
    home = configured(
        tmp_path,
        "Host pi\n ProxyJump gate,me@inner:23\nHost inner\n ProxyJump elsewhere\n"
        "Host gate\n ProxyJump first\n",
    )
    found = endpoint_of(device("pi"), home)
    assert hosts_on_the_way(found) == ["first", "gate", "inner", "pi"]
    assert found.jump is not None
    assert (found.jump.user, found.jump.port) == ("me", 23)


def test_a_command_to_paste_holds_what_it_was_made_of(tmp_path: Path) -> None:
    alias = r"a'; touch injected; '/&\1"
    home = configured(tmp_path, f"Host pi\n HostKeyAlias {alias}\n UserKnownHostsFile {tmp_path}/known\n")
    found = endpoint_of(device("pi"), home)
    assert found.alias == alias
    (tmp_path / "ssh-keyscan").write_text("#!/bin/sh\necho host ssh-ed25519 key\n")
    (tmp_path / "ssh-keyscan").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", scan_command(found, "ed25519")], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "known").read_text() == f"{alias} ssh-ed25519 key\n"
    assert not (tmp_path / "injected").exists()


def test_included_files_stand_in_their_place(tmp_path: Path) -> None:
    """What comes first holds; a block of the file that includes goes on after the included one."""
    home = configured(
        tmp_path,
        "Include conf.d/*.conf  ~/other gone/*\nUser general\nHost pi\n Include keys\n Port 2202\n"
        "Include keys\nHost *\nInclude late\n User never\n",
    )
    (home / ".ssh/conf.d").mkdir()
    (home / ".ssh/conf.d/2.conf").write_text("Host pi\n HostName second\n Port 2\n")
    (home / ".ssh/conf.d/1.conf").write_text("include=nested\n")
    (home / ".ssh/nested").write_text("Host pi\n HostName first\nHost foo\n Port 3\n")
    (home / ".ssh/keys").write_text("IdentityFile /keys/pi\n")
    (home / ".ssh/late").write_text("Host bar\n Port 4\n")
    (home / "other").write_text("Host never\n User never\n")
    found = {host: endpoint_of(device(host), home) for host in ("pi", "foo", "bar", "baz")}
    assert [each.host for each in found.values()] == ["first", "foo", "bar", "baz"]
    assert [each.port for each in found.values()] == [2, 3, 4, 22]
    assert {each.user for each in found.values()} == {"general"}
    assert found["pi"].key_files[0] == Path("/keys/pi")
    assert not found["foo"].own_keys


def test_included_blocks_below_a_condition_are_refused(tmp_path: Path) -> None:
    home = configured(tmp_path, "Host pi\nInclude more\n")
    (home / ".ssh/more").write_text("Host foo\n Port 3\n")
    with pytest.raises(StableError, match="put that Include before the first Host"):
        endpoint_of(device("pi"), home)


def test_a_proxy_command_of_none_is_none(tmp_path: Path) -> None:
    assert endpoint_of(device("pi"), configured(tmp_path, "ProxyCommand none\n")).jump is None


def test_the_inventory_has_the_last_word(tmp_path: Path) -> None:
    home = configured(tmp_path, "Host pi\n User lab\n Port 2222\n IdentityFile /keys/pi\n")
    more = ", key_file: keys/own, known_hosts: /keys/known"
    found = endpoint_of(device("root@pi:23", more), home)
    assert (found.host, found.port, found.user) == ("pi", 23, "root")
    assert found.key_files == (Path("/lab/keys/own"),)
    assert found.known_hosts == (Path("/keys/known"),)


def test_an_address_of_ipv6(tmp_path: Path) -> None:
    found = endpoint_of(device("root@[fe80::1]:2022"), tmp_path)
    assert (found.host, found.port, found.user) == ("fe80::1", 2022, "root")


@pytest.mark.parametrize(
    "text",
    [
        "Host pi\n ProxyCommand nc %h %p\n",
        "Host pi\n ProxyJump pi\n",
        "nonsense\n",
        "Port abc\n",
        "Port 70000\n",
        "CanonicalizeHostname always\n",
        "CanonicalizeHostname yes\nCanonicalDomains lab\nCanonicalizeMaxDots x\n",
        "Include config\n",
        "Include config config\n",
        "Include %d/x\n",
        "Include ~nobody-of-that-name/x\n",
        'Include "x\n',
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StableError, match="board: "):
        endpoint_of(device("pi"), configured(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "name", "known"),
    [
        (f"board ssh-ed25519 {BLOB} comment", "board", True),
        (f"Board,10.0.0.7 ssh-ed25519 {BLOB}", "board", True),
        (f"board ssh-ed25519 {BLOB}", "[board]:2222", False),
        (f"[board]:2222\tssh-ed25519\t{BLOB}", "[board]:2222", True),
        (f"*.lab ssh-ed25519 {BLOB}", "pi.lab", True),
        (f"*.lab,!pi.lab ssh-ed25519 {BLOB}", "pi.lab", False),
        (f"[*.lab]:22?? ssh-ed25519 {BLOB}", "[pi.lab]:2222", True),
        (f"# board ssh-ed25519 {BLOB}", "board", False),
        (f"@cert-authority board ssh-ed25519 {BLOB}", "board", False),
        ("board ssh-ed25519 no-base64!", "board", False),
        ("board", "board", False),
        (f"|1|||| ssh-ed25519 {BLOB}", "board", False),
        # Made by ssh-keygen -H of "[board]:2222".
        (f"|1|{'A' * 27}=|DEWqLq1sxQ1nSDCr1SJuO2ijsOE= ssh-ed25519 {BLOB}", "[other]:2222", False),
    ],
)
def test_lines_of_known_hosts(line: str, name: str, known: bool) -> None:
    assert [key.blob for key in keys_of(["", line], name, Path("f"))] == ([b"key"] if known else [])


def test_a_revoked_key_is_marked_and_a_missing_file_knows_nothing(tmp_path: Path) -> None:
    (tmp_path / "known").write_text(f"@revoked * ssh-rsa {BLOB}\n")
    (key,) = read_known_hosts([tmp_path / "none", tmp_path / "known"], recorded_name("Board", 22))
    assert (key.revoked, key.kind, key.line) == (True, "ssh-rsa", 1)
    assert recorded_name("Board", 23) == "[board]:23"
