"""``python -m deploy.dashboards [--check]``: write ``deploy/grafana/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.dashboards.costs import COSTS
from deploy.dashboards.models import DRIFT, ENDPOINT, LANGUAGE_MODELS
from deploy.dashboards.objectives import ALERTS
from deploy.dashboards.operation import AUTOSCALER, OVERVIEW
from deploy.dashboards.panels import as_json

FOLDER = Path(__file__).parents[1] / "grafana"
DASHBOARDS = (OVERVIEW, ALERTS, ENDPOINT, AUTOSCALER, LANGUAGE_MODELS, DRIFT, COSTS)


def texts() -> dict[Path, str]:
    """Return the text of each dashboard's file. The keys are the files' paths."""
    return {
        FOLDER / f"{dashboard.name}.json": json.dumps(as_json(dashboard), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }


def main() -> int:
    """Write the files. With ``--check``, write nothing, and return 1 if a file is not up to date."""
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in texts().items() if not path.is_file() or path.read_text() != text]
        for path in stale:
            print(f"{path.relative_to(FOLDER.parents[1])} is not up to date: run `make docs`.")
        return 1 if stale else 0
    for path, text in texts().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
