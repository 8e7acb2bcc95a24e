"""An ONNX file on onnxruntime, for a Triton without the native onnxruntime backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
from rows import Rows, parameter


class TritonPythonModel:
    """One instance of the model; Triton makes as many as the instance group says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session; a file that cannot be served fails here, with the reason."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(
            str(path), options(config), providers=["CPUExecutionProvider"]
        )
        check_outputs(self._session)
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        outputs: list[Any] = self._session.run(names, feed)
        return outputs


def options(config: dict[str, Any]) -> Any:
    """Session options: as many threads as the deployment gives, and none that spins while it waits."""
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = int(parameter(config, "threads") or 1)
    found.inter_op_num_threads = 1
    found.log_severity_level = 3
    found.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return found


def check_outputs(session: Any) -> None:
    """Refuse outputs that are not tensors."""
    for output in session.get_outputs():
        if not output.type.startswith("tensor("):
            raise ValueError(
                f"the output {output.name!r} is a {output.type}, and only tensors can be served. "
                "If skl2onnx wrote this file, convert again with options={'zipmap': False}."
            )
