"""Views for analysts: stable names and columns, whatever the tables behind them become.

Every upgrade of a store makes them anew from here, after its migrations; a change of a view therefore needs
a revision (which may be empty), or stores would keep the old one.

They hold what both databases can compute alike: counts, sums, least, mean and greatest. SQLite has no
percentiles: medians, p95 and their intervals come from ``db.runs`` and ``stifarm plans query``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, inspect, text

Type = Literal["integer", "boolean", "text"]


@dataclass(frozen=True)
class View:
    """One view. ``columns`` names what ``query`` selects, in order: "name" (an integer) or "name:type"."""

    name: str
    columns: str
    query: str

    @property
    def types(self) -> dict[str, Type]:
        """The type of each column, in order."""
        words: dict[str, Type] = {"text": "text", "boolean": "boolean", "": "integer"}
        pairs = (column.partition(":") for column in self.columns.split())
        return {name: words[kind] for name, _, kind in pairs}


def make_views(connection: Connection) -> None:
    """Create all views, which must not be there."""
    for view in VIEWS:
        connection.execute(text(f"CREATE VIEW {view.name} ({', '.join(view.types)}) AS {view.query.strip()}"))


def drop_views(connection: Connection) -> None:
    """Drop those views of ours that are there."""
    there = set(inspect(connection).get_view_names())
    for view in VIEWS:
        if view.name in there:
            connection.execute(text(f"DROP VIEW {view.name}"))


def _count(condition: str) -> str:
    """How many rows of a group fulfil ``condition``, as a 64-bit integer."""
    return f"CAST(coalesce(sum(CASE WHEN {condition} THEN 1 ELSE 0 END), 0) AS BIGINT)"


_COUNTED = "r.valid AND NOT r.warmup"

_LATEST_PLANS = View(
    "v_latest_plans",
    """plan_id plan_digest:text device_id device:text task:text policy:text target_ns preload_bytes
    working_bytes bundle_digest:text bundle:text depth width mean_fidelity_milli preloaded_bytes
    streamed_bytes predicted_latency_ns predicted_median_latency_ns predicted_stall_ns within_target:boolean
    device_profile_digest:text profile_measured_wall_ns unfit:boolean borrowed:boolean emulated:boolean
    planned_wall_ns""",
    """
SELECT p.id, p.digest, p.device_id, d.name, p.task, p.policy, p.target_ns, p.preload_bytes, p.working_bytes,
  p.bundle_digest, b.name, p.depth, p.width, p.mean_fidelity_milli, p.preloaded_bytes, p.streamed_bytes,
  p.predicted_latency_ns, p.predicted_median_latency_ns, p.predicted_stall_ns, p.within_target,
  p.device_profile_digest, f.measured_wall_ns, f.unfit, p.borrowed, p.emulated, p.planned_wall_ns
FROM (SELECT q.*, row_number() OVER (
    PARTITION BY q.device_id, q.task, q.policy, q.target_ns, q.preload_bytes, q.working_bytes
    ORDER BY q.planned_wall_ns DESC, q.id DESC) AS place FROM plans q) p
JOIN devices d ON d.id = p.device_id
JOIN bundles b ON b.digest = p.bundle_digest
LEFT JOIN device_profiles f ON f.id = p.device_profile_id
WHERE p.place = 1 AND d.retired_wall_ns IS NULL
""",
)

_RUN_SUMMARY = View(
    "v_run_summary",
    """run_id device_id device:text job_id:text attempt unit plan_id plan_digest:text task:text policy:text
    target_ns preload_bytes request_kind:text engine:text io_mode:text io_mode_proven:text agent_digest:text
    os_build:text kernel:text boot_id:text gate_verdict:text emulated:boolean wall_ns
    requests invalid within_target within_target_ppm min_latency_ns mean_latency_ns max_latency_ns
    stall_share_ppm mean_storage_bytes buffers_bytes process_peak_bytes compacted:boolean""",
    f"""
