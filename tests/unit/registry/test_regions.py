"""Data residency: an Endpoint's targets stay in its regions. And the GPUs of a divided model."""

from __future__ import annotations

from typing import Any

import pytest

from services.registry.domain import edits, merge, regions
from tidegate.kernel.errors import BadRequest, Conflict

UPSTREAM = {"engine": "openai-url", "upstream": "https://models.example/v1"}


def put_upstream(book: Any, name: str, **llm: Any) -> None:
    book.put_deployment(name, model="digits", version=2, llm={**UPSTREAM, **llm})


def put_endpoint(book: Any, target: str, **fields: Any) -> None:
    changes = edits.put_endpoint(book.now, "chat", {"targets": [{"deployment": target}], **fields})
    regions.check(book.now.after(changes), changes)
    book.carry_out(changes)


@pytest.mark.parametrize(
    ("llm", "rules", "fits"),
    [
        ({"region": "eu"}, {"allowed_regions": ["EU"]}, True),
        ({"region": "us"}, {"allowed_regions": ["eu"]}, False),
        ({"region": "us"}, {"forbidden_regions": ["us"]}, False),
        ({"region": "ch"}, {"forbidden_regions": ["us"]}, True),
        ({}, {"forbidden_regions": ["us"]}, False),  # an upstream without a region may be anywhere
        ({}, {}, True),
    ],
)
def test_an_endpoint_has_targets_in_its_regions_only(
    book: Any, llm: dict[str, Any], rules: dict[str, Any], fits: bool
):
    put_upstream(book, "far", **llm)
    if fits:
        put_endpoint(book, "far", **rules)
        return
    with pytest.raises(Conflict, match="Endpoint 'chat'"):
        put_endpoint(book, "far", **rules)


def test_a_shadow_is_in_its_regions_too(book: Any):
    book.deploy(version=1)
    put_upstream(book, "far", region="us")
    with pytest.raises(Conflict, match="Deployment 'far' processes requests in the region 'us'"):
        put_endpoint(book, "digits-v1", allowed_regions=["eu"], shadow={"deployment": "far"})


def test_own_models_are_in_every_region(book: Any):
    book.deploy(version=1)
    put_endpoint(book, "digits-v1", allowed_regions=["eu"])


def test_a_deployment_in_use_cannot_move_to_a_forbidden_region(book: Any):
    put_upstream(book, "far", region="eu")
    put_endpoint(book, "far", allowed_regions=["eu"])
    changes = edits.patch_deployment(book.now, "far", {"llm": {"region": "us"}})
    with pytest.raises(Conflict, match="region 'us'"):
        regions.check(book.now.after(changes), changes)


def llm_deployment(llm: dict[str, Any], **fields: Any) -> Any:
    return merge.deployment(
        {}, {"name": "m", "model": "m", "version": 1, "llm": llm, **fields}, "Deployment 'm'"
    )


def test_the_gpus_of_a_replica_are_those_that_the_model_is_divided_among():
    divided = {"arguments": {"tensor-parallel-size": 2, "pipeline_parallel_size": 2}}
    assert llm_deployment(divided, resources={"gpus": 4}).llm.parallel == 4
    assert llm_deployment(divided).llm.parallel == 4, "on CPUs"
    for resources in ({"gpus": 2}, {"gpu_memory_mb": 1000}):
        with pytest.raises(BadRequest, match=r"set resources\.gpus to 4"):
            llm_deployment(divided, resources=resources)


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"engine": "openai-url"}, "needs `upstream`"),
        ({"credential": "env:OPENAI_API_KEY"}, "only for the engine openai-url"),
        ({**UPSTREAM, "credential": "sk-secret"}, "credential"),
        ({**UPSTREAM, "credential_header": "api-key: sk-secret"}, "credential_header"),
        ({**UPSTREAM, "upstream": "https://user:secret@models.example"}, "contains a password"),
    ],
)
def test_the_options_of_an_upstream_are_checked(llm: dict[str, Any], message: str):
    with pytest.raises(BadRequest, match=message) as refused:
        llm_deployment(llm)
    assert "secret" not in refused.value.message
