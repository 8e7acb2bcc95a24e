"""The list of commands, and the handling of errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tidegate.cli import (
    alerts,
    alias,
    api,
    backup,
    batch,
    bench,
    canary,
    catalogue,
    chat,
    context,
    costs,
    dead,
    deploy,
    diagnose,
    drift,
    exit_codes,
    experiment,
    export,
    feedback,
    history,
    infer,
    inspect,
    jobs,
    keys,
    ledger,
    logs,
    manage,
    quality,
    quantize,
    replay,
    reproduce,
    restart,
    retention,
    rollout,
    scaling,
    service,
    settings,
    shadow,
    signatures,
    slo,
    stack,
    stages,
    top,
    traffic,
    tune,
    uploads,
    verify,
    version_archive,
)
from tidegate.cli.imports.commands import imports
from tidegate.client.errors import request_id_of
from tidegate.kernel.errors import TidegateError

app = typer.Typer(
    name="tidegate",
    help="Serve trained models behind a queue. Exit codes and examples: docs/cli.md.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def chosen(
    context: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The context to use (tidegate context list). Write this option before the command.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Serve trained models behind a queue. Exit codes and examples: docs/cli.md."""
    api.chosen.set(context)


_STACK, _MODELS, _JOBS, _WATCH = "The stack", "Models", "Jobs", "Looking inside"
_SCALING = "Scaling"
_ACCESS = "Access"

for name, command, panel in (
    ("up", stack.up, _STACK),
    ("down", stack.down, _STACK),
    ("restart", restart.restart, _STACK),
    ("status", stack.status, _STACK),
    ("logs", logs.logs, _STACK),
    ("backup", backup.backup, _STACK),
    ("restore", backup.restore, _STACK),
    ("version", stack.version, _STACK),
    ("deploy", deploy.deploy, _MODELS),
    ("quantize", quantize.quantize, _MODELS),
    ("models", inspect.models, _MODELS),
    ("versions", inspect.versions, _MODELS),
    ("sign", signatures.sign, _MODELS),
    ("signatures", signatures.signatures, _MODELS),
    ("save", version_archive.save, _MODELS),
    ("load", version_archive.load, _MODELS),
    ("uploads", uploads.uploads, _MODELS),
    ("search", catalogue.search, _MODELS),
    ("show", catalogue.show, _MODELS),
    ("describe", catalogue.describe, _MODELS),
    ("card", catalogue.card, _MODELS),
    ("lineage", catalogue.lineage, _MODELS),
    ("compare", catalogue.compare, _MODELS),
    ("stages", stages.stages, _MODELS),
    ("stage", stages.stage, _MODELS),
    ("approve", stages.approve, _MODELS),
    ("verify", verify.verify, _MODELS),
    ("infer", infer.infer, _MODELS),
    ("chat", chat.chat, _MODELS),
    ("jobs", jobs.jobs, _JOBS),
    ("job", jobs.job, _JOBS),
    ("batch", batch.batch, _JOBS),
    ("reproduce", reproduce.reproduce, _JOBS),
    ("tune", tune.tune, _MODELS),
    ("bench", bench.bench, _MODELS),
    ("scale", manage.scale, _SCALING),
    ("deployments", scaling.deployments, _SCALING),
    ("why", scaling.why, _SCALING),
    ("policy", scaling.policy, _SCALING),
    ("replay", replay.replay, _SCALING),
    ("pause", scaling.pause, _SCALING),
    ("resume", scaling.resume, _SCALING),
    ("drain", scaling.drain, _SCALING),
    ("cordon", scaling.cordon, _SCALING),
    ("warm", scaling.warm, _SCALING),
    ("rollback", rollout.rollback, _MODELS),
    ("split", rollout.split, _MODELS),
    ("traffic", traffic.traffic, _MODELS),
    ("rollout", canary.rollout, _MODELS),
    ("promote", canary.promote, _MODELS),
    ("experiment", experiment.experiment, _MODELS),
    ("feedback", feedback.feedback, _MODELS),
    ("shadow", shadow.shadow, _MODELS),
    ("apply", manage.apply, _MODELS),
    ("export", export.export, _MODELS),
    ("delete", manage.delete, _MODELS),
    ("undelete", retention.undelete, _MODELS),
    ("retention", retention.retention, _MODELS),
    ("drift", drift.drift, _WATCH),
    ("quality", quality.quality, _WATCH),
    ("top", top.top, _WATCH),
    ("diagnose", diagnose.diagnose, _WATCH),
    ("slo", slo.slo, _WATCH),
    ("routes", inspect.routes, _WATCH),
    ("replicas", inspect.replicas, _WATCH),
    ("decisions", inspect.decisions, _WATCH),
    ("cold-starts", inspect.cold_starts, _WATCH),
    ("costs", costs.costs, _WATCH),
    ("ledger", ledger.ledger, _WATCH),
    ("webhook-secret", ledger.webhook_secret, _WATCH),
    ("audit", history.audit, _ACCESS),
    ("usage", history.usage, _ACCESS),
):
    app.command(name, rich_help_panel=panel)(command)
app.add_typer(alias.alias, rich_help_panel=_MODELS)
app.add_typer(imports, rich_help_panel=_MODELS)
app.add_typer(context.context, rich_help_panel=_STACK)
app.add_typer(settings.settings, rich_help_panel=_STACK)
app.add_typer(service.service, rich_help_panel=_STACK)
app.add_typer(keys.keys, rich_help_panel=_ACCESS)
app.add_typer(dead.dead, rich_help_panel=_JOBS)
app.add_typer(alerts.alerts, rich_help_panel=_WATCH)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit. Print errors on stderr; with ``--json`` also as a document on stdout."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(given, prog_name="tidegate")
    except TidegateError as error:
        _report(error, json="--json" in given)
        sys.exit(exit_codes.code_of(error))
    except KeyboardInterrupt:
        sys.exit(exit_codes.INTERRUPTED)


def _report(error: TidegateError, json: bool) -> None:
    from tidegate.cli.output import dump, say

    rid = request_id_of(error)
    say(f"Error: {error.message}", style="red")
    if error.retry_after_s is not None:
        say(f"Try again in {error.retry_after_s:g} s.")
    if rid:
        say(f"Request id: {rid} (tidegate logs --request {rid})", style="dim")
    if json:
        dump({"error": error.message, "reason": error.reason, "request_id": rid})
