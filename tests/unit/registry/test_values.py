"""Names, formats, partial specs, archive limits and layouts: values in, values out."""

from __future__ import annotations

import re
from pathlib import PurePosixPath as P

import pytest
from pydantic import ValidationError

from services.registry.adapters.sql.reading import finite
from services.registry.domain import formats, merge, names, triton_layout
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.archives import ArchiveChecker, ArchiveLimits, Member, Unsafe
from tidegate.kernel.protocol.models import DeploymentSpec, TensorSpec, VersionMetadata
from tidegate.kernel.protocol.names import fitting as nearest


@pytest.mark.parametrize(
    "name",
    ["a", "digits", "a-b-3", "0", "a" * 63, "A", "a_b", "a.b", "simple_identity", "densenet_onnx.v2", "x_"],
)
def test_good_names(name):
    assert names.check("model", name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", ".", "..", ".a", "_a", "a.", "a\n", "a" * 64, "a/b", "a b", "ä", "a~b"]
)
def test_bad_names(name):
    with pytest.raises(
        BadRequest, match=r"not a valid name of a model: use 1 to 63 letters .*'_', '-' and '\.'"
    ):
        names.check("model", name)


def test_a_name_that_is_a_route_is_refused():
    with pytest.raises(BadRequest, match="GET /v2/models/stats is another route"):
        names.check("model", "stats")


def test_names_that_differ_only_by_case_are_refused():
    assert names.check_new("model", "Digits", ["Digits", "other"]) == "Digits"
    with pytest.raises(Conflict, match="'Digits' differs from it only by case"):
        names.check_new("model", "Digits", ["digits"])


@pytest.mark.parametrize(
    ("text", "name"),
    [("My_Model.v2", "My_Model.v2"), ("a b", "a-b"), ("..", ""), ("__a", "a"), ("a.", "a"), ("é", "")],
)
def test_the_nearest_valid_name(text, name):
    assert nearest(text) == name


@pytest.mark.parametrize(
    ("filename", "found"),
    [
        ("m.onnx", "onnx"), ("M.ONNX", "onnx"), ("m.joblib", "sklearn"), ("m.pkl", "sklearn"),
        ("m.pt", "torchscript"), ("model.py", "python"), ("m.tar.gz", "triton"), ("m.zip", "triton"),
    ],
)  # fmt: skip
def test_format_by_name(filename, found):
    assert formats.format_by_name(filename) == found


def test_an_unknown_ending_is_no_hint():
    assert formats.format_by_name("weights.bin") is None


def test_pickle_needs_consent():
    with pytest.raises(BadRequest, match="allow_pickle=true"):
        formats.check_pickle_allowed("sklearn", allow_pickle=False)
    formats.check_pickle_allowed("sklearn", allow_pickle=True)
    formats.check_pickle_allowed("onnx", allow_pickle=False)


@pytest.mark.parametrize("filename", ["", "..", "a/b.onnx", "a\\b.onnx", "a\0", "x" * 256])
def test_filename_is_plain(filename):
    with pytest.raises(BadRequest, match="plain file name"):
        formats.check_filename(filename)


def test_merge_patch():
    base = {"a": 1, "b": {"c": 1, "d": 2}, "e": 5}
    patch = {"b": {"c": 9, "d": None}, "e": None, "f": {"g": None}}
    assert merge.patched(base, patch) == {"a": 1, "b": {"c": 9}, "f": {}}


@pytest.mark.parametrize(
    ("patch", "scale"),
    [
        ({"min_replicas": 3}, (3, 3)),
        ({"max_replicas": 1}, (1, 1)),
        ({"max_replicas": 9}, (2, 9)),
        ({"min_replicas": 0}, (0, 2)),
    ],
)
def test_a_deploy_moves_the_other_bound_of_an_exact_number(patch, scale):
    base = {"name": "d", "model": "m", "version": 1, "min_replicas": 2, "max_replicas": 2}
    spec = merge.deployment(base, patch, "d", exact_follows=True)
    assert (spec.min_replicas, spec.max_replicas) == scale


@pytest.mark.parametrize(("patch", "scale"), [({"min_replicas": 3}, (3, 3)), ({"max_replicas": 9}, (1, 9))])
def test_a_default_bound_follows_the_other(patch, scale):
    spec = merge.deployment({"name": "d", "model": "m", "version": 1}, patch, "d")
    assert (spec.min_replicas, spec.max_replicas) == scale


