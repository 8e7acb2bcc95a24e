"""int8 models: the recipes in the models' environment, and the chosen one in the real Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from services.worker.adapters.precision_check import measured_here
from tests.conftest import Figure
from tests.integration.worker.conftest import Run
from tidegate.cli.precision import Quantised, Wish, quantised
from tidegate.cli.progress import Steps
from tidegate.kernel.precision import embedded
from tidegate.quantize.study import Options, StudyFailed, python_of, studied

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def smaller(models: Path, runtime: Path) -> Iterator[Quantised]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDEGATE_RUNTIME_DIR", str(runtime))
        wish = Wish("int8", models / "heldout.npz", 0.02, seconds=0.2)
        with quantised(models / "model.onnx", wish, Steps()) as found:
            yield found


def test_each_recipe_is_measured_or_has_a_reason(smaller: Quantised, figure: Figure):
    assert smaller.study.labels
    assert smaller.choice.quantised
    assert set(smaller.choice.reasons) == {each.name for each in smaller.study.results}
    chosen, original = smaller.chosen, smaller.original
    assert chosen.size < original.size
    assert chosen.loss <= 0.02
    assert original.accuracy is not None
    assert original.accuracy > 0.9
    figure(f"digits: {chosen.name}, {original.size} to {chosen.size} bytes, loss {chosen.loss:.2%}")


async def test_a_worker_measures_it_on_its_own_cpu(smaller: Quantised, run: Run, models: Path):
    assert smaller.file is not None
    running = await run("onnx", smaller.file, None, "digits8")
    found = embedded.read(smaller.file)
    assert found is not None
    text = await measured_here(running.client, running.model, found)
    assert f"int8 ({smaller.choice.name}); measured here: loss 0.00% on 16 rows" in text
    assert "WARNING" not in text
    elsewhere = replace(found, precision=replace(found.precision, flags=("avx9",), cpu="Another"))
    assert "lacks avx9, which Another had" in await measured_here(running.client, running.model, elsewhere)
    wrong = {name: np.roll(values, 3, axis=0) for name, values in found.outputs.items()}
    assert "WARNING: this is above" in await measured_here(
        running.client, running.model, replace(found, outputs=wrong)
    )


def test_an_interrupt_ends_the_process_and_leaves_no_files(models: Path, runtime: Path):
    seen: list[psutil.Process] = []

    def interrupt(_: str) -> None:
        seen.extend(each for each in psutil.Process().children() if "recipes.py" in " ".join(each.cmdline()))
        raise KeyboardInterrupt

    study = studied(python_of(runtime), models / "model.onnx", models / "heldout.npz", Options(), interrupt)
    with pytest.raises(KeyboardInterrupt), study:
        pass
    assert [process.is_running() for process in seen] == [False]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": np.zeros((8, 64))}, "the model has the inputs image"),
        ({"image": np.zeros((8, 32))}, r"have the shape \[8, 32\]"),
        ({"image": np.zeros((0, 64))}, "have 0 rows"),
        ({"image": np.zeros((8, 64)), "truth": np.zeros(3)}, "3 labels for 8 rows"),
    ],
)
def test_wrong_samples_are_explained(arrays: dict, message: str, models: Path, runtime: Path, tmp_path: Path):
    np.savez(tmp_path / "s.npz", **arrays)
    study = studied(
        python_of(runtime), models / "model.onnx", tmp_path / "s.npz", Options(seconds=0.1), lambda _: None
    )
    with pytest.raises(StudyFailed, match=message), study:
        pass
