"""host up, join, list, leave: machines with devices, joined to one controller."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from db.clock import database_wall_ns, utc_text
from db.controllers import list_controllers
from db.hosts import forget_host, list_hosts, state_now
from db.models import ControllerRow, HostRow
from orchestrator.cli.context import JsonOption, Options, PortsOption, farm_of, parse_size, tell_how_to_join
from orchestrator.cli.output import emit_json, note, success, table, warn
from orchestrator.content_cache import CACHE_BYTES
from orchestrator.controllers import silent_ns, state_of
from orchestrator.errors import HostError, PoolError
from orchestrator.farm import Farm, impatient
from orchestrator.host_book import note_hosts, note_seen
from orchestrator.hosts import HOST_NAME, HostOffer, gather
from orchestrator.processes import alive
from sti_runtime.errors import InputError
from sti_runtime.units import format_ns

if TYPE_CHECKING:  # Ray is slow to import
    from orchestrator.ray.board import Board

host_app = typer.Typer(no_args_is_help=True, help="Lab hosts: machines with devices, joined to a controller.")

_LOOK_S = 10.0
_LEAVE_LIMIT_S = 60.0

ListenOption = Annotated[
    str,
    typer.Option("--listen", help="This machine's address for lab hosts, HOST:PORT; port 0: any free one."),
]


@host_app.command("up")
def up(context: typer.Context, listen: ListenOption, ports: PortsOption = None) -> None:
    """Run the farm's head node, which lab hosts join, until it is stopped; other verbs then use it.

    Example: stifarm host up --listen 192.0.2.7:6379 --ports 20000-20063
    """
    from orchestrator.ray.access import authenticated, token_source
    from orchestrator.ray.board import Board, Endpoint
    from orchestrator.ray.head import head_of
    from orchestrator.ray.nodes import Ports

    settings, endpoint = _options(context).settings(), Endpoint.parse(listen)
    given = None if ports is None else Ports.parse(ports)
    with (
        farm_of(context) as farm,
        _stopped() as stop,
        authenticated(settings.ray_token),
        head_of(settings, endpoint, ports=given) as node,
    ):
        tell_how_to_join(str(node.endpoint), token_source(settings.ray_token))
        store = impatient(farm.store)
        while not stop.wait(_LOOK_S):
            if node.died:
                raise PoolError(f"The head node's {node.died} ended.", "Start it again; hosts join again.")
            note_seen(store, lambda: Board(node.endpoint).hosts())


@host_app.command("join")
def join(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="The controller's address, HOST:PORT.")],
    name: Annotated[str | None, typer.Option("--name", help="This host's name; that of the machine.")] = None,
    token: Annotated[Path | None, typer.Option("--token", help="File with the farm's token.")] = None,
    ip: Annotated[
        str | None, typer.Option("--ip", help="This machine's address or name, where it has several.")
    ] = None,
    ports: PortsOption = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="How much to keep of what the controller sends; 20GB.")
    ] = None,
) -> None:
    """Offer the devices of this machine's inventory to a farm, until it is stopped or leaves.

    When the controller or the node ends it joins again; what runs on devices goes on meanwhile.
    Example: stifarm host join 192.0.2.7:6379 --name bench2
    """
    from orchestrator.ray.board import Endpoint
    from orchestrator.ray.join import Joining, keep_joined
    from orchestrator.ray.nodes import Ports, machine_address

    settings = _options(context).settings()
    joining = Joining(
        Endpoint.parse(address),
        _host_name(name),
        None if ip is None else machine_address(ip),
        None if ports is None else Ports.parse(ports),
        CACHE_BYTES if cache is None else parse_size(cache, "--cache"),
    )
    with _stopped() as stop:
        keep_joined(settings, joining, token or settings.ray_token, note, stop)
    success(f"{joining.name} left")


@host_app.command("controllers")
def controllers(
    context: typer.Context,
    all_: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    json: JsonOption = False,
) -> None:
    """The processes that drive devices of the store, and whether they live.

    Example: stifarm host controllers
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        now = database_wall_ns(session)
        rows = [_controller_json(row, now) for row in list_controllers(session, ended=all_)]
    if json:
        emit_json(rows)
    elif rows:
        columns = ("controller", "stifarm", "process", "since", "heartbeat", "state")
        table(
            "Controllers",
            columns,
            [
                (one["name"], one["stifarm"], str(one["pid"]), utc_text(one["started_wall_ns"]),
                 f"{one['silent_s']} s ago",
                 f"silent for {one['silent_s']} s" if one["state"] == "silent" else one["state"])
                for one in rows
            ],
        )  # fmt: skip
    else:
        note("nobody drives devices of this store")


def _controller_json(row: ControllerRow, now_wall_ns: int) -> dict[str, Any]:
    return {
        "name": row.name,
        "host": row.host,
        "home": row.home,
        "stifarm": row.stifarm,
        "pid": row.pid,
        "started_wall_ns": row.started_wall_ns,
        "heartbeat_wall_ns": row.heartbeat_wall_ns,
        "ended_wall_ns": row.ended_wall_ns,
        "silent_s": silent_ns(row, now_wall_ns) // 10**9,
        "state": state_of(row, now_wall_ns),
    }


