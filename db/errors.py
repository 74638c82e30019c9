"""The store's branch of the error tree.

StifarmError
└── StoreError               the database cannot be reached, read or written
    ├── StoreVersionError    its schema is older or newer than this program
    └── LeaseHeldError       another controller holds the device
"""

from __future__ import annotations

from sti_runtime.errors import StifarmError


class StoreError(StifarmError):
    """The database cannot be reached, opened, read or written, or lacks a row that was named."""


class StoreVersionError(StoreError):
    """The schema of the database is not the one this program works with."""


class LeaseHeldError(StoreError):
    """A device's lease belongs to another owner and has not expired."""
