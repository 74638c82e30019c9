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
from db.models.fleet import DeviceFactsRow, DeviceRow, LeaseRow
from db.models.hosts import HostRow
from db.models.importance import ImportanceProfileRow, ImportanceScoreRow
from db.models.plans import DeviceProfileRow, PlanRow
from db.models.runs import EvaluationRow, RequestRow, RunRow
from db.models.samples import ComputeSampleRow, FixedSampleRow, IoSampleRow, ProbeRow
from db.models.summaries import SampleSummaryRow
from db.models.work import AttemptRow, EventRow, JobRow, JournalRecordRow

__all__ = [
    "AttemptRow",
    "Base",
    "BundleRow",
    "CampaignBatchRow",
    "CampaignCellRow",
    "CampaignRow",
    "CampaignRunRow",
    "ComputeSampleRow",
    "DeviceFactsRow",
    "DeviceProfileRow",
    "DeviceRow",
    "EvaluationRow",
    "EventRow",
    "HostRow",
    "FixedSampleRow",
    "ImportanceProfileRow",
    "ImportanceScoreRow",
    "IoSampleRow",
    "JobRow",
    "JournalRecordRow",
    "LeaseRow",
    "ModelRow",
    "PlanRow",
    "ProbeRow",
    "RequestRow",
    "RunRow",
    "SampleSummaryRow",
    "ScheduleRow",
    "StoreMetaRow",
    "TaskDataRow",
    "TaskRow",
]
