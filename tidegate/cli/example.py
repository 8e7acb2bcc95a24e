"""The example of ``tidegate up --example``: train a model, deploy it, and classify one held-out image."""

from __future__ import annotations

import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tidegate
from tidegate.cli import output
from tidegate.cli.api import Control, Doc, part, settings, token_of
from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.progress import Steps
from tidegate.cli.publish import publish, read_json, wait_serving
from tidegate.kernel.errors import NotFound, TidegateError

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings

NAME = "digits"
WAIT_S = 180.0
TOLERANCE = 1e-5
SHADES = " .:-=+*#%@"


class ExampleFailed(TidegateError):
    """An error of the example.

    A needed file does not exist, the training failed, or the answer differs from that of onnxruntime without
    Tidegate.
    """

    reason = "example"


@dataclass(frozen=True, slots=True)
class Answered:
    """A random held-out image, the model's answer, and the duration of the call."""

    number: int
    image: list[float]
    truth: int
    label: int
    probabilities: list[float]
    took_ms: float
    timing: dict[str, float]
    gateway_url: str

    def document(self) -> Doc:
        """Return the document for ``--json``."""
        return {name: getattr(self, name) for name in self.__slots__}

    def show(self) -> None:
        """Print the image, the answer, and the command that repeats the call."""
        for row in range(8):
            pixels = self.image[row * 8 : row * 8 + 8]
            output.line("  " + "".join(SHADES[min(9, int(value / 17 * 10))] * 2 for value in pixels))
        right = "right" if self.label == self.truth else f"wrong: it is a {self.truth}"
        output.line(
            f"Held-out image {self.number}: the model says {self.label}, which is {right}.", style="bold"
        )
        for digit, probability in enumerate(self.probabilities):
            if probability >= 0.001:
                output.line(f"  {digit}  {probability:6.1%}  {'█' * round(probability * 40)}")
        pixels_text = ",".join(f"{value:g}" for value in self.image)
        body = f'{{"inputs":[{{"name":"image","datatype":"FP32","shape":[1,64],"data":[{pixels_text}]}}]}}'
        output.line(f"Answered in {self.took_ms:.1f} ms. onnxruntime without Tidegate gives the same answer.")
        output.line()
        output.line("Ask it yourself:")
        output.line(f"  curl -s {self.gateway_url}/v2/models/{NAME}/infer -d '{body}'")


@dataclass(frozen=True, slots=True)
class Example:
    """Run the digits example on the stack of ``settings``. Steps that were done before are skipped."""

    settings: Settings
    steps: Steps

    @property
    def folder(self) -> Path:
        """Return the folder of the trained model and the held-out images."""
        return self.settings.state_path / "examples" / NAME

    def run(self) -> Answered:
        """Train and deploy the model, wait until it serves, and classify one image."""
        self._train()
        self._deploy()
        return self._ask()

    def _train(self) -> None:
        if all((self.folder / name).is_file() for name in ("model.onnx", "heldout.npz", "metadata.json")):
            self.steps.change("train", "done", f"was in {self.folder}")
            return
        script = Path(tidegate.__file__).parents[1] / "examples" / NAME / "train.py"
        python = self.settings.runtime_path / "model-env" / "bin" / "python"
        for needed in (script, python):
            if not needed.exists():
                raise ExampleFailed(f"The example needs {needed}, which does not exist. Run `make up`.")
        self.steps.change("train", "starting", "a classifier of handwritten digits")
        done = subprocess.run(
            [str(python), str(script), "--out", str(self.folder)], capture_output=True, text=True
        )
        if done.returncode:
            ending = "\n".join((done.stderr or done.stdout).splitlines()[-8:])
            raise ExampleFailed(f"Training the example failed with exit code {done.returncode}:\n{ending}")
        self.steps.change("train", "done", (done.stdout.strip().splitlines() or [""])[-1])

    def _deploy(self) -> None:
        plane = Control(self.settings)
        try:
            endpoint = plane.registry.get(f"/v1/endpoints/{part(NAME)}")
        except NotFound:
            request = DeployRequest(
                self.folder / "model.onnx", NAME, metadata=read_json(self.folder / "metadata.json")
            )
            placed: Doc = publish(plane, request, self.steps)
        else:
            deployment = endpoint["targets"][0]["deployment"]
            self.steps.change("deploy", "done", f"{deployment} was there already")
            placed = {"deployment": {"name": deployment}, "endpoint": endpoint}
        wait_serving(plane, placed, WAIT_S, self.steps)

    def _ask(self) -> Answered:
        import numpy as np

        from tidegate.client import Client

        self.steps.change("infer", "starting")
        held_out = np.load(self.folder / "heldout.npz", allow_pickle=False)
        # The example must not hide the model's mistakes, so the image is chosen at random.
        number = random.randrange(len(held_out["image"]))
        image = held_out["image"][number : number + 1]
        with Client(self.settings.gateway_url, api_key=token_of(self.settings) or None) as client:
            client.metadata(NAME)
            began = time.perf_counter()
            result = client.infer(NAME, {"image": image}, timeout_s=WAIT_S)
            took_ms = (time.perf_counter() - began) * 1e3
        self.steps.change("infer", "done", f"{took_ms:.1f} ms")
        label, probabilities = int(result["label"][0]), result["probabilities"][0]
        expected = held_out["probabilities"][number]
        if label != held_out["label"][number] or np.abs(probabilities - expected).max() > TOLERANCE:
            raise ExampleFailed(
                f"The answer for held-out image {number} differs from that of onnxruntime without Tidegate."
            )
        return Answered(
            number=number,
            image=image[0].tolist(),
            truth=int(held_out["truth"][number]),
            label=label,
            probabilities=probabilities.tolist(),
            took_ms=took_ms,
            timing=result.timing,
            gateway_url=self.settings.gateway_url,
        )


def main() -> None:
    """Run the example on a running stack: ``python -m tidegate.cli.example``."""
    steps = Steps()
    with steps.shown():
        answered = Example(settings(), steps).run()
    answered.show()


if __name__ == "__main__":
    main()
