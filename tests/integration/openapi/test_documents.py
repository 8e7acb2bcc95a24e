"""Each service holds to its OpenAPI document, whatever is sent: real processes on the real servers.

Schemathesis makes requests of the documents, those that fit and those that do not. What comes back must be
declared: its status, its content type, its body; and no answer may be an unforeseen error of the service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests.integration.openapi.conftest import TOKEN

pytestmark = [pytest.mark.integration, pytest.mark.fuzz]

EXAMPLES = 8 * int(os.environ.get("TIDEGATE_FUZZ_EXAMPLES", "1"))
DECLARED: list[CheckFunction] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@dataclass
class Problem:
    """What is wrong with an operation."""

    operation: str
    text: str


def problems(url: str) -> Iterator[Problem]:
    """Try every operation of the service at ``url``; what was found."""
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {TOKEN}"
    document = session.get(f"{url}/openapi.json", timeout=120).json()
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        cases = one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

        @settings(
            max_examples=EXAMPLES,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def tried(case: Any) -> None:
            attempt(case, url, session)

        try:
            tried()
        except (Exception, FailureGroup) as error:
            yield Problem(operation.label, f"{error}")


def attempt(case: Any, url: str, session: requests.Session) -> None:
    """One call, which must be answered as the document says."""
    answer = case.call(base_url=url, session=session, timeout=120)
    body = answer.text
    assert '"reason":"internal"' not in body, f"{answer.status_code} {body[:300]}"
    case.validate_response(answer, checks=DECLARED)


@pytest.mark.parametrize("service", ["registry", "router", "autoscaler", "gateway"])
def test_a_service_holds_to_its_document(services: dict[str, str], service: str) -> None:
    found = list(problems(services[service]))
    assert not found, "\n\n".join(f"{each.operation}\n{each.text}" for each in found)