@host_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """Show the hosts that joined: state, since when, devices, version, when last seen. Hosts of another head
    node on the same store are there too, as its controller last saw them.

    Example: stifarm host list
    """
    with farm_of(context, existing=True) as farm:
        with _board(farm) as board:
            if board is not None:
                note_hosts(farm.store, board.hosts())
        with farm.store.reader() as session:
            rows, now = list(list_hosts(session)), database_wall_ns(session)
        refused = gather(farm.own_devices, _offers(rows)).refused
        if json:
            hosts = [_as_json(row, now) for row in rows]
            address = None if board is None else str(board.endpoint)
            emit_json({"controller": address, "hosts": hosts, "refused_devices": dict(refused)})
            return
        _show(farm, rows, now)
        for device, why in refused.items():
            warn(f"{device}: {why}")
        if board is None:
            note("  no head node is up, so hosts cannot join: stifarm host up --listen ADDRESS")


@host_app.command("leave")
def leave(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A host that will not come back; none: this one.")
    ] = None,
) -> None:
    """On a lab host: leave the farm. On the controller, with a name: forget a host that is away.

    Example: stifarm host leave
    """
    from orchestrator.ray.join import joined_here

    if name is not None:
        _forget(context, name)
        return
    joined = joined_here(_options(context).settings())
    if joined is None:
        raise HostError(
            "No process keeps this machine joined.",
            "On the controller give the host's name; elsewhere give the --home it joined with.",
        )
    os.kill(joined.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _LEAVE_LIMIT_S
    while alive(joined.process):
        if time.monotonic() > deadline:
            raise HostError(
                f"Process {joined.process.pid} did not end within {_LEAVE_LIMIT_S:g} s.",
                "See what it does; kill it if it hangs.",
            )
        time.sleep(0.1)
    success(f"{joined.name} left {joined.controller}")


@contextmanager
def _board(farm: Farm) -> Iterator[Board | None]:
    """The board of this home's head node; None while none is up."""
    from orchestrator.ray.access import authenticated
    from orchestrator.ray.board import Board
    from orchestrator.ray.head import running_head

    head = running_head(farm.settings)
    if head is None:
        yield None
        return
    with authenticated(farm.settings.ray_token):
        yield Board(head.endpoint)


def _forget(context: typer.Context, name: str) -> None:
    with farm_of(context, existing=True) as farm, _board(farm) as board:
        if board is not None:
            note_hosts(farm.store, board.hosts())
        with farm.store.reader() as session:
            now = database_wall_ns(session)
            states = {row.name: state_now(row, now) for row in list_hosts(session)}
        present = states.get(name) == "present"
        if present:
            raise HostError(f"Host {name} is present.", f"Run stifarm host leave on {name}.")
        if board is not None:  # else who looks at it writes the host down again
            board.forget(name)
        with farm.store.session() as session:
            forget_host(session, name)
    success(f"{name} is forgotten; what was measured on its devices is kept")


def _show(farm: Farm, rows: Sequence[HostRow], now: int) -> None:
    own = ", ".join(device.name for device in farm.own_devices) or "none"
    table(
        "Lab hosts",
        ["host", "state", "since", "devices", "stifarm", "protocol", "last seen"],
        [
            [
                row.name,
                state_now(row, now) if not row.refused else f"refused: {row.refused}",
                _ago(row.joined_wall_ns, now),
                ", ".join(
                    f"{device.name} ({device.transport})"
                    for each in _offers([row])
                    for device in each.devices
                ),
                row.stifarm,
                str(row.protocol),
                "now" if state_now(row, now) == "present" else _ago(row.last_seen_wall_ns, now),
            ]
            for row in rows
        ],
        caption=f"The controller's own devices: {own}",
    )


def _ago(wall_ns: int | None, now: int) -> str:
    return "never" if wall_ns is None else f"{format_ns(max(0, now - wall_ns))} ago"


def _as_json(row: HostRow, now: int) -> dict[str, Any]:
    return {
        "name": row.name,
        "state": state_now(row, now),
        "refused": row.refused,
        "stifarm": row.stifarm,
        "protocol": row.protocol,
        "joined_wall_ns": row.joined_wall_ns,
        "last_seen_wall_ns": row.last_seen_wall_ns,
        "devices": [
            {"name": device.name, "transport": device.transport, "labels": dict(device.labels)}
            for offer in _offers([row])
            for device in offer.devices
        ],
    }


def _offers(rows: Sequence[HostRow]) -> list[HostOffer]:
    return [
        HostOffer.from_json(
            row.offer_json.encode(), source=f"host {row.name}", cap_bytes=len(row.offer_json) * 4
        )
        for row in rows
        if row.offer_json is not None and row.state in ("present", "away")
    ]


def _host_name(given: str | None) -> str:
    name = (given or socket.gethostname().split(".")[0]).lower()
    if not re.fullmatch(HOST_NAME, name):
        raise InputError(
            f"{name!r} is no name for a host.", "Letters, digits, dot, dash and underscore: --name bench2."
        )
    return name


def _options(context: typer.Context) -> Options:
    options = context.obj
    assert isinstance(options, Options)
    return options


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, for the length of the block."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
