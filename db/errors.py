"""The store's branch of the error tree.

StifarmError
└── StoreError               the database cannot be reached, read or written
    ├── StoreUnreachableError  nobody answers, the connection was lost, it is locked: it may come back
    │   └── StoreFullError         its disk is full
    ├── StoreVersionError    its schema is older or newer than this program
    ├── UnknownNameError     a name that was given is none of its rows (exit code 2)
    ├── QuarantinedError     the farm has put the device in quarantine
    └── LeaseHeldError       another controller holds the device
        └── DeviceReservedError   a person does

InputError
└── ReplacedError            the campaign was given other content since it was read
"""

from __future__ import annotations

from sti_runtime.errors import InputError, StifarmError


class StoreError(StifarmError):
    """The database cannot be reached, opened, read or written, or lacks a row that was named."""


class StoreUnreachableError(StoreError):
    """The database does not answer, is locked by somebody else, or the connection to it was lost; whether the
    last commit was made is not known. Trying again may help; ``waited``: it was waited for already."""

    waited = False


class StoreFullError(StoreUnreachableError):
    """The disk of the database is full: nothing can be written until there is room again."""


class StoreVersionError(StoreError):
    """The schema of the database is not the one this program works with."""


class UnknownNameError(StoreError):
    """The store has nothing of a name that was given; nothing was changed."""

    exit_code = InputError.exit_code


class QuarantinedError(StoreError):
    """The farm has put the device in quarantine: it gets no jobs but health checks."""


class ReplacedError(InputError):
    """A campaign was given other content after it was read; nothing was changed."""


class LeaseHeldError(StoreError):
    """A device's lease belongs to another owner and has not expired."""


class DeviceReservedError(LeaseHeldError):
    """A person has reserved the device: the farm does not use it until then."""
