"""Signatures from the source of a model: what annotations say, and what is refused. Nothing is executed."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.backend_class import is_for_the_backend
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.python_model import parsed, read
from tidegate.kernel.protocol.python_signature import calling_plan, signature_of

pytestmark = pytest.mark.unit


def found(source: str, given: Signature | None = None) -> Signature:
    return signature_of(read(parsed(dedent(source))), given)


def shown(tensors: list[TensorSpec]) -> list[tuple[Any, ...]]:
    return [(t.name, t.datatype, t.shape, t.optional) for t in tensors]


def test_nothing_of_the_file_is_executed():
    signature = found(
        """
        import does_not_exist
        raise SystemExit("this file was executed")
        def predict(x: Tensor["FP32", -1, 4]) -> Tensor["FP32", -1]: ...
        """
    )
    assert shown(signature.inputs) == [("x", "FP32", [-1, 4], False)]
    assert shown(signature.outputs) == [("output", "FP32", [-1], False)]
    assert (signature.max_batch_size, signature.decoupled) == (0, False)


@pytest.mark.parametrize(
    ("annotation", "datatype", "shape"),
    [
        ('Tensor["FP32", -1, 4]', "FP32", [-1, 4]),
        ("tidegate.Tensor[np.float32, 3]", "FP32", [3]),
        ("'Tensor[\"FP16\", 3]'", "FP16", [3]),
        ("Tensor[str, -1]", "BYTES", [-1]),
        ("Tensor['FP32', -1, FEATURES]", "FP32", [-1, 7]),
        ("Features", "FP64", [-1, 7]),
        ('Annotated[np.ndarray, "a note", Tensor("INT64", 2)]', "INT64", [2]),
        ("np.ndarray[tuple[int, Literal[4]], np.dtype[np.float32]]", "FP32", [-1, 4]),
        ("float", "FP64", [1]),
        ("int", "INT64", [1]),
        ("bool", "BOOL", [1]),
        ("str", "BYTES", [1]),
        ("bytes", "BYTES", [1]),
        ("list[str]", "BYTES", [-1]),
        ("list[list[float]]", "FP64", [-1, -1]),
        ("Optional[str]", "BYTES", [1]),
        ('Tensor["FP32", 4] | None', "FP32", [4]),
    ],
)
def test_annotations_of_an_input(annotation, datatype, shape):
    source = f"""
        FEATURES: int = 7
        Features = Tensor[np.float64, -1, FEATURES]
        def predict(x: {annotation}) -> float: ...
        """
    assert shown(found(source).inputs) == [("x", datatype, shape, False)]


@pytest.mark.parametrize(
    ("annotation", "outputs"),
    [
        ("Answer", [("label", "BYTES", [1]), ("score", "FP32", [-1, 2])]),
        ('{"label": str, "n": Tensor["INT8", -1, 2]}', [("label", "BYTES", [1]), ("n", "INT8", [-1, 2])]),
        ("Typed", [("label", "BYTES", [1])]),
        ('tuple[str, Tensor["INT8", 2]]', [("output_0", "BYTES", [1]), ("output_1", "INT8", [2])]),
        ("list[int]", [("output", "INT64", [-1])]),
    ],
)  # fmt: skip
def test_annotations_of_outputs(annotation, outputs):
    source = f"""
        class Answer(NamedTuple):
            label: str
            score: Tensor["FP32", -1, 2]
        Typed = TypedDict("Typed", {{"label": str}})
        def predict(x: float) -> {annotation}: ...
        """
    assert [entry[:3] for entry in shown(found(source).outputs)] == outputs


def test_a_class_with_load_and_arguments_that_may_be_left_out():
    source = """
        class Helper:
            def other(self): ...
        class Mine:
            def load(self, device, *, folder): ...
            async def predict(self, text: str, n: int = 3, *, bias: float | None = None) -> str: ...
        """
    tree = parsed(dedent(source))
    assert not is_for_the_backend(tree)
    told = read(tree)
    assert (told.entry, told.load, told.asynchronous) == ("Mine", ["device", "folder"], True)
    signature = signature_of(told, None)
    assert [(t.name, t.optional) for t in signature.inputs] == [("text", False), ("n", True), ("bias", True)]
    plan = calling_plan(told, signature)
    assert plan["inputs"]["text"] == {"kind": "scalar", "text": True}


@pytest.mark.parametrize(("decorator", "size"), [("@tidegate.batched", 32), ("@batched(max_size=N)", 5)])
def test_batched_takes_the_rows_off_the_shapes(decorator, size):
    source = f"""
        N = 5
        {decorator}
        def predict(x: Tensor["FP32", -1, 4], words: list[str]) -> Tensor["INT64", -1]: ...
        """
    signature = found(source)
    assert signature.max_batch_size == size
    assert shown(signature.inputs) == [("x", "FP32", [4], False), ("words", "BYTES", [], False)]
    assert shown(signature.outputs) == [("output", "INT64", [], False)]
    plan = calling_plan(read(parsed(dedent(source))), signature)
    assert plan["outputs"] == [{"name": "output", "datatype": "INT64", "dims": [-1]}]


@pytest.mark.parametrize(
    "returned", ["Iterator[str]", "Generator[str, None, None]", "AsyncIterator[str]", "str"]
)
def test_yield_is_a_stream(returned):
    signature = found(
        f"""
        def predict(text: str) -> {returned}:
            for word in text.split():
                yield word
        """
    )
    assert signature.decoupled
    assert shown(signature.outputs) == [("output", "BYTES", [1], False)]
    inner = """
        def predict(x: float) -> float:
            def steps():
                yield 1
            return sum(steps())
        """
    assert not found(inner).decoupled


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1", "a function `predict`, a class with a method"),
        ("def predict(: ...", "not valid Python"),
        ("def predict(x: np.ndarray) -> float: ...", "`x` is annotated 'np.ndarray', which says neither"),
        ("def predict(x: NDArray[np.float32]) -> float: ...", "says a datatype but not a shape"),
        ("def predict(x) -> float: ...", "`x` has no annotation"),
        ("def predict(x: float): ...", "the value that predict returns has no annotation"),
        ("def predict(**x) -> float: ...", "does not name the inputs"),
        ("def predict(x: 'A') -> float: ...\nA = 'B'\nB = 'A'", "refers to itself"),
        ("def predict(x: Tensor['FP31', 4]) -> float: ...", "does not begin with a datatype"),
        ("def predict(x: Tensor['FP32', n()]) -> float: ...", "has no shape"),
        ("def predict(x: Tensor['FP32']) -> float: ...", "has no shape"),
        ("def predict(x: float, /) -> float: ...", "by name"),
        ("def predict() -> float: ...", "predict takes no arguments"),
        ("@batched\ndef predict(x: float) -> list[float]: ...", "one value for each row"),
        ("@batched\ndef predict(x: Tensor['FP32', 4]) -> list[float]: ...", r"write Tensor\['FP32', -1, 4\]"),
        ("@batched(max_size=n())\ndef predict(x: list[float]) -> list[float]: ...", "not a number that"),
        ("@batched\ndef predict(x: list[float]) -> list[float]:\n    yield x", "Remove @batched or `yield`"),
        ("class A:\n def predict(self): ...\nclass B:\n def predict(self): ...", "to the class to serve"),
        ("class A:\n def __init__(self, path): ...\n def predict(self, x: float): ...", "init__ needs path"),
        ("class A:\n def load(self, path): ...\n def predict(self, x: float): ...", "A.load needs path"),
    ],
)  # fmt: skip
def test_what_is_refused(source, told):
    with pytest.raises(BadRequest, match=told):
        found(source)


def test_what_is_unclear_names_both_ways_out():
    with pytest.raises(BadRequest) as refused:
        found("def predict(image: np.ndarray): ...")
    text = refused.value.message
    assert 'def predict(image: Tensor["FP32", -1, 4])' in text
    assert "--signature" in text


def given(*inputs: str, rows: int = 0) -> Signature:
    tensors = [TensorSpec(name=name, datatype="FP32", shape=[-1]) for name in inputs]
    return Signature(inputs=tensors, outputs=[TensorSpec(name="y", datatype="FP32")], max_batch_size=rows)


def test_a_signature_that_is_given_stands_in_place_of_annotations():
    signature = given("x")
    assert found("def predict(x: np.ndarray, y=None): ...", signature) == signature
    assert found("def predict(**inputs): ...", signature) == signature
    assert found("@batched(max_size=4)\ndef predict(x): ...", given("x", rows=4)).max_batch_size == 4


@pytest.mark.parametrize(
    ("source", "signature", "told"),
    [
        ("def predict(a): ...", given("x"), "'x' is not among them"),
        ("def predict(x, z): ...", given("x"), "predict takes 'z', and the signature has no such input"),
        ("def predict(x): ...", given("x", rows=8), r"write @batched\(max_size=8\)"),
        ("@batched\ndef predict(x): ...", given("x"), "use the same number in both"),
    ],
)
def test_a_signature_that_does_not_fit_the_function(source, signature, told):
    with pytest.raises(BadRequest, match=told):
        found(source, signature)


@pytest.mark.parametrize(
    "annotation",
    [
        pytest.param("a" + ".b" * 700, id="attributes"),
        pytest.param("+".join(["a"] * 700), id="sum"),
        pytest.param('Tensor["FP32", ' + "-" * 700 + "1]", id="minus"),
        pytest.param("0x" + "f" * 6000, id="integer"),
        pytest.param('Tensor["FP32", 0x' + "f" * 6000 + "]", id="size"),
        pytest.param('Tensor["FP32", ' + "1, " * 17 + "]", id="axes"),
        pytest.param("x" * 100_000, id="name"),
    ],
)
def test_an_annotation_that_cannot_be_written_is_refused_in_few_words(annotation):
    with pytest.raises(BadRequest) as refused:
        found(f"def predict(x: {annotation}) -> float: ...")
    assert len(refused.value.message) < 1000


def test_a_max_size_that_cannot_be_written_is_refused():
    with pytest.raises(BadRequest, match="is not a number that can be read"):
        found(f"@batched(max_size=0x{'f' * 6000})\ndef predict(x: list[float]) -> list[float]: ...")