SELECT u.id, u.device_id, d.name, u.job_id, u.attempt, u.unit, u.plan_id, u.plan_digest, p.task, p.policy,
  p.target_ns, p.preload_bytes, u.request_kind, u.engine, u.io_mode, u.io_mode_proven, u.agent_digest,
  u.os_build, u.kernel, u.boot_id, u.gate_verdict, u.emulated, u.wall_ns,
  s.requests, s.invalid, s.within,
  1000000 * s.within / nullif(s.requests, 0), s.least, s.mean, s.greatest, s.stall_ppm, s.storage,
  u.resident_bytes + u.preload_bytes + u.working_bytes + u.activations_bytes, u.process_peak_bytes,
  j.compacted_wall_ns IS NOT NULL
FROM runs u
JOIN plans p ON p.id = u.plan_id
JOIN devices d ON d.id = u.device_id
JOIN journal_records j ON j.id = u.journal_id
LEFT JOIN (
  SELECT r.run_id AS run_id,
    {_count(_COUNTED)} AS requests,
    {_count("NOT r.valid AND NOT r.warmup")} AS invalid,
    {_count(f"{_COUNTED} AND r.latency_ns <= p.target_ns")} AS within,
    min(CASE WHEN {_COUNTED} THEN r.latency_ns END) AS least,
    CAST(avg(CASE WHEN {_COUNTED} THEN r.latency_ns END) AS BIGINT) AS mean,
    max(CASE WHEN {_COUNTED} THEN r.latency_ns END) AS greatest,
    CAST(1000000.0 * sum(CASE WHEN {_COUNTED} THEN r.stall_ns END)
      / nullif(sum(CASE WHEN {_COUNTED} THEN r.latency_ns END), 0) AS BIGINT) AS stall_ppm,
    CAST(avg(CASE WHEN {_COUNTED} THEN r.storage_bytes END) AS BIGINT) AS storage
  FROM requests r JOIN runs u ON u.id = r.run_id JOIN plans p ON p.id = u.plan_id
  GROUP BY r.run_id) s ON s.run_id = u.id
""",
)

_DEVICE_STATUS = View(
    "v_device_status",
    """device_id device:text identity:text transport:text host:text engine:text emulated:boolean
    agent_digest:text last_seen_wall_ns os_build:text kernel:text boot_id:text facts_wall_ns
    lease_owner:text lease_counter lease_expires_wall_ns queued_jobs running_jobs done_jobs failed_jobs
    last_record_wall_ns temperature_milli_c battery_percent free_bytes throttled:boolean probe_wall_ns""",
    f"""
SELECT d.id, d.name, d.identity, d.transport, d.host, d.engine, d.emulated, d.agent_digest,
  d.last_seen_wall_ns, f.os_build, f.kernel, f.boot_id, f.seen_wall_ns, l.owner, l.counter, l.expires_wall_ns,
  coalesce(w.queued, 0), coalesce(w.running, 0), coalesce(w.done, 0), coalesce(w.failed, 0),
  (SELECT j.ingested_wall_ns FROM journal_records j WHERE j.id =
    (SELECT max(k.id) FROM journal_records k WHERE k.device_id = d.id)),
  s.temperature_milli_c, s.battery_percent, s.free_bytes, s.throttled, s.wall_ns
FROM devices d
LEFT JOIN device_facts f ON f.id = (SELECT max(g.id) FROM device_facts g WHERE g.device_id = d.id)
LEFT JOIN leases l ON l.device_id = d.id
LEFT JOIN (
  SELECT j.device_id, {_count("j.state = 'queued'")} AS queued, {_count("j.state = 'running'")} AS running,
    {_count("j.state = 'done'")} AS done, {_count("j.state = 'failed'")} AS failed
  FROM jobs j GROUP BY j.device_id) w ON w.device_id = d.id
LEFT JOIN probes s ON s.id = (SELECT max(t.id) FROM probes t WHERE t.device_id = d.id)
WHERE d.retired_wall_ns IS NULL
""",
)

_LATEST_PROFILES = View(
    "v_latest_profiles",
    """profile_id profile_digest:text device_id device:text bundle_digest:text bundle:text engine:text
    sequence_length threads queue_depth unfit:boolean emulated:boolean emulation_json:text agent_digest:text
    os_build:text kernel:text job_id:text measured_wall_ns""",
    """
SELECT p.id, p.digest, p.device_id, d.name, p.bundle_digest, b.name, p.engine, p.sequence_length, p.threads,
  p.queue_depth, p.unfit, p.emulated, p.emulation_json, p.agent_digest, f.os_build, f.kernel, p.job_id,
  p.measured_wall_ns
