"""All tables, one module per subject. docs/schema.md describes them for readers of the database."""

from db.models.artifacts import BundleRow, ModelRow, TaskDataRow, TaskRow
from db.models.base import Base, StoreMetaRow
from db.models.campaigns import (
    CampaignBatchRow,
    CampaignCellRow,
    CampaignRow,
    CampaignRunRow,
    ScheduleRow,
)
from db.models.controllers import ControllerRow
from db.models.fleet import DeviceFactsRow, DeviceRow, LeaseRow
from db.models.health import (
    AlertDeliveryRow,
    AlertRow,
    DeviceFailureRow,
    HealthCheckRow,
    HealthResultRow,
    QuarantineRow,
    RecoveryStepRow,
    ReservationRow,
)
from db.models.hosts import HostRow
from db.models.importance import ImportanceProfileRow, ImportanceScoreRow
from db.models.plans import DeviceProfileRow, PlanRow
from db.models.runs import EvaluationRow, RequestRow, RunRow
from db.models.samples import ComputeSampleRow, FixedSampleRow, IoSampleRow, ProbeRow
from db.models.summaries import SampleSummaryRow
from db.models.work import AttemptRow, EventRow, JobRow, JournalRecordRow

__all__ = [
    "AlertDeliveryRow",
    "AlertRow",
    "AttemptRow",
    "Base",
    "BundleRow",
    "CampaignBatchRow",
    "CampaignCellRow",
    "CampaignRow",
    "CampaignRunRow",
    "ComputeSampleRow",
    "ControllerRow",
    "DeviceFactsRow",
    "DeviceFailureRow",
    "DeviceProfileRow",
    "DeviceRow",
    "EvaluationRow",
    "EventRow",
    "HostRow",
    "FixedSampleRow",
    "HealthCheckRow",
    "HealthResultRow",
    "ImportanceProfileRow",
    "ImportanceScoreRow",
    "IoSampleRow",
    "JobRow",
    "JournalRecordRow",
    "LeaseRow",
    "ModelRow",
    "PlanRow",
    "ProbeRow",
    "QuarantineRow",
    "RecoveryStepRow",
    "RequestRow",
    "ReservationRow",
    "RunRow",
    "SampleSummaryRow",
    "ScheduleRow",
    "StoreMetaRow",
    "TaskDataRow",
    "TaskRow",
]
