"""Print the worker's settings in this environment as JSON: ``python -m services.worker.settings_report``."""

from __future__ import annotations

import json

from services.worker.settings import WorkerSettings
from tidegate.kernel.settings.report import report

if __name__ == "__main__":
    print(json.dumps(report(WorkerSettings())))
