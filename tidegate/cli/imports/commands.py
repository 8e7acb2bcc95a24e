"""``tidegate import``: import a model of MLflow, Hugging Face, SageMaker or TorchServe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, pairs, seconds

if TYPE_CHECKING:
    from tidegate.cli.imports.plan import ImportPlan

imports = typer.Typer(
    name="import",
    help="Import a model from another system: MLflow, Hugging Face, SageMaker or TorchServe.",
    no_args_is_help=True,
)

_Name = Annotated[
    str | None, typer.Option("--name", help="The model's name; default: the name in the source.")
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only show which parts of the model Tidegate supports. Needs no stack."),
]
_Register = Annotated[
    bool, typer.Option("--register-only", help="Register the version, but do not serve it.")
]
_Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Accept a pickle. Loading it can run any code.")
]
_Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NAME",
        help="Accept this name, which was refused in a pickle or skops file; repeatable.",
    ),
]
_Signature = Annotated[
    Path | None,
    typer.Option(
        "--signature",
        metavar="FILE.json",
        help="The model's inputs and outputs, if the source does not declare them.",
    ),
]
_Requirements = Annotated[
    Path | None,
    typer.Option(
        "--requirements", metavar="FILE.txt", help="Requirements to use instead of the source's own."
    ),
]
_Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="K=V", help="Environment variable of the model; repeatable."),
]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the version serves.")]
_Timeout = Annotated[
    str,
    typer.Option(
        "--timeout", metavar="TIME", help="Longest wait for the verification, and then for a ready replica."
    ),
]


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of an import. Some imports do not have all of them."""

    dry_run: bool
    register_only: bool
    allow_pickle: bool
    signature: Path | None
    requirements: Path | None
    env: list[str] | None
    wait: bool
    timeout: str
    json: bool
    trust: list[str] | None = None


@imports.command("mlflow")
def mlflow_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|URI", help="A folder that has MLmodel, or models:/NAME/VERSION, or runs:/RUN/PATH."
        ),
    ],
    name: _Name = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Address of the tracking server; default: MLFLOW_TRACKING_URI."),
    ] = None,
    dry_run: _DryRun = False,
    register_only: _Register = False,
    allow_pickle: _Pickle = False,
    trust: _Trust = None,
    signature: _Signature = None,
    requirements: _Requirements = None,
    env: _Env = None,
    wait: _Wait = True,
    timeout: _Timeout = "10m",
    json: Json = False,
) -> None:
    """Import an MLflow model with the metrics, parameters and tags of its run.

    Examples: `tidegate import mlflow mlruns/1/models/m-1/artifacts`, `tidegate import mlflow
    models:/churn/3 --tracking-uri http://mlflow:5000 --allow-pickle`.
    """
    from tidegate.cli.imports import mlflow
    from tidegate.cli.imports.mlflow_server import TrackingServer

    def make(work: Path) -> ImportPlan:
        if not source.startswith(("models:/", "runs:/")):
            folder = Path(source.removeprefix("file://"))
            return mlflow.plan_of(folder, name, source, {}, signed=signature is not None)
        folder = work / "model"
        facts = TrackingServer(tracking_uri).download(source, folder)
        return mlflow.plan_of(folder, name, source, facts, signed=signature is not None)

    _carry_out(
        make,
        Choices(
            dry_run, register_only, allow_pickle, signature, requirements, env, wait, timeout, json, trust
        ),
    )


@imports.command("hf")
def hugging_face_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with config.json.")],
    name: _Name = None,
    dry_run: _DryRun = False,
    register_only: _Register = False,
    allow_pickle: _Pickle = False,
    requirements: _Requirements = None,
    env: _Env = None,
    wait: _Wait = True,
    timeout: _Timeout = "10m",
    json: Json = False,
) -> None:
    """Import a Hugging Face folder with a classifier, a text embedding model or a language model.

    A classifier may read texts or images. Example: `tidegate import hf all-MiniLM-L6-v2 --name minilm`.
    """
    from tidegate.cli.imports import hugging_face

    _carry_out(
        lambda _: hugging_face.plan_of(folder, name),
        Choices(dry_run, register_only, allow_pickle, None, requirements, env, wait, timeout, json),
    )


@imports.command("sagemaker")
def sagemaker_archive(
    archive: Annotated[Path, typer.Argument(metavar="model.tar.gz", help="The model's archive.")],
    name: _Name = None,
    entry_point: Annotated[
        str | None, typer.Option(metavar="FILE.py", help="The script in code/; default: inference.py.")
    ] = None,
    dry_run: _DryRun = False,
    register_only: _Register = False,
    allow_pickle: _Pickle = False,
    trust: _Trust = None,
    signature: _Signature = None,
    requirements: _Requirements = None,
    env: _Env = None,
    wait: _Wait = True,
    timeout: _Timeout = "10m",
    json: Json = False,
) -> None:
    """Import a SageMaker archive: a script (code/inference.py) with model_fn, or a single model file.

    Example: `tidegate import sagemaker model.tar.gz --name churn`. Then `invoke_endpoint` of boto3 works.
    """
    from tidegate.cli.imports import sagemaker

    _carry_out(
        lambda work: sagemaker.plan_of(archive, name, work, entry_point),
        Choices(
            dry_run, register_only, allow_pickle, signature, requirements, env, wait, timeout, json, trust
        ),
    )


@imports.command("torchserve")
def torchserve_archive(
    archive: Annotated[Path, typer.Argument(metavar="model.mar", help="An archive of torch-model-archiver.")],
    name: _Name = None,
    dry_run: _DryRun = False,
    register_only: _Register = False,
    requirements: _Requirements = None,
    env: _Env = None,
    wait: _Wait = True,
    timeout: _Timeout = "10m",
    json: Json = False,
) -> None:
    """Import a TorchServe archive, with its own handler or a handler of TorchServe (image_classifier).

    Example: `tidegate import torchserve densenet.mar`. Then `POST /predictions/densenet` works.
    """
    from tidegate.cli.imports import torchserve

    _carry_out(
        lambda work: torchserve.plan_of(archive, name, work),
        Choices(dry_run, register_only, False, None, requirements, env, wait, timeout, json),
    )


def _carry_out(make: Callable[[Path], ImportPlan], choices: Choices) -> None:
    """Make the plan of an import and show it. Register or serve the model, unless ``--dry-run`` is set."""
    from tidegate.cli.deploy_request import DeployRequest
    from tidegate.cli.publish import read_json, read_lines
    from tidegate.cli.serving import Way, register_only, serve_imported

    with tempfile.TemporaryDirectory(prefix="tidegate-import-") as work:
        plan = make(Path(work))
        report: dict[str, Any] = {"import": plan.document()}
        if choices.dry_run:
            output.show(report, choices.json, plan.show)
            return
        if not choices.json:
            plan.show()
        if plan.pickled and not choices.allow_pickle:
            raise UsageError(
                f"{plan.source}: {plan.pickled}. Loading a pickle can run any code on the workers. "
                "If you trust its origin, add --allow-pickle."
            )
        request = DeployRequest(
            path=plan.path,
            name=plan.name,
            format=plan.format,
            options=plan.options | ({"env": found} if (found := pairs("--env", choices.env)) else {}),
            signature=read_json(choices.signature) if choices.signature else plan.signature,
            requirements=read_lines(choices.requirements) if choices.requirements else plan.requirements,
            metadata=plan.metadata,
            allow_pickle=choices.allow_pickle,
            trust=choices.trust or [],
        )
        if choices.register_only:
            register_only(request, choices.json, report)
            return
        serve_imported(request, Way(seconds(choices.timeout), choices.wait), choices.json, report)
