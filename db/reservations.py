"""Reservations: a person's hold of a device, which the farm does not lease meanwhile.

Times are the database's clock. Taking one locks the device's lease, so that no lease slips in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db.clock import database_wall_ns, utc_text
from db.documents import storable
from db.errors import DeviceReservedError
from db.events import record_event
from db.models import DeviceRow, LeaseRow, ReservationRow
from db.upsert import save_new


@dataclass(frozen=True)
class Held:
    """Who holds a device until when: a controller's lease, a person's reservation. None: nobody."""

    lease_owner: str | None = None
    lease_until_wall_ns: int | None = None
    reservation: ReservationRow | None = None


def reserve(
    session: Session,
    device_id: int,
    *,
    holder: str,
    reason: str | None,
    length_ns: int,
    lets_finish: bool = False,
) -> ReservationRow:
    """Hold a device for a person from now on; the holder's own reservation is replaced.

    A job that runs there is asked to stop behind its present unit when its lease is next renewed, unless it
    is let finish. Raises: DeviceReservedError when another person holds it.
    """
    save_new(session, LeaseRow, {"device_id": device_id, "counter": 0})
    session.execute(select(LeaseRow).where(LeaseRow.device_id == device_id).with_for_update())
    now = database_wall_ns(session)
    standing = reservation_of(session, device_id, now)
    if standing is not None and standing.holder != storable(holder):
        raise _refusal(session, standing)
    session.execute(delete(ReservationRow).where(ReservationRow.device_id == device_id))
    row = ReservationRow(
        device_id=device_id,
        holder=storable(holder),
        reason=None if reason is None else storable(reason),
        lets_finish=lets_finish,
        since_wall_ns=now,
        until_wall_ns=now + length_ns,
    )
    session.add(row)
    session.flush()
    record_event(session, "info", "device-reserved", _who(row), device_id=device_id)
    return row


def unreserve(session: Session, device_id: int) -> ReservationRow | None:
    """Give a device back to the farm, whoever holds it; the reservation that stood, if one did."""
    row = reservation_of(session, device_id, database_wall_ns(session))
    session.execute(delete(ReservationRow).where(ReservationRow.device_id == device_id))
    if row is not None:
        record_event(session, "info", "device-unreserved", f"It was {_who(row)}.", device_id=device_id)
    return row


def reservation_of(session: Session, device_id: int, now_wall_ns: int) -> ReservationRow | None:
    """The reservation of a device that stands at a moment."""
    return session.scalars(
        select(ReservationRow).where(
            ReservationRow.device_id == device_id, ReservationRow.until_wall_ns > now_wall_ns
        )
    ).one_or_none()


def refuse_reserved(session: Session, device_id: int, now_wall_ns: int, *, finishing: bool = False) -> None:
    """Raises: DeviceReservedError when a person holds the device; when ``finishing``, a running job goes on
    under a reservation that lets it."""
    row = reservation_of(session, device_id, now_wall_ns)
    if row is not None and not (finishing and row.lets_finish):
        raise _refusal(session, row)


def holders(session: Session) -> Mapping[int, Held]:
    """Who holds which device now, by its row id; devices that nobody holds are left out."""
    now = database_wall_ns(session)
    leases = session.scalars(
        select(LeaseRow).where(LeaseRow.owner.is_not(None), LeaseRow.expires_wall_ns > now)
    ).all()
    found = {row.device_id: Held(row.owner, row.expires_wall_ns) for row in leases}
    for row in session.scalars(select(ReservationRow).where(ReservationRow.until_wall_ns > now)):
        lease = found.get(row.device_id, Held())
        found[row.device_id] = Held(lease.lease_owner, lease.lease_until_wall_ns, row)
    return found


def _who(row: ReservationRow) -> str:
    why = f" ({row.reason})" if row.reason else ""
    return f"reserved by {row.holder} until {utc_text(row.until_wall_ns)}{why}"


def _refusal(session: Session, row: ReservationRow) -> DeviceReservedError:
    name = session.scalars(select(DeviceRow.name).where(DeviceRow.id == row.device_id)).one()
    return DeviceReservedError(
        f"{name} is {_who(row)}.",
        f"Wait until then, or ask {row.holder}. To give it back to the farm: stifarm devices unreserve"
        f" {name}.",
    )
