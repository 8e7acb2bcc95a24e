"""The embedded stack: RabbitMQ, Valkey and the services as processes under one supervisor.

The command line calls ``up`` and ``down``. ``tidegate status`` shows the result of ``state``.
"""

from tidegate.stack.errors import ChildFailed, MissingPart, PortBusy, StackError
from tidegate.stack.plan import log_file
from tidegate.stack.record import ChildRecord, StackRecord
from tidegate.stack.starting import OnProgress, Progress, run, state, up
from tidegate.stack.stopping import down

__all__ = [
    "ChildFailed",
    "ChildRecord",
    "MissingPart",
    "OnProgress",
    "PortBusy",
    "Progress",
    "StackError",
    "StackRecord",
    "down",
    "log_file",
    "run",
    "state",
    "up",
]
