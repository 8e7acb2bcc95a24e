"""Download a model and its metadata from an MLflow tracking server, over its REST API."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from tidegate.cli.exit_codes import UsageError
from tidegate.kernel.protocol import mlflow_model
from tidegate.kernel.protocol.archives import Unsafe, safe_path

TIMEOUT_S = 60.0
MAX_ANSWER = 16 * 1024 * 1024
MAX_FILES = 10_000
_API, _FILES = "/api/2.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[^/]+))")
_LOGGED = re.compile(r"models:/(?P<id>m-[0-9a-f]+)")
_RUN = re.compile(r"runs:/(?P<run>[^/]+)/(?P<path>.+)")
# The tag in which MLflow stores the Git commit of a run.
_COMMIT = "mlflow.source.git.commit"


class TrackingServer:
    """A client of an MLflow tracking server.

    ``address``: the server's URL. If it is None, the environment variable MLFLOW_TRACKING_URI contains the
    URL. The credentials come from other environment variables of MLflow.
    """

    def __init__(self, address: str | None, environment: Mapping[str, str] = os.environ) -> None:
        found = address or environment.get("MLFLOW_TRACKING_URI") or ""
        if urlsplit(found).scheme not in ("http", "https"):
            raise UsageError(
                "models:/ and runs:/ need the address of a tracking server. Set MLFLOW_TRACKING_URI, or add "
                "--tracking-uri http://HOST:5000. A folder on this machine needs none: tidegate import "
                "mlflow DIR"
            )
        self.address = found.rstrip("/")
        self._headers = {}
        if token := environment.get("MLFLOW_TRACKING_TOKEN"):
            self._headers["Authorization"] = f"Bearer {token}"
        elif user := environment.get("MLFLOW_TRACKING_USERNAME"):
            pair = f"{user}:{environment.get('MLFLOW_TRACKING_PASSWORD', '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"

    def download(self, source: str, into: Path) -> dict[str, Any]:
        """Write the files of a model into a new folder. Return the version's metadata and the model's name.

        ``source``: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``models:/m-ID`` or ``runs:/RUN/PATH``.
        Raise UsageError if the model cannot be downloaded.
        """
        if (logged := _LOGGED.fullmatch(source)) is not None:
            return self._logged(logged["id"], into)
        if (model := _MODEL.fullmatch(source)) is not None:
            return self._version(model, into)
        if (run := _RUN.fullmatch(source)) is not None:
            return self._run(run["run"], run["path"], into)
        raise UsageError(
            f"{source} is not the name of an MLflow model: write models:/NAME/VERSION, models:/NAME/latest, "
            "models:/NAME@ALIAS, models:/m-ID or runs:/RUN/PATH, or a folder with MLmodel."
        )

    def _version(self, wanted: re.Match[str], into: Path) -> dict[str, Any]:
        name = wanted["name"]
        if wanted["alias"]:
            found = self.get("/registered-models/alias", name=name, alias=wanted["alias"])["model_version"]
        elif wanted["version"] == "latest":
            asked = {"filter": f"name='{name}'", "max_results": 1, "order_by": "version_number DESC"}
            versions = self.get("/model-versions/search", **asked).get("model_versions") or [None]
            if (found := versions[0]) is None:
                raise UsageError(f"{self.address} has no version of the model {name!r}. Check the name.")
        else:
            found = self.get("/model-versions/get", name=name, version=wanted["version"])["model_version"]
        number = found["version"]
        where = self.get("/model-versions/get-download-uri", name=name, version=number)["artifact_uri"]
        if (logged := _LOGGED.fullmatch(where)) is not None:
            where = self.get(f"/logged-models/{logged['id']}")["model"]["info"]["artifact_uri"]
        self._fetch(where, into)
        facts = self._facts(found.get("run_id") or "")
        tags = {"mlflow.model": name, "mlflow.version": str(number)} | _pairs(found.get("tags"))
        facts["tags"] = facts.get("tags", {}) | tags
        return facts | {"name": name, "notes": found.get("description") or ""}

    def _logged(self, model_id: str, into: Path) -> dict[str, Any]:
        model = self.get(f"/logged-models/{quote(model_id)}")["model"]
        self._fetch(model["info"]["artifact_uri"], into)
        return self._facts(model["info"].get("source_run_id") or "") | {"name": model["info"].get("name")}

    def _run(self, run_id: str, path: str, into: Path) -> dict[str, Any]:
        run = self.get("/runs/get", run_id=run_id)["run"]
        where = f"{run['info']['artifact_uri'].rstrip('/')}/{path}"
        # MLflow 3 stores a logged model outside of its run's folder. So ask the server for the address of the
        # model's files.
        for output in run.get("outputs", {}).get("model_outputs", ()):
            info = self.get(f"/logged-models/{quote(output['model_id'])}")["model"]["info"]
            if info.get("name") == path:
                where = info["artifact_uri"]
        self._fetch(where, into)
        return self._facts(run_id) | {"name": path.rpartition("/")[2]}

    def _facts(self, run_id: str) -> dict[str, Any]:
        """Return the metrics, parameters, tags and other facts of a run, as the metadata of a version."""
        if not run_id:
            return {}
        run = self.get("/runs/get", run_id=run_id)["run"]
        data, tags = run.get("data", {}), _pairs(run.get("data", {}).get("tags"))
        datasets = [each["dataset"]["name"] for each in run.get("inputs", {}).get("dataset_inputs", ())]
        metrics = {each["key"]: each["value"] for each in data.get("metrics", ())}
        ended = run["info"].get("end_time") or run["info"].get("start_time")
        return {
            "run": run_id,
            "metrics": {key: float(value) for key, value in metrics.items() if _is_finite(value)},
            "parameters": {each["key"]: each["value"] for each in data.get("params", ())},
            "tags": {key: value for key, value in tags.items() if not key.startswith("mlflow.")},
            "commit": tags.get(_COMMIT),
            "dataset": ", ".join(datasets) or None,
            "owner": tags.get("mlflow.user"),
            "trained_at": _moment(ended),
        }

    def _fetch(self, where: str, into: Path) -> None:
        """Download the files at an artifact address into a new folder."""
        scheme = urlsplit(where).scheme
        if scheme in ("", "file"):
            folder = Path(urlsplit(where).path)
            # Copy the folder only if it contains a model. Otherwise the server could make this command copy
            # any folder of this machine.
            if not (folder / mlflow_model.FILE).is_file():
                raise UsageError(
                    f"The model's files are at {where}, a folder of the tracking server's machine. Start "
                    "the server with --serve-artifacts, or copy the folder and import it: tidegate import "
                    "mlflow DIR"
                )
            shutil.copytree(folder, into)
            return
        if scheme != "mlflow-artifacts":
            raise UsageError(
                f"The model's files are at {where}, which the tracking server does not serve. Download "
                "them (mlflow artifacts download -u SOURCE -d DIR), then: tidegate import mlflow DIR"
            )
        into.mkdir(parents=True)
        left, count = [urlsplit(where).path.strip("/")], 0
        root = left[0]
        while left:
            folder_path = left.pop()
            for each in self.get_raw(f"{_FILES}?{urlencode({'path': folder_path})}").get("files", ()):
                inner = f"{folder_path}/{each['path']}"
                count += 1
                if count > MAX_FILES:
                    raise UsageError(
                        f"The model has more than {MAX_FILES} files. Download the model (mlflow artifacts "
                        "download), then: tidegate import mlflow DIR"
                    )
                if each.get("is_dir"):
                    left.append(inner)
                    continue
                try:
                    target = into / safe_path(inner[len(root) + 1 :])
                except Unsafe:
                    raise UsageError(
                        f"The tracking server names the file {each['path'][:80]!r}, which is not a path "
                        "in the model's folder. Download the model yourself, then: tidegate import mlflow DIR"
                    ) from None
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._open(f"{_FILES}/{quote(inner)}") as answer, target.open("xb") as file:
                    shutil.copyfileobj(answer, file, 1024 * 1024)
        if not count:
            raise UsageError(f"{where} has no files. Check the name of the model.")

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Send GET to a path of MLflow's REST API. Return the JSON answer. Raise UsageError for an error."""
        return self.get_raw(f"{_API}{path}{'?' + urlencode(query) if query else ''}")

    def get_raw(self, path: str) -> dict[str, Any]:
        """Send GET to a path of the server. Return the JSON answer. Raise UsageError for an error."""
        with self._open(path) as answer:
            text = answer.read(MAX_ANSWER + 1)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if len(text) > MAX_ANSWER or not isinstance(found, dict):
            raise UsageError(
                f"{self.address} does not answer as an MLflow tracking server does. Check --tracking-uri."
            )
        return found

    def _open(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers=self._headers)
        try:
            # A redirect is not followed, because the credential would go to another address.
            return urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as problem:
            raise UsageError(f"{self.address} answers {problem.code}: {_message(problem)}") from None
        except (OSError, ValueError) as problem:
            raise UsageError(
                f"The tracking server {self.address} does not answer: {problem}. Check --tracking-uri."
            ) from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A urllib handler that follows no redirect. For a redirect, urllib raises HTTPError."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Return None, so that the redirect is not followed."""


def _message(problem: urllib.error.HTTPError) -> str:
    if problem.code in (401, 403):
        return "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    try:
        return str(json.loads(problem.read(MAX_ANSWER))["message"])[:300]
    except (ValueError, KeyError, TypeError, OSError):
        return str(problem.reason)


def _pairs(entries: Any) -> dict[str, str]:
    return {str(each["key"]): str(each["value"]) for each in entries or ()}


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) != float("inf") and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _moment(milliseconds: Any) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc).isoformat()
