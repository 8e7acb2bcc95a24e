"""SageMaker's asynchronous inference: answers are written to the store, also if a gateway dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.integration

BODY = {"instances": [[1, 2], [3, 4]]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in.json").write_text(json.dumps(BODY))
    return tmp_path


async def accept(url: str, root: Path, **headers: str) -> dict[str, str]:
    given = {f"X-Amzn-SageMaker-{name.replace('_', '-')}": value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        answer = await http.post(
            "/endpoints/digits/async-invocations",
            headers={"X-Amzn-SageMaker-InputLocation": f"file://{root}/in.json", **given},
        )
    assert answer.status_code == 202, answer.text
    return {
        "id": answer.json()["InferenceId"],
        "output": answer.headers["x-amzn-sagemaker-outputlocation"].removeprefix("file://"),
        "failure": answer.headers["x-amzn-sagemaker-failurelocation"].removeprefix("file://"),
    }


async def test_another_gateway_writes_the_answer_of_one_that_died(gateways, worker, until, root):
    settings = {"async_url": f"file://{root}"}
    dying, other = gateways.start(**settings), gateways.start(**settings)
    worker.open.clear()
    accepted = await accept(dying.url, root)
    dying.process.send_signal(signal.SIGKILL)
    dying.process.wait()
    assert not Path(accepted["output"]).exists()
    worker.open.set()

    async def written() -> bool:
        return Path(accepted["output"]).exists()

    await until(written)
    found = json.loads(Path(accepted["output"]).read_text())
    assert len(found["predictions"]) == 2

    def fail(request: Any) -> bytes:
        raise ValueError("the model says no")

    worker.answer = fail
    failed = await accept(other.url, root, Inference_Id="mine")
    assert failed["id"] == "mine"

    async def told() -> bool:
        return Path(failed["failure"]).exists()

    await until(told)
    problem = json.loads(Path(failed["failure"]).read_text())
    assert (problem["reason"], problem["message"]) == ("model_failed", "the model says no")
    assert not Path(failed["output"]).exists()


async def test_a_gateway_without_a_store_refuses(http):
    answer = await http.post("/endpoints/digits/async-invocations")
    assert answer.status_code == 400
    assert "TIDEGATE_ASYNC_URL" in answer.json()["message"]
