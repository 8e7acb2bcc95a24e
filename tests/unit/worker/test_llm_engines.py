"""What engines of language models need on a host: vLLM's environment, an upstream's credential."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.worker.adapters import llm_engines, triton_command
from services.worker.adapters.triton_install import TritonInstall
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, LlmSpec, UpstreamSpec

pytestmark = pytest.mark.unit

SECRET = "sk-0123456789"


def upstream(credential: str | None) -> DeploymentSpec:
    llm = {"engine": "openai-url", "upstream": "https://models.example/v1", "credential": credential}
    return DeploymentSpec.model_validate({"name": "m", "model": "m", "version": 1, "llm": llm})


def test_a_host_without_vllm_says_which_command_installs_it(tmp_path: Path):
    with pytest.raises(ModelFailed, match="make vllm"):
        llm_engines.vllm_python(tmp_path)
    (tmp_path / "engines" / "vllm").mkdir(parents=True)
    (tmp_path / "engines" / "vllm" / ".stamp").touch()
    assert llm_engines.vllm_python(tmp_path) == tmp_path / "engines" / "vllm" / "bin" / "python"


def test_the_model_may_read_the_environment_of_its_engine(tmp_path: Path):
    install = TritonInstall(tmp_path / "t" / "bin" / "s", tmp_path / "t" / "backends", None)
    python = tmp_path / "engines" / "vllm" / "bin" / "python"
    assert tmp_path / "engines" / "vllm" in install.with_engine(python).roots()
    assert tmp_path / "engines" / "vllm" not in install.roots()


def test_a_credential_comes_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROVIDER_API_KEY", f"{SECRET}\n")
    (tmp_path / "key").write_text(f"{SECRET}\n")
    expected = {llm_engines.CREDENTIAL: SECRET}
    assert llm_engines.secrets(upstream("env:PROVIDER_API_KEY"), tmp_path) == expected
    assert llm_engines.secrets(upstream(f"file:{tmp_path}/key"), tmp_path) == expected
    assert llm_engines.secrets(upstream(None), tmp_path) == {}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("env:TIDEGATE_TOKEN", "is not allowed"),
        ("env:HOME", "is not allowed"),
        ("env:MISSING_API_KEY", "has no variable"),
        ("file:{folder}/missing", "cannot be read"),
        ("file:/etc/passwd", "is not in"),
        ("file:{folder}/link", "is not in"),
        ("file:{folder}/two", "one line"),
    ],
)
def test_only_credentials_that_the_operator_made_usable_are_read(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TIDEGATE_TOKEN", SECRET)
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "two").write_text(f"{SECRET}\n{SECRET}\n")
    with pytest.raises(ModelFailed, match=message) as refused:
        llm_engines.secrets(upstream(place.format(folder=tmp_path)), tmp_path)
    assert SECRET not in refused.value.message


@pytest.mark.parametrize("header", ["api-key", "X-Api-Key", "Authorization", None])
def test_a_header_of_its_own_can_carry_the_credential(header: str | None):
    far = {"address": "https://far/v2/models/m", "credential": "env:FAR_API_KEY", "credential_header": header}
    assert UpstreamSpec.model_validate(far).credential_header == header
    llm = {"engine": "openai-url", "upstream": "https://far/v1", "credential": "env:FAR_API_KEY"}
    assert LlmSpec.model_validate(llm | {"credential_header": header}).credential_header == header


@pytest.mark.parametrize(
    ("header", "credential", "message"),
    [
        ("api-key", None, "needs `credential`: set both, or remove credential_header"),
        ("Host", "env:FAR_API_KEY", "must not be Host"),
        ("content-length", "env:FAR_API_KEY", "must not be content-length"),
        ("x: y\r\nz", "env:FAR_API_KEY", "should match pattern"),
    ],
)
def test_a_header_that_cannot_carry_a_credential(header: str, credential: str | None, message: str):
    given = {"credential": credential, "credential_header": header}
    with pytest.raises(ValidationError, match=message):
        UpstreamSpec.model_validate({"address": "https://far/v2/models/m", **given})
    with pytest.raises(ValidationError, match=message):
        LlmSpec.model_validate({"engine": "openai-url", "upstream": "https://far/v1", **given})


def test_a_credential_is_not_in_the_text_of_the_options():
    options = triton_command.TritonOptions("r", secrets={llm_engines.CREDENTIAL: SECRET})
    assert SECRET not in repr(options)