@pytest.mark.parametrize("exact_follows", [False, True])
@pytest.mark.parametrize("patch", [{"min_replicas": 5}, {"max_replicas": 1}])
def test_a_bound_that_is_stated_stays(patch, exact_follows):
    base = {"name": "d", "model": "m", "version": 1, "min_replicas": 2, "max_replicas": 4}
    with pytest.raises(BadRequest, match="Set both in one command: `tidegate policy NAME --set min_repl"):
        merge.deployment(base, patch, "d", exact_follows=exact_follows)
    both = merge.deployment(base, {"min_replicas": 5, "max_replicas": 5}, "d", exact_follows=exact_follows)
    assert (both.min_replicas, both.max_replicas) == (5, 5)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:/x", "a\0b", "a/" * 40 + "b"]
)
def test_paths_that_leave_the_archive(name):
    with pytest.raises(Unsafe, match="below its root"):
        _admit(ArchiveLimits(), [Member(name, 1, "file")])


def test_archive_limits():
    limits = ArchiveLimits(members=3, unpacked_bytes=2**30, ratio=10)
    with pytest.raises(Unsafe, match="more than 3 entries"):
        _admit(limits, [Member(str(i), 1, "file") for i in range(4)])
    with pytest.raises(Unsafe, match="more than 1073741824 bytes"):
        _admit(limits, [Member("a", 2**30 + 1, "file")], packed=2**30)
    with pytest.raises(Unsafe, match="times its size"):
        _admit(limits, [Member("a", 2**29, "file")], packed=1000)
    with pytest.raises(Unsafe, match="is a link"):
        _admit(limits, [Member("a", 0, "link")])
    with pytest.raises(Unsafe, match="twice"):
        _admit(limits, [Member("a/b", 1, "file"), Member("./a/b", 1, "file")])
    with pytest.raises(Unsafe, match="-1 bytes"):
        _admit(limits, [Member("a", -1, "file")])
    _admit(limits, [Member("a", 2**20, "file"), Member("d/", 0, "folder")])


def _admit(limits: ArchiveLimits, members: list[Member], packed: int = 1000) -> None:
    checker = ArchiveChecker(limits, packed)
    for member in members:
        checker.admit(member)


@pytest.mark.parametrize(
    ("files", "ensembles", "served"),
    [
        (["config.pbtxt", "1/model.onnx"], [], "."),
        (["1/model.py"], [], "."),
        (["digits/config.pbtxt", "digits/1/model.onnx"], [], "digits"),
        (["repo/ens/config.pbtxt", "repo/a/config.pbtxt", "repo/a/1/model.py"], ["repo/ens"], "repo/ens"),
        (["m/1/model.py", "other/1/model.py"], [], "m"),
        (["m/1/model.py", "ens/config.pbtxt"], ["ens"], "m"),
        (["a/1/model.py", "__MACOSX/a/1/._model.py", ".git/1/x"], [], "a"),
        (["a/config.pbtxt", "a/1/lib/config.pbtxt"], [], "a"),
    ],
)
def test_served_model(files, ensembles, served):
    found = triton_layout.models(map(P, files))
    assert triton_layout.served(found, "m", {P(each): True for each in ensembles}) == P(served)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["readme.md"], "not a Triton model directory"),
        (["a/1/model.py", "b/1/model.py"], "not clear which one"),
    ],
)
def test_no_served_model(files, match):
    with pytest.raises(BadRequest, match=match):
        triton_layout.served(triton_layout.models(map(P, files)), "m", {})


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"resources": {"memory_mb": "1" + "0" * 400}}, "resources.memory_mb"),
        ({"resources": {"gpu_memory_mb": 2**63}}, "resources.gpu_memory_mb"),
        ({"resources": {"memory_mb": -1}}, "resources.memory_mb"),
        ({"resources": {"cpus": "nan"}}, "resources.cpus"),
        ({"drain_limit_s": "inf"}, "drain_limit_s"),
        ({"target_wait_ms": float("inf")}, "target_wait_ms"),
        ({"scaling": {"price_per_hour": "inf"}}, "scaling.price_per_hour"),
        ({"max_queue": "9" * 400}, "max_queue"),
    ],
)
def test_numbers_that_json_cannot_express_are_refused(fields, where):
    with pytest.raises(BadRequest, match=re.escape(where)):
        merge.checked(DeploymentSpec, {"name": "a", "model": "a", "version": 1, **fields}, "Deployment a")


def test_accepted_numbers_are_valid_json():
    with pytest.raises(ValidationError, match="finite number"):
        VersionMetadata.model_validate_json('{"metrics": {"loss": "nan"}}')
    with pytest.raises(ValidationError, match="9223372036854775807"):
        TensorSpec(name="x", datatype="FP32", shape=[2**63])


def test_such_numbers_of_an_older_release_are_left_out():
    row = {"metadata": {"metrics": {"loss": float("nan"), "auc": 0.5}}, "drain_limit_s": float("inf"), "n": 1}
    assert finite(row) == {"metadata": {"metrics": {"auc": 0.5}}, "n": 1}