FROM (SELECT q.*, row_number() OVER (
    PARTITION BY q.device_id, q.bundle_digest, q.engine, q.sequence_length, q.threads, q.queue_depth,
      q.emulation_json ORDER BY q.created_wall_ns DESC, q.id DESC) AS place FROM device_profiles q) p
JOIN devices d ON d.id = p.device_id
JOIN bundles b ON b.digest = p.bundle_digest
LEFT JOIN device_facts f ON f.id = p.facts_id
WHERE p.place = 1 AND d.retired_wall_ns IS NULL
""",
)

_JOB_STATUS = View(
    "v_job_status",
    """job_id:text kind:text device_id device:text state:text units results failures rejected attempts
    last_attempt last_attempt_state:text refused:text created_wall_ns updated_wall_ns""",
    f"""
SELECT j.id, j.kind, j.device_id, d.name, j.state, j.units, coalesce(r.results, 0), coalesce(r.failures, 0),
  coalesce(r.rejected, 0), coalesce(t.attempts, 0), a.number, a.state, a.refused, j.created_wall_ns,
  j.updated_wall_ns
FROM jobs j
JOIN devices d ON d.id = j.device_id
LEFT JOIN (SELECT job_id, count(*) AS attempts, max(number) AS newest FROM attempts GROUP BY job_id) t
  ON t.job_id = j.id
LEFT JOIN attempts a ON a.job_id = j.id AND a.number = t.newest
LEFT JOIN (
  SELECT k.job_id, count(DISTINCT CASE WHEN k.type = 'result' AND k.rejected IS NULL THEN k.unit END)
      AS results,
    {_count("k.type = 'failure'")} AS failures, {_count("k.rejected IS NOT NULL")} AS rejected
  FROM journal_records k GROUP BY k.job_id) r ON r.job_id = j.id
""",
)


def _validity_of(kind: str, table: str) -> str:
    return f"""
SELECT s.device_id, '{kind}', s.bundle_digest, s.engine, s.emulated, s.warmup, s.valid, s.reasons_json,
  count(*), 0 FROM {table} s
GROUP BY s.device_id, s.bundle_digest, s.engine, s.emulated, s.warmup, s.valid, s.reasons_json"""


_SAMPLE_VALIDITY = View(
    "v_sample_validity",
    """device_id device:text kind:text bundle_digest:text engine:text emulated:boolean warmup:boolean
    valid:boolean reasons_json:text samples compacted""",
    f"""
SELECT c.device_id, d.name, c.kind, c.bundle_digest, c.engine, c.emulated, c.warmup, c.valid, c.reasons_json,
  CAST(sum(c.samples) AS BIGINT), CAST(sum(c.compacted) AS BIGINT)
FROM (
SELECT u.device_id AS device_id, 'request' AS kind, u.bundle_digest AS bundle_digest, u.engine AS engine,
  r.emulated AS emulated, r.warmup AS warmup, r.valid AS valid, r.reasons_json AS reasons_json,
  count(*) AS samples, 0 AS compacted FROM requests r JOIN runs u ON u.id = r.run_id
GROUP BY u.device_id, u.bundle_digest, u.engine, r.emulated, r.warmup, r.valid, r.reasons_json
UNION ALL{_validity_of("io", "io_samples")}
UNION ALL{_validity_of("compute", "compute_samples")}
UNION ALL{_validity_of("fixed", "fixed_samples")}
UNION ALL
SELECT s.device_id, s.kind, s.bundle_digest, s.engine, s.emulated, s.warmup, s.valid, s.reasons_json,
  sum(s.count), sum(s.count) FROM sample_summaries s
WHERE s.quantity IN ('duration', 'compute', 'head', 'latency')
GROUP BY s.device_id, s.kind, s.bundle_digest, s.engine, s.emulated, s.warmup, s.valid, s.reasons_json
) c JOIN devices d ON d.id = c.device_id
GROUP BY c.device_id, d.name, c.kind, c.bundle_digest, c.engine, c.emulated, c.warmup, c.valid, c.reasons_json
""",
)

VIEWS = (_LATEST_PLANS, _RUN_SUMMARY, _DEVICE_STATUS, _LATEST_PROFILES, _JOB_STATUS, _SAMPLE_VALIDITY)
"""All there are. None selects from another."""
