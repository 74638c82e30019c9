"""Lab hosts: who joined, and what was last known of them."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Word, one_of

HOST_STATES = ("present", "away", "left", "refused")


class HostRow(Base):
    """One row for each name a host ever joined with.

    ``offer_json``: its last announcement; NULL for one that was refused. ``last_seen_wall_ns``: when it was
    last present, by the database's clock; ``state`` "present" holds for a while from then
    (``hosts.state_now``). ``refused``: why it is.
    """

    __tablename__ = "hosts"
    __table_args__ = (one_of("state", HOST_STATES),)

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[Word]
    stifarm: Mapped[Word]
    protocol: Mapped[int]
    offer_json: Mapped[str | None]
    refused: Mapped[str]
    joined_wall_ns: Mapped[int | None]
    last_seen_wall_ns: Mapped[int | None]
