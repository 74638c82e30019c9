"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "devices",
        sa.Column("id", INT64, nullable=False),
        sa.Column("identity", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("transport", sa.String(length=64), nullable=False),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("agent_digest", sa.String(length=64), nullable=True),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.Column("last_seen_wall_ns", INT64, nullable=False),
        sa.Column("retired_wall_ns", INT64, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("identity", name=op.f("uq_devices_identity")),
    )
    op.create_index(op.f("ix_devices_name"), "devices", ["name"], unique=False)
    op.create_table(
        "models",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("family", sa.String(length=64), nullable=False),
        sa.Column("layers", INT64, nullable=False),
        sa.Column("heads", INT64, nullable=False),
        sa.Column("hidden", INT64, nullable=False),
        sa.Column("untrained", sa.Boolean(), nullable=False),
        sa.Column("info_json", sa.Text(), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_models")),
    )
    op.create_index(op.f("ix_models_name"), "models", ["name"], unique=False)
    op.create_table(
        "store_meta",
        sa.Column("id", INT64, nullable=False),
        sa.Column("store_id", sa.String(length=36), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_store_meta_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_store_meta")),
    )
    op.create_table(
        "tasks",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("spec_digest", sa.String(length=64), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tasks")),
    )
    op.create_table(
        "bundles",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("bytes", INT64, nullable=False),
        sa.Column("untrained", sa.Boolean(), nullable=False),
        sa.Column("manifest_json", sa.Text(), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(["model_digest"], ["models.digest"], name=op.f("fk_bundles_model_digest")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_bundles")),
    )
    op.create_index(op.f("ix_bundles_model_digest"), "bundles", ["model_digest"], unique=False)
    op.create_index(op.f("ix_bundles_name"), "bundles", ["name"], unique=False)
    op.create_table(
        "device_facts",
        sa.Column("id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("facts_json", sa.Text(), nullable=False),
        sa.Column("os_build", sa.Text(), nullable=True),
        sa.Column("kernel", sa.Text(), nullable=True),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("seen_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_device_facts_device_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device_facts")),
    )
    op.create_index(op.f("ix_device_facts_device_id"), "device_facts", ["device_id"], unique=False)
    op.create_table(
        "importance_profiles",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("split_digest", sa.String(length=64), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("base_fidelity", INT64, nullable=False),
        sa.Column("rows", INT64, nullable=False),
        sa.Column("reliability_ppm", INT64, nullable=False),
        sa.Column("profile_json", sa.Text(), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["model_digest"], ["models.digest"], name=op.f("fk_importance_profiles_model_digest")
        ),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_importance_profiles_task")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_importance_profiles")),
    )
    op.create_index(
        op.f("ix_importance_profiles_model_digest"), "importance_profiles", ["model_digest"], unique=False
    )
    op.create_table(
        "importance_scores",
        sa.Column("id", INT64, nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("split_digest", sa.String(length=64), nullable=False),
        sa.Column("base_fidelity", INT64, nullable=False),
        sa.Column("quantizer", sa.String(length=64), nullable=False),
        sa.Column("layer", INT64, nullable=False),
        sa.Column("slice", INT64, nullable=False),
        sa.Column("rows", INT64, nullable=False),
        sa.Column("loss_nano", INT64, nullable=False),
        sa.Column("correct", INT64, nullable=False),
        sa.Column("half_a_loss_nano", INT64, nullable=True),
        sa.Column("half_b_loss_nano", INT64, nullable=True),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["model_digest"], ["models.digest"], name=op.f("fk_importance_scores_model_digest")
        ),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_importance_scores_task")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_importance_scores")),
        sa.UniqueConstraint(
            "model_digest",
            "task",
            "split_digest",
            "base_fidelity",
            "quantizer",
            "layer",
            "slice",
            name="uq_importance_scores_configuration",
        ),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("units", INT64, nullable=False),
        sa.Column("job_json", sa.Text(), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.Column("updated_wall_ns", INT64, nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name=op.f("ck_jobs_state")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_jobs_device_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("key", name=op.f("uq_jobs_key")),
    )
    op.create_index(op.f("ix_jobs_device_id"), "jobs", ["device_id"], unique=False)
    op.create_table(
        "leases",
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("counter", INT64, nullable=False),
        sa.Column("acquired_wall_ns", INT64, nullable=True),
        sa.Column("expires_wall_ns", INT64, nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_leases_device_id")),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_leases")),
    )
    op.create_table(
        "task_data",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("split", sa.String(length=64), nullable=False),
        sa.Column("rows", INT64, nullable=False),
        sa.Column("sequence_length", INT64, nullable=False),
        sa.Column("tokenizer_digest", sa.String(length=64), nullable=True),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_task_data_task")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_task_data")),
    )
    op.create_index(op.f("ix_task_data_task"), "task_data", ["task"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("id", INT64, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("lease_counter", INT64, nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column("agent_digest", sa.String(length=64), nullable=True),
        sa.Column("protocol", INT64, nullable=True),
        sa.Column("agent_emulated", sa.Boolean(), nullable=True),
        sa.Column("refused", sa.Text(), nullable=True),
        sa.Column("started_wall_ns", INT64, nullable=False),
        sa.Column("ended_wall_ns", INT64, nullable=True),
        sa.CheckConstraint(
            "state IN ('running', 'done', 'failed', 'refused', 'lost')", name=op.f("ck_attempts_state")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_attempts_device_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("job_id", "number", name=op.f("uq_attempts_job_id_number")),
    )
    op.create_index(op.f("ix_attempts_device_id"), "attempts", ["device_id"], unique=False)
    op.create_table(
        "device_profiles",
        sa.Column("id", INT64, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("sequence_length", INT64, nullable=False),
        sa.Column("threads", INT64, nullable=False),
        sa.Column("queue_depth", INT64, nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("unfit", sa.Boolean(), nullable=False),
        sa.Column("facts_id", INT64, nullable=True),
        sa.Column("agent_digest", sa.String(length=64), nullable=True),
        sa.Column("emulation_json", sa.Text(), nullable=True),
        sa.Column("profile_json", sa.Text(), nullable=False),
        sa.Column("measured_wall_ns", INT64, nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_device_profiles_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_device_profiles_device_id")),
        sa.ForeignKeyConstraint(["facts_id"], ["device_facts.id"], name=op.f("fk_device_profiles_facts_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device_profiles")),
        sa.UniqueConstraint("device_id", "digest", name=op.f("uq_device_profiles_device_id_digest")),
    )
    op.create_index(
        op.f("ix_device_profiles_bundle_digest"), "device_profiles", ["bundle_digest"], unique=False
    )
    op.create_index(op.f("ix_device_profiles_device_id"), "device_profiles", ["device_id"], unique=False)
    op.create_index(op.f("ix_device_profiles_digest"), "device_profiles", ["digest"], unique=False)
    op.create_table(
        "events",
        sa.Column("id", INT64, nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        sa.Column("level", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("device_id", INT64, nullable=True),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("what", sa.Text(), nullable=False),
        sa.CheckConstraint("level IN ('info', 'warning', 'error')", name=op.f("ck_events_level")),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_events_device_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_wall_ns"), "events", ["wall_ns"], unique=False)
    op.create_table(
        "journal_records",
        sa.Column("id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("unit", INT64, nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("record_json", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        sa.Column("ingested_wall_ns", INT64, nullable=False),
        sa.Column("rejected", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "type IN ('start', 'result', 'failure', 'end')", name=op.f("ck_journal_records_type")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_journal_records_device_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_journal_records_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_journal_records")),
        sa.UniqueConstraint(
            "device_id",
            "job_id",
            "attempt",
            "seq",
            name=op.f("uq_journal_records_device_id_job_id_attempt_seq"),
        ),
    )
    op.create_index(op.f("ix_journal_records_job_id"), "journal_records", ["job_id"], unique=False)
    op.create_table(
        "compute_samples",
        sa.Column("width", INT64, nullable=False),
        sa.Column("fidelity", INT64, nullable=False),
        sa.Column("read_bytes", INT64, nullable=False),
        sa.Column("decompress_ns", INT64, nullable=False),
        sa.Column("compute_ns", INT64, nullable=False),
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("ordinal", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("threads", INT64, nullable=False),
        sa.Column("queue_depth", INT64, nullable=False),
        sa.Column("sequence_length", INT64, nullable=True),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("warmup", sa.Boolean(), nullable=False),
        sa.Column("valid", sa.Boolean(), nullable=False),
        sa.Column("reasons_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_compute_samples_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_compute_samples_device_id")),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal_records.id"], name=op.f("fk_compute_samples_journal_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_compute_samples")),
        sa.UniqueConstraint("journal_id", "ordinal", name=op.f("uq_compute_samples_journal_id_ordinal")),
    )
    op.create_index(op.f("ix_compute_samples_device_id"), "compute_samples", ["device_id"], unique=False)
    op.create_table(
        "evaluations",
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("content_digest", sa.String(length=64), nullable=False),
        sa.Column("task_data_digest", sa.String(length=64), nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("agent_digest", sa.String(length=64), nullable=True),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("rows", INT64, nullable=False),
        sa.Column("correct", INT64, nullable=False),
        sa.Column("loss_nano", INT64, nullable=False),
        sa.Column("predictions_json", sa.Text(), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_evaluations_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_evaluations_device_id")),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal_records.id"], name=op.f("fk_evaluations_journal_id")
        ),
        sa.ForeignKeyConstraint(
            ["task_data_digest"], ["task_data.digest"], name=op.f("fk_evaluations_task_data_digest")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint(
            "content_digest",
            "task_data_digest",
            "engine",
            name=op.f("uq_evaluations_content_digest_task_data_digest_engine"),
        ),
    )
    op.create_index(op.f("ix_evaluations_device_id"), "evaluations", ["device_id"], unique=False)
    op.create_table(
        "fixed_samples",
        sa.Column("mode_asked", sa.String(length=64), nullable=False),
        sa.Column("mode_proven", sa.String(length=64), nullable=False),
        sa.Column("embed_io_ns", INT64, nullable=False),
        sa.Column("embed_compute_ns", INT64, nullable=False),
        sa.Column("head_ns", INT64, nullable=False),
        sa.Column("read_bytes", INT64, nullable=False),
        sa.Column("storage_bytes", INT64, nullable=False),
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("ordinal", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("threads", INT64, nullable=False),
        sa.Column("queue_depth", INT64, nullable=False),
        sa.Column("sequence_length", INT64, nullable=True),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("warmup", sa.Boolean(), nullable=False),
        sa.Column("valid", sa.Boolean(), nullable=False),
        sa.Column("reasons_json", sa.Text(), nullable=False),
        sa.CheckConstraint("mode_asked IN ('direct', 'buffered')", name=op.f("ck_fixed_samples_mode_asked")),
        sa.CheckConstraint(
            "mode_proven IN ('direct', 'buffered-cold', 'cached', 'mixed', 'unknown')",
            name=op.f("ck_fixed_samples_mode_proven"),
        ),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_fixed_samples_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_fixed_samples_device_id")),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal_records.id"], name=op.f("fk_fixed_samples_journal_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fixed_samples")),
        sa.UniqueConstraint("journal_id", "ordinal", name=op.f("uq_fixed_samples_journal_id_ordinal")),
    )
    op.create_index(op.f("ix_fixed_samples_device_id"), "fixed_samples", ["device_id"], unique=False)
    op.create_table(
        "io_samples",
        sa.Column("io_mode", sa.String(length=64), nullable=False),
        sa.Column("mode_asked", sa.String(length=64), nullable=False),
        sa.Column("mode_proven", sa.String(length=64), nullable=False),
        sa.Column("beside_compute", sa.Boolean(), nullable=False),
        sa.Column("versions", INT64, nullable=False),
        sa.Column("read_bytes", INT64, nullable=False),
        sa.Column("storage_bytes", INT64, nullable=False),
        sa.Column("duration_ns", INT64, nullable=False),
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("ordinal", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("threads", INT64, nullable=False),
        sa.Column("queue_depth", INT64, nullable=False),
        sa.Column("sequence_length", INT64, nullable=True),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("warmup", sa.Boolean(), nullable=False),
        sa.Column("valid", sa.Boolean(), nullable=False),
        sa.Column("reasons_json", sa.Text(), nullable=False),
        sa.CheckConstraint("io_mode IN ('direct', 'buffered')", name=op.f("ck_io_samples_io_mode")),
        sa.CheckConstraint("mode_asked IN ('direct', 'buffered')", name=op.f("ck_io_samples_mode_asked")),
        sa.CheckConstraint(
            "mode_proven IN ('direct', 'buffered-cold', 'cached', 'mixed', 'unknown')",
            name=op.f("ck_io_samples_mode_proven"),
        ),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_io_samples_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_io_samples_device_id")),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal_records.id"], name=op.f("fk_io_samples_journal_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_io_samples")),
        sa.UniqueConstraint("journal_id", "ordinal", name=op.f("uq_io_samples_journal_id_ordinal")),
    )
    op.create_index(op.f("ix_io_samples_device_id"), "io_samples", ["device_id"], unique=False)
    op.create_table(
        "plans",
        sa.Column("id", INT64, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("content_digest", sa.String(length=64), nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("task", sa.String(length=200), nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("importance_digest", sa.String(length=64), nullable=True),
        sa.Column("device_profile_digest", sa.String(length=64), nullable=False),
        sa.Column("device_profile_id", INT64, nullable=True),
        sa.Column("planner", sa.String(length=64), nullable=False),
        sa.Column("policy", sa.String(length=64), nullable=False),
        sa.Column("target_ns", INT64, nullable=False),
        sa.Column("preload_bytes", INT64, nullable=False),
        sa.Column("working_bytes", INT64, nullable=False),
        sa.Column("sequence_length", INT64, nullable=False),
        sa.Column("depth", INT64, nullable=False),
        sa.Column("width", INT64, nullable=False),
        sa.Column("mean_fidelity_milli", INT64, nullable=False),
        sa.Column("preloaded_bytes", INT64, nullable=False),
        sa.Column("streamed_bytes", INT64, nullable=False),
        sa.Column("predicted_latency_ns", INT64, nullable=False),
        sa.Column("predicted_median_latency_ns", INT64, nullable=False),
        sa.Column("predicted_stall_ns", INT64, nullable=False),
        sa.Column("within_target", sa.Boolean(), nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("plan_json", sa.Text(), nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.Column("planned_wall_ns", INT64, nullable=False),
        sa.ForeignKeyConstraint(["bundle_digest"], ["bundles.digest"], name=op.f("fk_plans_bundle_digest")),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_plans_device_id")),
        sa.ForeignKeyConstraint(
            ["device_profile_id"], ["device_profiles.id"], name=op.f("fk_plans_device_profile_id")
        ),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_plans_task")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
        sa.UniqueConstraint("device_id", "task", "digest", name=op.f("uq_plans_device_id_task_digest")),
    )
    op.create_index(op.f("ix_plans_content_digest"), "plans", ["content_digest"], unique=False)
    op.create_index(op.f("ix_plans_device_id"), "plans", ["device_id"], unique=False)
    op.create_index(op.f("ix_plans_digest"), "plans", ["digest"], unique=False)
    op.create_table(
        "probes",
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        sa.Column("temperature_milli_c", INT64, nullable=True),
        sa.Column("load_milli", INT64, nullable=True),
        sa.Column("battery_percent", INT64, nullable=True),
        sa.Column("free_bytes", INT64, nullable=True),
        sa.Column("available_memory_bytes", INT64, nullable=True),
        sa.Column("throttled", sa.Boolean(), nullable=True),
        sa.Column("sensors_json", sa.Text(), nullable=False),
        sa.Column("verified_json", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_probes_device_id")),
        sa.ForeignKeyConstraint(["journal_id"], ["journal_records.id"], name=op.f("fk_probes_journal_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_probes")),
        sa.UniqueConstraint("journal_id", name=op.f("uq_probes_journal_id")),
    )
    op.create_index("ix_probes_device_id_wall_ns", "probes", ["device_id", "wall_ns"], unique=False)
    op.create_table(
        "runs",
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("unit", INT64, nullable=False),
        sa.Column("plan_id", INT64, nullable=False),
        sa.Column("plan_digest", sa.String(length=64), nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("task_data_digest", sa.String(length=64), nullable=False),
        sa.Column("request_kind", sa.String(length=64), nullable=False),
        sa.Column("io_mode", sa.String(length=64), nullable=False),
        sa.Column("io_mode_proven", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("threads", INT64, nullable=False),
        sa.Column("queue_depth", INT64, nullable=False),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column("agent_digest", sa.String(length=64), nullable=True),
        sa.Column("facts_id", INT64, nullable=True),
        sa.Column("os_build", sa.Text(), nullable=True),
        sa.Column("kernel", sa.Text(), nullable=True),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        sa.Column("cpu_khz_before_json", sa.Text(), nullable=False),
        sa.Column("cpu_khz_after_json", sa.Text(), nullable=False),
        sa.Column("temperature_before_milli_c", INT64, nullable=True),
        sa.Column("temperature_after_milli_c", INT64, nullable=True),
        sa.Column("battery_before_percent", INT64, nullable=True),
        sa.Column("battery_after_percent", INT64, nullable=True),
        sa.Column("load_before_milli", INT64, nullable=True),
        sa.Column("load_after_milli", INT64, nullable=True),
        sa.Column("gate_verdict", sa.String(length=64), nullable=False),
        sa.Column("gates_json", sa.Text(), nullable=False),
        sa.Column("readings_json", sa.Text(), nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("io_mechanism", sa.String(length=32), nullable=True),
        sa.Column("cpu_mechanism", sa.String(length=32), nullable=True),
        sa.Column("emulation_json", sa.Text(), nullable=True),
        sa.Column("verified_json", sa.Text(), nullable=True),
        sa.Column("resident_bytes", INT64, nullable=False),
        sa.Column("preload_bytes", INT64, nullable=False),
        sa.Column("working_bytes", INT64, nullable=False),
        sa.Column("activations_bytes", INT64, nullable=False),
        sa.Column("process_peak_bytes", INT64, nullable=True),
        sa.CheckConstraint("gate_verdict IN ('pass', 'fail', 'ungated')", name=op.f("ck_runs_gate_verdict")),
        sa.CheckConstraint("io_mode IN ('direct', 'buffered')", name=op.f("ck_runs_io_mode")),
        sa.CheckConstraint(
            "io_mode_proven IN ('direct', 'buffered-cold', 'cached', 'mixed', 'unknown')",
            name=op.f("ck_runs_io_mode_proven"),
        ),
        sa.CheckConstraint(
            "request_kind IN ('spawn-cold', 'cold', 'warm', 'cached')", name=op.f("ck_runs_request_kind")
        ),
        sa.ForeignKeyConstraint(["bundle_digest"], ["bundles.digest"], name=op.f("fk_runs_bundle_digest")),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_runs_device_id")),
        sa.ForeignKeyConstraint(["facts_id"], ["device_facts.id"], name=op.f("fk_runs_facts_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_runs_job_id")),
        sa.ForeignKeyConstraint(["journal_id"], ["journal_records.id"], name=op.f("fk_runs_journal_id")),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name=op.f("fk_runs_plan_id")),
        sa.ForeignKeyConstraint(
            ["task_data_digest"], ["task_data.digest"], name=op.f("fk_runs_task_data_digest")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("job_id", "attempt", "unit", name=op.f("uq_runs_job_id_attempt_unit")),
        sa.UniqueConstraint("journal_id", name=op.f("uq_runs_journal_id")),
    )
    op.create_index(op.f("ix_runs_device_id"), "runs", ["device_id"], unique=False)
    op.create_index(op.f("ix_runs_plan_id"), "runs", ["plan_id"], unique=False)
    op.create_table(
        "requests",
        sa.Column("id", INT64, nullable=False),
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("ordinal", INT64, nullable=False),
        sa.Column("task_row", INT64, nullable=False),
        sa.Column("warmup", sa.Boolean(), nullable=False),
        sa.Column("valid", sa.Boolean(), nullable=False),
        sa.Column("reasons_json", sa.Text(), nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("latency_ns", INT64, nullable=False),
        sa.Column("stall_ns", INT64, nullable=False),
        sa.Column("planned_bytes", INT64, nullable=False),
        sa.Column("storage_bytes", INT64, nullable=False),
        sa.Column("mode_asked", sa.String(length=64), nullable=False),
        sa.Column("mode_proven", sa.String(length=64), nullable=False),
        sa.Column("logits_json", sa.Text(), nullable=False),
        sa.Column("trace_json", sa.Text(), nullable=False),
        sa.CheckConstraint("mode_asked IN ('direct', 'buffered')", name=op.f("ck_requests_mode_asked")),
        sa.CheckConstraint(
            "mode_proven IN ('direct', 'buffered-cold', 'cached', 'mixed', 'unknown')",
            name=op.f("ck_requests_mode_proven"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_requests_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_requests")),
        sa.UniqueConstraint("run_id", "ordinal", name=op.f("uq_requests_run_id_ordinal")),
    )
