from __future__ import annotations

import pytest

from services.registry.domain import removal
from tidegate.kernel.errors import Conflict, NotFound


def test_version_in_use_is_kept(book):
    book.deploy(version=1)
    with pytest.raises(Conflict, match="in use by Deployment 'digits-v1'"):
        removal.delete_version(book.now, "digits", 1)
    assert removal.delete_version(book.now, "digits", 2)
    with pytest.raises(NotFound):
        removal.delete_version(book.now, "digits", 7)


def test_model_in_use_is_kept_unless_cascading(book):
    book.deploy(version=1)
    book.deploy(version=2)
    with pytest.raises(Conflict, match="cascade=true"):
        removal.delete_model(book.now, "digits", cascade=False)
    book.carry_out(removal.delete_model(book.now, "digits", cascade=True))
    assert book.now.deployments == {}
    assert book.now.endpoints == {}
    assert book.now.numbers("digits") == []
    assert book.now.numbers("mnist") == [1]


def test_shared_endpoint_keeps_the_other_models_targets(book):
    book.deploy(version=1)
    book.deploy("mnist")
    book.put_endpoint("both", targets=[{"deployment": "digits-v1"}, {"deployment": "mnist-v1"}])
    book.carry_out(removal.delete_model(book.now, "digits", cascade=True))
    assert set(book.now.endpoints) == {"both", "mnist"}
    assert book.targets("both") == (["mnist-v1"], [])


def test_an_endpoint_loses_the_failover_that_is_deleted(book):
    book.deploy("mnist")
    book.put_deployment("spare", model="digits", version=1)
    book.put_deployment("other", model="mnist", version=1)
    book.put_endpoint("mnist", targets=[{"deployment": "mnist-v1"}], failover=["spare", "other"])
    book.carry_out(removal.delete_model(book.now, "digits", cascade=True))
    assert book.now.endpoint("mnist").spec.failover == ["other"]
    assert book.targets("mnist") == (["mnist-v1"], [])


def test_endpoint_in_roll_over_goes_back_to_what_is_left(book):
    book.deploy("mnist", endpoint="shared")
    book.deploy("digits", 1, endpoint="shared")
    assert book.targets("shared") == (["digits-v1"], ["mnist-v1"])
    book.carry_out(removal.delete_model(book.now, "digits", cascade=True))
    assert book.targets("shared") == (["mnist-v1"], [])
