"""``tidegate deploy``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import metadata_options as about
from tidegate.cli import upstream_options as far
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, numbers, pairs, seconds
from tidegate.kernel.protocol import names

_SCALE, _RUN, _ABOUT, _ROLL = "Scaling", "How it runs", about.PANEL, "Rolling out"
_LLM = far.PANEL
_SMALLER = "A smaller model"


def deploy(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE|DIR|NAME@N", help="A model's file or folder, or a registered version."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model and its endpoint; default: from the file's name.")
    ] = None,
    model_format: Annotated[
        str | None,
        typer.Option(
            help="onnx, sklearn, xgboost, lightgbm, catboost, tflite, tensorflow, torchscript, pt2, python, "
            "mlflow, huggingface, triton or llm; default: from the contents."
        ),
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option("--min", min=0, help="Fewest replicas; 0 allows scale to zero.", rich_help_panel=_SCALE),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max", min=1, help="Maximum number of replicas.", rich_help_panel=_SCALE)
    ] = None,
    scale_to_zero_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="With --min 0: scale to zero after this time without requests.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    target_wait_ms: Annotated[
        float | None,
        typer.Option(
            help="Scale up if requests would wait longer than this, in milliseconds.", rich_help_panel=_SCALE
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each replica.", rich_help_panel=_RUN)
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Instances of the model in each replica.", rich_help_panel=_RUN)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Maximum rows in one model call.", rich_help_panel=_RUN)
    ] = None,
    batch_window_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Longest wait to fill a batch, in milliseconds.", rich_help_panel=_RUN),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V", help="Environment variable of the model; repeatable.", rich_help_panel=_RUN
        ),
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="A resource of each replica: memory_mb, cpus, shm_mb, gpus, gpu_memory_mb, allow_cpu or "
            "response_cache_mb; repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    sampling: Annotated[
        int | None,
        typer.Option(
            min=0, help="Rows that a replica samples per second, for drift; 0: none.", rich_help_panel=_RUN
        ),
    ] = None,
    keep_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of sampled rows to keep with their values, in the blob store; 0: none.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    redact: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Never keep the values of this input or output; repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Container image of the workers, if they run in containers.", rich_help_panel=_RUN),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The engine: auto, llamacpp (GGUF), vllm (Hugging Face folder) or openai-url (--upstream).",
            rich_help_panel=_LLM,
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Number of concurrent requests in a replica.", rich_help_panel=_LLM),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=16, help="Maximum number of tokens of a prompt and its answer together.", rich_help_panel=_LLM
        ),
    ] = None,
    affinity_wait_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Longest wait, in milliseconds, for a replica that has read the prompt's start; 0: none.",
            rich_help_panel=_LLM,
        ),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An engine argument, as the engine names it; repeatable.",
            rich_help_panel=_LLM,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A LoRA adapter; requests name it ENDPOINT:NAME. Repeatable.",
            rich_help_panel=_LLM,
        ),
    ] = None,
    upstream: far.Upstream = None,
    upstream_model: far.UpstreamModel = None,
    credential: far.Credential = None,
    credential_header: far.CredentialHeader = None,
    region: far.Region = None,
    requests_per_minute: far.RequestsPerMinute = None,
    tokens_per_minute: far.TokensPerMinute = None,
    upstream_timeout: far.UpstreamTimeout = None,
    signature: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="The model's inputs and outputs, if its file does not declare them.",
            rich_help_panel=_ABOUT,
        ),
    ] = None,
    requirements: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.txt",
            help="Python packages that the model needs, as a requirements file of pip.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Accept a pickle. Loading it can run any code.", rich_help_panel=_ABOUT
        ),
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Accept this name, which was refused in a pickle or skops file; repeatable.",
            rich_help_panel=_ABOUT,
        ),
    ] = None,
    breaking: Annotated[
        bool,
        typer.Option(
            "--breaking", help="Accept a signature that breaks existing callers.", rich_help_panel=_ABOUT
        ),
    ] = False,
    metadata: about.MetadataFile = None,
    trained_at: about.TrainedAt = None,
    metric: about.Metrics = None,
    param: about.Parameters = None,
    tag: about.Tags = None,
    note: about.Note = None,
    owner: about.Owner = None,
    license_: about.License = None,
    framework: about.Framework = None,
    commit: about.Commit = None,
    dataset: about.Dataset = None,
    run: about.Run = None,
    parent: about.Parent = None,
    card: about.Card = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Training data (.csv, .npz, .parquet) to compare requests with (docs/drift.md). Only its "
            "profile is sent.",
            rich_help_panel=_ABOUT,
        ),
    ] = None,
    signed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The signature that `tidegate sign` or `model_signing sign key` made (docs/signing.md).",
            rich_help_panel=_ABOUT,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="For ONNX: int8, or auto (int8 only if it is also faster than the original). The smaller "
            "model becomes a separate version (docs/edge.md).",
            rich_help_panel=_SMALLER,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="The model's inputs by name, and perhaps `labels`, to measure how much accuracy int8 loses.",
            rich_help_panel=_SMALLER,
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(metavar="LOSS", help="Largest loss to accept; default: 0.5%.", rich_help_panel=_SMALLER),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="auto",
            help="For a folder with GGUF files of one model: serve the best file that fits into --memory.",
            rich_help_panel=_SMALLER,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of a replica with a GGUF file, such as 2GiB; default: this machine's free memory.",
            rich_help_panel=_SMALLER,
        ),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--version",
            metavar="N|ALIAS",
            help="Serve this registered version of the model NAME.",
            rich_help_panel=_ROLL,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Example requests that the version must answer before it gets traffic.",
            rich_help_panel=_ROLL,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Serve the version even if its verification is missing or failed.",
            rich_help_panel=_ROLL,
        ),
    ] = False,
    traffic: Annotated[
        bool,
        typer.Option(
            "--traffic/--no-traffic",
            help="--no-traffic: only start the version. Later, `tidegate split` sends it traffic.",
            rich_help_panel=_ROLL,
        ),
    ] = True,
    register_only: Annotated[
        bool,
        typer.Option(
            "--register-only",
            help="Register and verify the version, but do not serve it.",
            rich_help_panel=_ROLL,
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the version serves.")] = True,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Longest time of each wait.")] = "5m",
    json: Json = False,
) -> None:
    """Serve a model file. If the model exists, the file becomes its next version, and no call fails.

    Examples: `tidegate deploy model.onnx --name digits`, `tidegate deploy digits@2`,
    `tidegate deploy digits@champion`,
    `tidegate deploy SmolLM2.gguf --slots 4`, `tidegate deploy ggufs/ --quantization auto --memory 2GiB`,
    `tidegate deploy model.onnx --precision auto --samples data.npz --max-loss 0.5%`,
    `tidegate deploy --upstream https://HOST/v1 --credential env:PROVIDER_API_KEY --name chat`.
    """
    from tidegate.cli.deploy_request import DeployRequest
    from tidegate.cli.gguf_fit import best_fit
    from tidegate.cli.llm_options import adapter_files, llm_fields, upstream_artifact
    from tidegate.cli.llm_packages import is_hugging_face
    from tidegate.cli.oip_upstream import is_oip, oip_request
    from tidegate.cli.precision import DEFAULT_LOSS, Wish, loss_of
    from tidegate.cli.publish import read_json, read_lines
    from tidegate.cli.serving import Way, publish_and_serve, referenced, registered_name, serve_version
    from tidegate.cli.smoke import samples_of

    adapters = adapter_files(adapter)
    options = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "scale_to_zero_after_s": None if scale_to_zero_after is None else seconds(scale_to_zero_after),
        "target_wait_ms": target_wait_ms,
        "threads": threads,
        "instances": instances,
        "batching": _given({"max_batch": max_batch, "window_ms": batch_window_ms}) or None,
        "env": pairs("--env", env) or None,
        "resources": numbers("--resource", resource) or None,
        "sampling": sampling,
        "keep_rows": keep_rows,
        "redact": redact or None,
        "image": image,
        "unverified": True if force else None,
        "llm": llm_fields(
            engine=engine or ("vllm" if path is not None and is_hugging_face(path) else None),
            slots=slots,
            context=context,
            affinity_wait_ms=affinity_wait_ms,
            arguments=engine_arg,
            adapters=adapters,
            upstream={
                "upstream": upstream,
                "upstream_model": upstream_model,
                "credential": credential,
                "credential_header": credential_header,
                "region": region,
                "requests_per_minute": requests_per_minute,
                "tokens_per_minute": tokens_per_minute,
                "upstream_timeout_s": None if upstream_timeout is None else seconds(upstream_timeout),
            },
        ),
    }
    described = about.stated(
        trained_at=trained_at,
        metrics=metric,
        parameters=param,
        tags=tag,
        note=note,
        owner=owner,
        license=license_,
        framework=framework,
        commit=commit,
        dataset=dataset,
        run=run,
        parent=parent,
    )
    way = Way(seconds(timeout), wait, traffic, check, register_only)
    said = (
        described
        or metadata
        or card
        or signature
        or requirements
        or model_format
        or allow_pickle
        or trust
        or adapters
        or baseline
        or signed
        or precision
        or samples
        or max_loss
        or quantization
        or breaking
    )
    path, version = referenced(path, version)
    if version is not None:
        serve_version(registered_name(path, name, said=bool(said)), version, _given(options), way, json)
        return
    if path is None and upstream is not None:
        if name is None:
            raise UsageError("A deployment of an upstream needs a name. Add --name NAME.")
        with upstream_artifact(upstream, upstream_model) as file:
            if is_oip(upstream):
                stated = read_json(signature) if signature else None
                request = oip_request(file, name, upstream, _given(options), stated, described)
            else:
                request = DeployRequest(file, name, "llm", _given(options), metadata=described)
            publish_and_serve(request, way, json)
        return
    if path is None:
        raise UsageError(
            "Name a model file or a folder. To serve a registered version: tidegate deploy NAME --version N"
        )
    fit = best_fit(path, quantization, memory, slots, context)
    request = DeployRequest(
        path=fit.path if fit else path,
        name=name or name_of(path),
        # --engine makes the version a language model, even if the folder holds an embedding model of
        # transformers.
        format=model_format or ("llm" if engine else None),
        options=fit.options(_given(options)) if fit else _given(options),
        signature=read_json(signature) if signature else None,
        requirements=read_lines(requirements) if requirements else None,
        metadata=about.merged(metadata, described),
        allow_pickle=allow_pickle,
        trust=trust or [],
        breaking=breaking,
        adapters=adapters,
        baseline=baseline,
        signed=signed,
        card=card,
        samples=samples_of(check) if check else [],
    )
    wish = None
    if precision is None and (samples or max_loss):
        raise UsageError(
            "--samples and --max-loss are only for a smaller model. Add --precision auto or int8."
        )
    if precision is not None:
        wish = Wish(precision, samples, loss_of(max_loss or DEFAULT_LOSS), threads=threads or 1)
        wish.check(path)
    if fit is not None:
        fit.show()
    publish_and_serve(request, way, json, wish)


def name_of(path: Path) -> str:
    """Return the model name that a path suggests: ``My_Model.v2`` for ``My_Model.v2.onnx``.

    Raise UsageError if the path suggests no name.
    """
    resolved = path.resolve()
    stem = resolved.name if resolved.is_dir() else re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", resolved.name)
    found = names.fitting(stem)
    if not found:
        raise UsageError(f"No name for the model can be made from {path}. Add --name NAME.")
    return found


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
