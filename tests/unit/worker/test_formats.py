"""The choice of a backend for each format."""

import pytest

from services.worker.domain.formats import Serving, backend_by_files, choose, stand_in
from services.worker.domain.phases import Phases
from tidegate.kernel.errors import ModelFailed

pytestmark = pytest.mark.unit

WHEEL = frozenset({"python"})
NATIVE = frozenset({"python", "onnxruntime", "pytorch"})


def everything(_: str) -> bool:
    return True


def nothing(_: str) -> bool:
    return False


def test_native_backends_are_preferred() -> None:
    assert choose("onnx", NATIVE, nothing) == Serving("onnxruntime", "model.onnx")
    assert choose("torchscript", NATIVE, nothing) == Serving("pytorch", "model.pt")


def test_python_runtimes_serve_the_rest() -> None:
    assert choose("onnx", WHEEL, everything) == Serving("python", "model.onnx", "onnx")
    assert choose("sklearn", NATIVE, everything) == Serving("python", "model.joblib", "sklearn")
    assert choose("torchscript", WHEEL, everything) == Serving("python", "model.pt", "torchscript")
    assert choose("python", WHEEL, nothing) == Serving("python", "model.py")
    assert choose("pt2", NATIVE, everything) == Serving("python", "model.pt2", "torchscript")
    assert choose("mlflow", WHEEL, nothing) == choose("huggingface", WHEEL, nothing)


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(ModelFailed, match=r"'torch'.* `make torch`.*--requirements"):
        choose("torchscript", WHEEL, nothing)
    with pytest.raises(ModelFailed, match=r"'scikit-learn'.*--requirements"):
        choose("sklearn", WHEEL, nothing)


def test_our_runtimes_stand_in_for_a_backend_that_is_not_there() -> None:
    assert stand_in("onnxruntime", WHEEL, everything) == Serving("python", "model.onnx", "onnx")
    assert stand_in("pytorch", WHEEL, everything) == Serving("python", "model.pt", "torchscript")
    assert stand_in("onnxruntime", NATIVE, nothing) is None
    assert stand_in("python", WHEEL, nothing) is None
    assert stand_in("tensorrt", WHEEL, nothing) is None
    assert stand_in(None, WHEEL, nothing) is None
    with pytest.raises(ModelFailed, match="make torch"):
        stand_in("pytorch", WHEEL, nothing)


def test_the_backend_by_a_version_folders_files() -> None:
    assert backend_by_files({"model.onnx", "vocabulary.txt"}) == "onnxruntime"
    assert backend_by_files({"model.onnx", "model.py"}) == "python"
    assert backend_by_files({"model.plan"}) is None


def test_no_python_backend() -> None:
    with pytest.raises(ModelFailed, match="needs Triton's Python backend"):
        choose("python", frozenset({"onnxruntime"}), everything)


def test_phases_by_a_given_clock() -> None:
    ticks = iter([1.0, 1.25, 2.0, 2.5])
    phases = Phases(lambda: next(ticks))
    with phases.measure("load"):
        pass
    with pytest.raises(ValueError), phases.measure("warm_up"):
        raise ValueError
    phases.record("launch", -0.1)
    assert phases.ms == {"load": 250.0, "warm_up": 500.0, "launch": 0.0}


def test_a_phase_under_way_runs_on() -> None:
    ticks = iter([1.0, 2.0, 3.0])
    phases = Phases(lambda: next(ticks))
    with phases.measure("environment"):
        assert phases.ms == {"environment": 1000.0}
    assert phases.ms == {"environment": 2000.0}
