"""``python -m services.worker.settings_report``: the settings of a worker in this environment, as JSON."""

from __future__ import annotations

import json

from services.worker.settings import WorkerSettings
from tidegate.kernel.settings.report import report

if __name__ == "__main__":
    print(json.dumps(report(WorkerSettings())))
