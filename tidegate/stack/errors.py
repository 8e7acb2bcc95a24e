"""What can go wrong with the embedded stack; every message names the remedy."""

from __future__ import annotations


class StackError(Exception):
    """The stack could not be started or stopped; ``str()`` is complete text for a person."""


class PortBusy(StackError):
    """A port of the stack is taken by a process that is not part of it."""


class ChildFailed(StackError):
    """A process of the stack died, or was not ready in time, while the stack was starting."""


class MissingPart(StackError):
    """A program that the stack runs is not installed."""
