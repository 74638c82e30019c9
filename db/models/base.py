"""What all tables share: naming of constraints, column types, checks of enumerations.

Conventions: wall times are integer ns since the Unix epoch (UTC) in columns ``*_wall_ns``; durations are
integer ns (``*_ns``), sizes integer bytes (``*_bytes``). Documents are canonical JSON text in ``*_json``,
so that their digests can be recomputed from what is stored. Enumerations are text under a CHECK.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

Int64 = BigInteger().with_variant(Integer(), "sqlite")
"""64-bit everywhere: SQLite's INTEGER is, and only by that name may it be a row id."""

Id = Annotated[int, mapped_column(Int64, primary_key=True)]
Sha = Annotated[str, mapped_column(String(64))]
"""A SHA-256 in lower-case hexadecimal."""
Word = Annotated[str, mapped_column(String(64))]
"""A member of an enumeration or another short name."""
DeviceId = Annotated[int, mapped_column(Int64, ForeignKey("devices.id"), index=True)]
JournalId = Annotated[int, mapped_column(Int64, ForeignKey("journal_records.id"))]


class Base(DeclarativeBase):
    """Base of every table."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar = {int: Int64, str: Text(), bool: Boolean()}


def one_of(column: str, values: Iterable[str]) -> CheckConstraint:
    """A CHECK that ``column`` holds one of ``values``."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class StoreMetaRow(Base):
    """One row: which store this is. ``store_id`` is half of every fencing token."""

    __tablename__ = "store_meta"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[Id]
    store_id: Mapped[str] = mapped_column(String(36))
    created_wall_ns: Mapped[int]
