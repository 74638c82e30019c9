"""Alembic's entry point: runs the migrations on the connection that ``db.session.upgrade`` hands over.

For a new revision, point Alembic at a store that is current::

    alembic -c db/migrations/alembic.ini -x url=sqlite:///store.sqlite revision --autogenerate -m "what"
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine

from db.models import Base


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as own:
        _run(own)
