"""The message for users about a failed load."""

import pytest

from services.worker.domain.load_failures import explain, explain_death

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
    ("module", "package"),
    [("xgboost", "xgboost-cpu"), ("cv2.dnn", "opencv-python-headless"), ("PIL", "pillow")],
)
def test_a_missing_package_names_the_option(module, package):
    told = explain(f"{STATE}ModuleNotFoundError: No module named '{module}'{STACK};")
    assert told.startswith(f"No module named '{module}'")
    assert f"the line `{package}`" in told
    assert "tidegate deploy ... --requirements requirements.txt" in told
    assert told.endswith(f"No module named '{module}' (at model.py line 5, in go);")


def test_the_stack_is_one_line_and_paths_are_those_of_the_model():
    told = explain(f"{STATE}FileNotFoundError: {FOLDER}weights.bin{STACK};\n\nE1129 more")
    assert told == f"{STATE}FileNotFoundError: weights.bin (at model.py line 5, in go);\n\nE1129 more"
    inside = STACK.replace(
        "  <frozen", "  /env/lib/python3/site-packages/joblib/numpy.py(7): load\n  <frozen"
    )
    assert explain(f"{STATE}EOFError: no data{inside};").endswith("(at joblib/numpy.py line 7, in load);")


def test_any_other_failure_stays_as_it_is():
    assert explain("load failed: out of memory") == "load failed: out of memory"


TRITONS = """W1129 11:24:49.308713 22272 pinned_memory_manager.cc:273] "Unable to allocate"
Error: Failed to initialize NVML
[[1;33mWARN[0;39m]\x1b[0m [33mevhtp.c:4050 [39m[94mNODELAY NOT SUPPORTED[39m :: (errno)
E1129 11:24:51.341910 22272 backend_model.cc:692] "ERROR: Stub process 'm_0_0' is not healthy."
"""


def test_a_process_that_ended_while_it_loaded_is_told_without_tritons_own_lines():
    told = explain_death("m-v1", TRITONS)
    assert told.startswith("The model's process ended while it loaded: it was killed (out of memory?)")
    assert told.endswith("Its log: tidegate logs m-v1")
    assert "\n" not in told
    told = explain_death("m-v1", f"{TRITONS}\x1b[31mFatal Python error: Segmentation fault\n\x1b]0;title\x07")
    assert told.endswith("crashed. The end of its log:\nFatal Python error: Segmentation fault")


def test_the_log_of_a_process_that_ended_is_bounded():
    assert len(explain_death("m-v1", "x" * 100_000)) < 2300
