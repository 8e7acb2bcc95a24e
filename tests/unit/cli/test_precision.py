"""Choosing a recipe or a GGUF file, and the words for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.cli import gguf_fit
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.precision import Wish, loss_of
from tidegate.quantize.choice import Measured, choose
from tidegate.quantize.study import StudyFailed, python_of

pytestmark = pytest.mark.unit

FP32 = Measured("fp32", ms=10.0, size=100, loss=0.0)


def recipe(
    name: str, ms: float | None, loss: float, *, full: bool = False, problem: str | None = None
) -> Measured:
    return Measured(name, ms=ms, size=30, loss=loss, full_range=full, problem=problem)


def test_the_fastest_within_the_loss_is_chosen_and_each_other_one_has_a_reason():
    found = choose(
        [FP32, recipe("a", 5.0, 0.032), recipe("b", 6.0, 0.002), recipe("c", 8.0, 0.0),
         recipe("d", None, 1.0, problem="RuntimeError: no"), recipe("e", 11.0, 0.0)],
        0.005,
    )  # fmt: skip
    assert found.name == "b"
    assert found.reasons == {
        "fp32": "the original",
        "b": "chosen as the fastest with a loss of at most 0.5 %",
        "a": "its loss of 3.2 % is above 0.5 %",
        "c": "slower than b",
        "d": "failed: RuntimeError: no",
        "e": "not faster than fp32: 11 ms against 10 ms",
    }


def test_int8_is_kept_for_its_size_and_auto_only_for_its_speed():
    slow = [FP32, recipe("a", 11.0, 0.0)]
    assert choose(slow, 0.005, "int8").name == "a"
    assert choose(slow, 0.005, "auto").reasons["fp32"] == "kept, because every recipe was refused"
    assert not choose([FP32, recipe("a", 1.0, 0.01)], 0.005, "int8").quantised
    assert choose([FP32, recipe("a", 1.0, 0.005)], 0.005, "int8").quantised
    assert not choose([FP32, recipe("a", 1.0, float("nan"))], 0.005, "int8").quantised


def test_equally_fast_recipes_are_chosen_by_what_other_cpus_do_with_them():
    pair = [FP32, recipe("full", 5.0, 0.0, full=True), recipe("reduced", 5.1, 0.001)]
    assert choose(pair, 0.005).name == "reduced"
    assert choose(pair, 0.005).reasons["full"] == "not faster than reduced"
    quick = [FP32, recipe("full", 4.0, 0.0, full=True), recipe("reduced", 5.1, 0.001)]
    assert choose(quick, 0.005).name == "full"
    found = choose(quick, 0.005, portable=True)
    assert found.name == "reduced"
    assert "VNNI" in found.reasons["full"]


@pytest.mark.parametrize(("text", "loss"), [("0.5%", 0.005), ("0.005", 0.005), ("1 %", 0.01), ("0", 0.0)])
def test_losses(text: str, loss: float):
    assert loss_of(text) == pytest.approx(loss)


@pytest.mark.parametrize("text", ["5", "-1%", "many", "", "100%", "nan"])
def test_wrong_losses(text: str):
    with pytest.raises(UsageError, match="write a share"):
        loss_of(text)


def test_a_wish_that_cannot_be_met_says_what_to_add(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "m.pt").write_bytes(b"")
    data = tmp_path / "m.onnx"
    with pytest.raises(UsageError, match="--samples"):
        Wish("auto", None, 0.01).check(data)
    with pytest.raises(UsageError, match="choose one of auto, int8"):
        Wish("int4", data, 0.01).check(data)
    with pytest.raises(UsageError, match="only ONNX"):
        Wish("int8", data, 0.01).check(tmp_path / "m.pt")
    with pytest.raises(UsageError, match="does not exist"):
        Wish("int8", tmp_path / "no.npz", 0.01).check(data)


def test_without_the_packages_the_message_names_them(tmp_path: Path):
    with pytest.raises(StudyFailed, match="pip install onnx onnxruntime"):
        python_of(tmp_path, own="/bin/false")


MIB = 2**20


def fitting(sizes: dict[str, int], memory: int) -> tuple[str | None, dict[str, str]]:
    from tidegate.kernel.protocol.gguf import GgufHeader
    from tidegate.quantize.gguf_choice import candidate
    from tidegate.quantize.gguf_choice import choose as fit

    metadata = {
        "general.architecture": "llama", "llama.attention.head_count": 9, "llama.embedding_length": 576,
        "llama.attention.head_count_kv": 3, "llama.block_count": 30, "llama.context_length": 8192,
    }  # fmt: skip
    header = GgufHeader(metadata, 0)
    found = fit([candidate(name, size, header, 4, None) for name, size in sizes.items()], memory)
    return found.chosen.name if found.chosen else None, found.reasons


def test_the_largest_gguf_file_that_fits_is_chosen():
    # The KV cache of 8,192 tokens takes 180 MiB, and the engine 256 MiB.
    sizes = {"q4": 98 * MIB, "q8": 150 * MIB, "f32": 540 * MIB}
    assert fitting(sizes, 600 * MIB)[0] == "q8"
    name, reasons = fitting(sizes, 540 * MIB)
    assert name == "q4"
    assert reasons == {
        "q4": "chosen: the largest that fits",
        "q8": "needs 46 MiB more than is available",
        "f32": "needs 436 MiB more than is available",
    }
    assert fitting(sizes, 2048 * MIB)[1]["q8"] == "smaller than f32, so less exact"
    assert fitting(sizes, 100 * MIB)[0] is None


def test_sizes_of_memory():
    assert gguf_fit.size_of("2GiB") == 2 * 2**30
    assert gguf_fit.size_of("1500 MB") == 1_500_000_000
    assert gguf_fit.size_of("4096") == 4096
    with pytest.raises(UsageError, match="2GiB"):
        gguf_fit.size_of("much")


def test_a_folder_of_gguf_files(tmp_path: Path):
    assert gguf_fit.best_fit(tmp_path, None, None, None, None) is None
    with pytest.raises(UsageError, match="no GGUF file"):
        gguf_fit.best_fit(tmp_path, "auto", "1GiB", None, None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="cannot be read as GGUF"):
        gguf_fit.best_fit(tmp_path, "auto", "1GiB", None, None)
    with pytest.raises(UsageError, match="write auto"):
        gguf_fit.best_fit(tmp_path, "q4", None, None, None)
