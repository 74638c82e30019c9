"""Profiles of other devices of the same chip, for a device that has none yet (docs/planner.md, Borrowed)."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.devices import latest_facts
from db.documents import parse
from db.models import DeviceProfileRow, DeviceRow


def chip_of(session: Session, device_id: int) -> str | None:
    """The chip that a device names itself, as host or agent last saw it; None when it names none.

    A CPU's model name is no chip: many chips have the same cores.
    """
    facts = latest_facts(session, device_id)
    if facts is None:
        return None
    chip = (parse(facts.facts_json).get("host_seen") or {}).get("chip")
    return str(chip) if chip else None


def borrowed_profile(
    session: Session,
    *,
    device_id: int,
    bundle_digest: str,
    engine: str,
    sequence_length: int,
    threads: int | None = None,
    queue_depth: int | None = None,
) -> tuple[DeviceRow, DeviceProfileRow] | None:
    """The newest good profile of another current device of the same chip and its owner; None without one.

    Never of an emulated device nor for one: what slows it is of no chip. An unfit profile is not lent.
    """
    own = session.get_one(DeviceRow, device_id)
    chip = chip_of(session, device_id)
    if chip is None or own.emulated:
        return None
    fit = DeviceProfileRow
    query = (
        select(DeviceRow, fit)
        .join(fit, fit.device_id == DeviceRow.id)
        .where(
            DeviceRow.id != device_id,
            DeviceRow.retired_wall_ns.is_(None),
            DeviceRow.emulated.is_(False),
            fit.emulated.is_(False),
            fit.unfit.is_(False),
            fit.bundle_digest == bundle_digest,
            fit.engine == engine,
            fit.sequence_length == sequence_length,
        )
        .order_by(fit.created_wall_ns.desc(), fit.id.desc())
    )
    for wanted, column in ((threads, fit.threads), (queue_depth, fit.queue_depth)):
        if wanted is not None:
            query = query.where(column == wanted)
    return next(
        ((owner, row) for owner, row in session.execute(query) if chip_of(session, owner.id) == chip), None
    )
