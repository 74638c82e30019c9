"""Devices, what was seen of them, and who may use them."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, Int64, Sha, Word


class DeviceRow(Base):
    """A device, identified by its hardware; the name is the inventory's and may move.

    ``retired_wall_ns``: when other hardware took over the name; NULL for a current device.
    ``agent_digest``: the agent last seen running there.
    """

    __tablename__ = "devices"

    id: Mapped[Id]
    identity: Mapped[str] = mapped_column(String(200), unique=True)
    name: Mapped[str] = mapped_column(String(200), index=True)
    transport: Mapped[Word]
    host: Mapped[str | None]
    engine: Mapped[Word]
    emulated: Mapped[bool]
    labels_json: Mapped[str]
    agent_digest: Mapped[Sha | None]
    created_wall_ns: Mapped[int]
    last_seen_wall_ns: Mapped[int]
    retired_wall_ns: Mapped[int | None]


class DeviceFactsRow(Base):
    """A snapshot of a device's facts; append-only, a new row whenever facts or boot change."""

    __tablename__ = "device_facts"

    id: Mapped[Id]
    device_id: Mapped[DeviceId]
    digest: Mapped[Sha]
    facts_json: Mapped[str]
    os_build: Mapped[str | None]
    kernel: Mapped[str | None]
    boot_id: Mapped[Word]
    seen_wall_ns: Mapped[int]


class LeaseRow(Base):
    """One row per device that was ever leased. ``counter`` only rises; times are the database's clock.

    ``owner`` NULL: nobody holds the device.
    """

    __tablename__ = "leases"

    device_id: Mapped[int] = mapped_column(Int64, ForeignKey("devices.id"), primary_key=True)
    owner: Mapped[str | None]
    counter: Mapped[int]
    acquired_wall_ns: Mapped[int | None]
    expires_wall_ns: Mapped[int | None]
