"""A package that a model's Python lacks."""

import pytest

from services.worker.domain.missing_package import with_remedy

pytestmark = pytest.mark.unit

TRITON = (
    "load failed for model 'm': ModuleNotFoundError: No module named '{}'\n\nAt:\n  model.py(1): <module>"
)


@pytest.mark.parametrize(
    ("module", "package"), [("xgboost", "xgboost"), ("cv2.dnn", "opencv-python-headless"), ("PIL", "pillow")]
)
def test_a_missing_package_names_the_option(module, package):
    told = with_remedy(TRITON.format(module))
    assert told.startswith(f"No module named '{module}'")
    assert f"a line `{package}`" in told
    assert "tidegate deploy ... --requirements requirements.txt" in told


def test_any_other_failure_stays_as_it_is():
    assert with_remedy("load failed: out of memory") == "load failed: out of memory"
