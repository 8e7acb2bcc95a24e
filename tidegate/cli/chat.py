"""``tidegate chat``: talk to a language model in the terminal."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, settings, token_of, unreachable
from tidegate.cli.exit_codes import INTERRUPTED, UsageError
from tidegate.cli.options import Json, pairs, seconds
from tidegate.cli.output import plain, say
from tidegate.client.errors import Unreachable, request_id_of
from tidegate.kernel.errors import NotFound, TidegateError

if TYPE_CHECKING:
    from tidegate.cli.conversation import Conversation, Turn
    from tidegate.cli.waiting_line import WaitingLine

PRIORITY = "X-Tidegate-Priority"
HELP = """/reset   remove all messages of the conversation
/system  show the system prompt; /system TEXT changes it
/stats   show or hide the figures of each answer
/exit    end the session (also Ctrl-D)
\"\"\"      begin and end a message of several lines
Ctrl-C cancels an answer. Ctrl-C twice at the prompt ends the session."""


def chat(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="One message; text from a pipe is appended. Without a message, a session starts.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Temperature of the sampling; 0: always the most likely token."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, which makes an answer repeatable.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=JSON", help=("Another field of the request, such as top_k=40; repeatable.")
        ),
    ] = None,
    priority: Annotated[
        str | None, typer.Option(help="Priority: high, normal or low; default: normal.")
    ] = None,
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help="Longest wait for the first token, and between two tokens.")
    ] = "10m",
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Show the figures of each answer: time to first token, tokens/s, tokens."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Chat with a language model. Ctrl-C cancels an answer, and the session continues.

    On a terminal without PROMPT, a session of many messages starts; /help lists its commands.
    Examples: tidegate chat smollm2 "Say hello."    tidegate chat smollm2 "Summarise:" < notes.txt
    """
    from tidegate.cli.conversation import Conversation, no_such_model
    from tidegate.cli.waiting_line import WaitingLine, state_of
    from tidegate.client import Client

    text = _whole_prompt(prompt)
    if json and text is None:
        raise UsageError('--json needs one message: tidegate chat NAME "MESSAGE" --json')
    found = settings()
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, **members(more)}
    options |= {"headers": {PRIORITY: priority}} if priority else {}
    with Client(found.gateway_url, timeout_s=seconds(timeout), api_key=token_of(found) or None) as client:
        talk = Conversation(client, name, system, options)
        waiting = WaitingLine(name, lambda: state_of(Control(found), name))
        try:
            if text is not None:
                _once(talk, text, waiting, stats=stats, json=json)
            else:
                client.metadata(name)
                Session(talk, waiting, stats=stats).run()
        except NotFound as error:
            error.message = no_such_model(client, name)
            raise
        except Unreachable:
            raise unreachable("gateway", found.gateway_url) from None


def _whole_prompt(prompt: str | None) -> str | None:
    """Return the message from the command line and stdin; None for a session on a terminal."""
    if prompt is None and sys.stdin.isatty():
        return None
    piped = sys.stdin.read() if prompt is None or _has_input() else ""
    text = "\n\n".join(part for part in (prompt or "", piped.strip()) if part)
    if not text:
        raise UsageError('There is no message, because stdin is empty. Write tidegate chat NAME "MESSAGE".')
    return text


def _has_input() -> bool:
    """Return True if stdin is a pipe or a file.

    If the command line has a message, stdin is read only if it is a pipe or a file. Any other stdin, such as
    that of cron, may have no input.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def members(more: list[str] | None) -> dict[str, Any]:
    """Return the fields that ``--set K=JSON`` options add to the request.

    A value that is not valid JSON is used as text.
    """
    import orjson

    found: dict[str, Any] = {}
    for key, value in pairs("--set", more).items():
        try:
            found[key] = orjson.loads(value)
        except orjson.JSONDecodeError:
            found[key] = value
    return found


def _once(talk: Conversation, text: str, waiting: WaitingLine, *, stats: bool, json: bool) -> None:
    turn = talk.ask(text, (lambda _: None) if json else writer(), waiting)
    if json:
        output.dump(turn.document(talk.model))
    else:
        _end_of(turn, stats)
    if turn.cancelled:
        raise typer.Exit(INTERRUPTED)


def writer() -> Callable[[str], None]:
    """Return a function that prints text immediately. On a terminal it escapes control characters."""

    def write(piece: str) -> None:
        sys.stdout.write(plain(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()

    return write


def _end_of(turn: Turn, stats: bool) -> None:
    if turn.pieces:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if turn.cancelled:
        say("The answer was cancelled.", style="yellow")
    elif turn.result.tool_calls:
        say(f"The model calls tools: {turn.result.tool_calls}")
    elif turn.result.finish_reason == "length":
        say("The answer reached its maximum length (--max-tokens, or the model's context).", style="dim")
    if stats:
        say(turn.stats(), style="dim")


class Session:
    """A conversation on a terminal: messages and answers until the user ends it."""

    def __init__(self, talk: Conversation, waiting: WaitingLine, *, stats: bool) -> None:
        self._talk = talk
        self._waiting = waiting
        self._stats = stats
        self._interrupted = False

    def run(self) -> None:
        """Read messages and answer them, until /exit, Ctrl-D, or Ctrl-C twice."""
        try:
            import readline  # noqa: F401 - adds editing keys to `input`
        except ImportError:
            pass
        say(f"Chat with {self._talk.model}. /help lists commands; Ctrl-D ends the session.", style="dim")
        while (text := self._read()) is not None:
            if text.startswith("/"):
                if not self._command(text):
                    return
            elif text:
                self._turn(text)

    def _read(self) -> str | None:
        """Return the next message; "" after the first Ctrl-C, None after Ctrl-D.

        Raise KeyboardInterrupt if Ctrl-C is pressed twice in a row.
        """
        try:
            text = _message(input)
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            if self._interrupted:
                raise
            self._interrupted = True
            say("Ctrl-C once more, or Ctrl-D, ends the session.", style="dim")
            return ""
        self._interrupted = False
        return text

    def _turn(self, text: str) -> None:
        try:
            turn = self._talk.ask(text, writer(), self._waiting)
        except NotFound:
            raise
        except TidegateError as error:
            say(f"Error: {error.message}", style="red")
            if error.retry_after_s is not None:
                say(f"Try again in {error.retry_after_s:g} s.")
            if rid := request_id_of(error):
                say(f"Request id: {rid} (tidegate logs --request {rid})", style="dim")
            return
        _end_of(turn, self._stats)
        self._interrupted = turn.cancelled

    def _command(self, text: str) -> bool:
        """Run a command: a line that begins with ``/``. Return False to end the session."""
        word, _, rest = text.partition(" ")
        match word:
            case "/exit" | "/quit" | "/bye":
                return False
            case "/reset" | "/clear":
                self._talk.restart()
                say("All messages are removed. The next message starts a new conversation.")
            case "/system":
                self._talk.system = rest.strip() or self._talk.system
                say(f"System prompt: {self._talk.system or 'none'}")
            case "/stats":
                self._stats = not self._stats
                say(f"Figures are {'shown' if self._stats else 'hidden'}.")
            case _:
                say(HELP)
        return True


def _message(read: Callable[[str], str]) -> str:
    """Read one message: a line, or lines between triple quotes."""
    line = read(">>> ").strip()
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip()
