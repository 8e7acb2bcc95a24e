"""Triton's message about a failed load, as people get it."""

import pytest

from services.worker.domain.load_failures import explained

pytestmark = pytest.mark.unit

STATE = "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: "
FOLDER = "/var/lib/tidegate/replicas/m-v1-0/triton/models/m/1/"
STACK = f"""

At:
  <frozen importlib._bootstrap>(241): _call_with_frames_removed
  {FOLDER}model.py(5): go
  {FOLDER}model.py(3): load
  {FOLDER}tidegate_runtime.py(44): initialize
"""


@pytest.mark.parametrize(
    ("module", "package"), [("xgboost", "xgboost"), ("cv2.dnn", "opencv-python-headless"), ("PIL", "pillow")]
)
def test_a_missing_package_names_the_option(module, package):
    told = explained(f"{STATE}ModuleNotFoundError: No module named '{module}'{STACK};")
    assert told.startswith(f"No module named '{module}'")
    assert f"a line `{package}`" in told
    assert "tidegate deploy ... --requirements requirements.txt" in told
    assert told.endswith(f"No module named '{module}' (at model.py line 5, in go);")


def test_the_stack_is_one_line_and_paths_are_those_of_the_model():
    told = explained(f"{STATE}FileNotFoundError: {FOLDER}weights.bin{STACK};\n\nE1129 more")
    assert told == f"{STATE}FileNotFoundError: weights.bin (at model.py line 5, in go);\n\nE1129 more"
    inside = STACK.replace(
        "  <frozen", "  /env/lib/python3/site-packages/joblib/numpy.py(7): load\n  <frozen"
    )
    assert explained(f"{STATE}EOFError: no data{inside};").endswith("(at joblib/numpy.py line 7, in load);")


def test_any_other_failure_stays_as_it_is():
    assert explained("load failed: out of memory") == "load failed: out of memory"
