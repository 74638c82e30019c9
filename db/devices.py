"""Queries about devices and what was seen of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.documents import document, now_wall_ns, parse, storable
from db.errors import StoreError
from db.events import record_event
from db.models import DeviceFactsRow, DeviceRow
from db.upsert import save_new
from sti_runtime.records import sha256_hex


def register_device(
    session: Session,
    *,
    identity: str,
    name: str,
    transport: str,
    engine: str,
    emulated: bool,
    host: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> DeviceRow:
    """Insert or update the device of this hardware identity.

    When other hardware bore the name, that device is retired (its data stay) and an event says so.
    """
    now = now_wall_ns()
    changing: dict[str, Any] = {
        "name": name,
        "transport": transport,
        "host": host,
        "engine": engine,
        "emulated": emulated,
        "labels_json": document(dict(labels or {})),
        "last_seen_wall_ns": now,
        "retired_wall_ns": None,
    }
    save_new(session, DeviceRow, {"identity": identity, "created_wall_ns": now, **changing})
    session.execute(update(DeviceRow).where(DeviceRow.identity == identity).values(**changing))
    session.flush()
    device = session.scalars(
        select(DeviceRow).where(DeviceRow.identity == identity).execution_options(populate_existing=True)
    ).one()
    others = select(DeviceRow).where(
        DeviceRow.name == name, DeviceRow.id != device.id, DeviceRow.retired_wall_ns.is_(None)
    )
    for other in session.scalars(others):
        other.retired_wall_ns = now
        record_event(
            session,
            "warning",
            "device-replaced",
            f"{name} is now {identity}; before it was {other.identity}, whose data are kept.",
            device_id=device.id,
        )
    session.flush()
    return device


def device_by_name(session: Session, name: str) -> DeviceRow:
    """The current device of an inventory name. Raises: StoreError when none is known."""
    query = select(DeviceRow).where(DeviceRow.name == name, DeviceRow.retired_wall_ns.is_(None))
    device = session.scalars(query).one_or_none()
    if device is None:
        raise StoreError(
            f"The store knows no device named {name!r}.",
            f"Probe it first: stifarm devices probe --devices {name}",
        )
    return device


def find_device(
    session: Session, *, name: str | None = None, identity: str | None = None
) -> DeviceRow | None:
    """The current device of a name, or of a hardware identity."""
    query = select(DeviceRow).where(DeviceRow.retired_wall_ns.is_(None))
    if name is not None:
        query = query.where(DeviceRow.name == name)
    if identity is not None:
        query = query.where(DeviceRow.identity == identity)
    return session.scalars(query.order_by(DeviceRow.id).limit(1)).one_or_none()


def list_devices(session: Session, *, retired: bool = False) -> Sequence[DeviceRow]:
    """All current devices by name; with ``retired``, those whose name went to other hardware too."""
    query = select(DeviceRow).order_by(DeviceRow.name, DeviceRow.id)
    if not retired:
        query = query.where(DeviceRow.retired_wall_ns.is_(None))
    return session.scalars(query).all()


def device_labels(device: DeviceRow) -> dict[str, str]:
    """A device's labels."""
    return labels_of(device.labels_json)


def labels_of(labels_json: str) -> dict[str, str]:
    """A device's labels as its row has them."""
    return {str(key): str(value) for key, value in parse(labels_json).items()}


def set_agent(session: Session, device_id: int, agent_digest: str) -> None:
    """Note which agent is on the device."""
    session.execute(update(DeviceRow).where(DeviceRow.id == device_id).values(agent_digest=agent_digest))


def record_facts(
    session: Session,
    device_id: int,
    facts: Mapping[str, Any],
    *,
    boot_id: str,
    os_build: str | None,
    kernel: str | None,
) -> DeviceFactsRow:
    """Append a snapshot when facts or boot differ from the latest one, which is returned otherwise.

    ``facts`` should hold what does not change from minute to minute, or every look makes a row.
    """
    now = now_wall_ns()
    session.execute(update(DeviceRow).where(DeviceRow.id == device_id).values(last_seen_wall_ns=now))
    text = document(dict(facts))
    digest = sha256_hex(text.encode())
    latest = latest_facts(session, device_id)
    if latest is not None and (latest.digest, latest.boot_id) == (digest, storable(boot_id)):
        return latest
    row = DeviceFactsRow(
        device_id=device_id,
        digest=digest,
        facts_json=text,
        os_build=None if os_build is None else storable(os_build),
        kernel=None if kernel is None else storable(kernel),
        boot_id=storable(boot_id),
        seen_wall_ns=now,
    )
    session.add(row)
    session.flush()
    return row


def latest_facts(session: Session, device_id: int) -> DeviceFactsRow | None:
    """The newest snapshot of a device; None when it was never probed."""
    query = select(DeviceFactsRow).where(DeviceFactsRow.device_id == device_id)
    return session.scalars(query.order_by(DeviceFactsRow.id.desc()).limit(1)).one_or_none()
