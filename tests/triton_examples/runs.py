"""What each of Triton's client examples is called with, besides the address of the stack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# The examples that load and unload models count the models first: they run when so many are deployed.
COUNTED = {
    "simple_http_model_control": 7,
    "simple_http_aio_model_control": 7,
    "simple_grpc_model_control": 8,
    "simple_grpc_aio_model_control": 8,
}
NOT_RUN = {
    "memory_growth_test": "it calls localhost:8000 and localhost:8001 only",
    "simple_grpc_aio_cudashm_client": "it needs CUDA",
    "simple_grpc_cudashm_client": "it needs CUDA",
    "simple_http_aio_cudashm_client": "it needs CUDA",
    "simple_http_cudashm_client": "it needs CUDA",
}
PROMPT = "The words of this prompt come back."


class Run(NamedTuple):
    """One call of an example. ``says``: a text that must be in its output.

    ``{image}``, ``{prompts}`` and ``{results}`` in the arguments are files of ``write_files``.
    """

    arguments: str = ""
    says: str = ""

    def filled(self, files: Mapping[str, Path]) -> list[str]:
        """Return the arguments with the paths of the files."""
        return [each.format_map(files) for each in self.arguments.split()]


def _images(name: str, *variants: str) -> list[Run]:
    """Return the runs of an image client. The image is red, and the model names the strongest color."""
    common = f"{{image}} -m {name}"
    return [Run(f"{common} {each}".strip(), "= red") for each in ("", *variants)]


_SEQUENCES = [Run(), Run("--dyna")]
_IMAGE = "densenet_onnx"
_ENSEMBLE = "preprocess_inception_ensemble"
_COMPRESSED = "--request-compression-algorithm {} --response-compression-algorithm {}"

# An example that is not here runs once, without arguments.
RUNS = {
    "ensemble_image_client": _images(_ENSEMBLE, "-c 3", "-i grpc"),
    "grpc_explicit_int8_content_client": [Run(says="PASS")],
    "grpc_explicit_int_content_client": [Run(says="PASS")],
    "grpc_image_client": _images(_IMAGE, "-a -b 4 -c 3", "--streaming -s INCEPTION"),
    "image_client": _images(_IMAGE, "-a -b 4 -c 3", "-i grpc -s VGG", "-i grpc --streaming", "-i grpc -a"),
    "reuse_infer_objects_client": [Run(), Run("-i grpc")],
    "simple_grpc_aio_infer_client": [Run(), Run("-C gzip")],
    "simple_grpc_aio_sequence_stream_infer_client": _SEQUENCES,
    "simple_grpc_aio_sequence_sync_infer_client": _SEQUENCES,
    "simple_grpc_async_infer_client": [Run(says="PASS")],
    "simple_grpc_infer_client": [Run(), Run("-C gzip"), Run("-C deflate")],
    "simple_grpc_sequence_stream_infer_client": _SEQUENCES,
    "simple_grpc_sequence_sync_infer_client": _SEQUENCES,
    "simple_http_aio_infer_client": [
        Run(), Run(_COMPRESSED.format("gzip", "gzip")), Run(_COMPRESSED.format("deflate", "deflate")),
    ],
    "simple_http_aio_model_control": [Run(says="PASS")],
    "simple_http_aio_sequence_sync_infer_client": _SEQUENCES,
    "simple_http_sequence_sync_infer_client": _SEQUENCES,
    "vllm_client": [Run("-v --model-name vllm --input-prompts {prompts} --results-file {results}", PROMPT)],
}  # fmt: skip


def runs_of(name: str) -> list[Run]:
    """Return the calls of the example ``name``."""
    return RUNS.get(name, [Run()])


def write_files(folder: Path) -> dict[str, Path]:
    """Write the files that the arguments name, into ``folder``."""
    files = {
        "image": folder / "red.ppm",
        "prompts": folder / "prompts.txt",
        "results": folder / "results.txt",
    }
    files["image"].write_bytes(b"P6 32 24 255\n" + b"\xf0\x10\x20" * (32 * 24))
    files["prompts"].write_text(PROMPT)
    return files
