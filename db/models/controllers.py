"""Controllers: the processes that drive devices, and which of them live."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Word


class ControllerRow(Base):
    """One row for each process that drove devices. ``name``: the ``owner`` of its leases and batches.

    Times are the database's clock. ``ended_wall_ns`` NULL: it has not ended, nor been given up for dead.
    """

    __tablename__ = "controllers"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    host: Mapped[str]
    home: Mapped[str]
    stifarm: Mapped[Word]
    pid: Mapped[int]
    started_wall_ns: Mapped[int]
    heartbeat_wall_ns: Mapped[int]
    ended_wall_ns: Mapped[int | None]
