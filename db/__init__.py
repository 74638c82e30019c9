"""The store: SQLAlchemy models, sessions, migrations, ingestion and named queries per subject."""
