"""Errors of the embedded stack. Every message says what to do."""

from __future__ import annotations


class StackError(Exception):
    """An operation on the stack failed, for example a start, a restart or a backup.

    ``str()`` returns the complete message.
    """


class PortBusy(StackError):
    """Another process uses a port of the stack."""


class ChildFailed(StackError):
    """A process of the stack ended during the start, or was not ready in time."""


class MissingPart(StackError):
    """A program that the stack needs is not installed."""
