"""Exit codes. Scripts test for them, so they are part of the interface."""

from __future__ import annotations

from tidegate.client.errors import Unreachable
from tidegate.kernel import errors

OK = 0
ERROR = 1
USAGE = 2
NOT_FOUND = 3
MODEL_FAILED = 4
TIMEOUT = 5
UNREACHABLE = 6
REFUSED = 7
INTERRUPTED = 130

_BY_ERROR: dict[type[errors.TidegateError], int] = {
    errors.NotFound: NOT_FOUND,
    errors.ModelFailed: MODEL_FAILED,
    errors.DeadlinePassed: TIMEOUT,
    Unreachable: UNREACHABLE,
    errors.Unavailable: UNREACHABLE,
    errors.NoRoutes: UNREACHABLE,
    errors.Overloaded: REFUSED,
    errors.TooMany: REFUSED,
    errors.NoCapacity: REFUSED,
    errors.Conflict: REFUSED,
}


class UsageError(errors.TidegateError):
    """An error in the command line: a wrong value of an option, or a wrong combination of options."""

    reason = "usage"


def code_of(error: errors.TidegateError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, UsageError):
        return USAGE
    return next((_BY_ERROR[cls] for cls in type(error).__mro__ if cls in _BY_ERROR), ERROR)
