"""``tidegate chat``: a conversation, its session, and its errors, against a model from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from tidegate.cli.chat import Session, _message, members
from tidegate.cli.conversation import Conversation, Turn, no_such_model
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.waiting_line import WaitingLine, in_words
from tidegate.client import ChatResult, Client, Usage
from tidegate.kernel import errors

pytestmark = pytest.mark.unit

Line = Callable[[], None] | str


def text_event(text: str) -> str:
    return "data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).decode()


class Body(httpx.SyncByteStream):
    """A stream whose lines may also be functions, for what happens between two lines."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            if isinstance(line, str):
                yield f"{line}\n\n".encode()
            else:
                line()


class Model:
    """Answers every chat with ``lines``. ``seen``: the messages of each request."""

    def __init__(self, *lines: Line) -> None:
        self.lines = list(lines)
        self.seen: list[list[dict[str, Any]]] = []
        self.status = 200

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v2/repository/index":
            return httpx.Response(200, json=[{"name": "smollm2"}, {"name": "digits"}])
        body = orjson.loads(request.content)
        self.seen.append(body["messages"])
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "Not now.", "code": "overloaded"}})
        return httpx.Response(200, stream=Body(self.lines))


def client_of(model: Model) -> Client:
    return Client("http://gateway:1", transport=httpx.MockTransport(model))


def conversation(model: Model, system: str | None = None) -> Conversation:
    return Conversation(client_of(model), "smollm2", system, {"max_tokens": 9})


@pytest.fixture
def waiting() -> WaitingLine:
    return WaitingLine("smollm2", lambda: "it is starting")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_turn_sees_the_turns_before_it(waiting: WaitingLine) -> None:
    model = Model(text_event("Good "), text_event("day"))
    talk, told = conversation(model, "Be kind."), list[str]()
    for question in ("Hello?", "And you?"):
        turn = talk.ask(question, told.append, waiting)
        assert turn.result.text == "Good day"
    assert told == ["Good ", "day"] * 2
    assert [each["role"] for each in model.seen[1]] == ["system", "user", "assistant", "user"]
    talk.restart()
    talk.ask("Hello?", told.append, waiting)
    assert model.seen[2] == model.seen[0]


def test_ctrl_c_cancels_an_answer_and_keeps_its_part(waiting: WaitingLine) -> None:
    model = Model(text_event("Good "), interrupt, text_event("day"))
    talk = conversation(model)
    turn = talk.ask("Hello?", lambda _: None, waiting)
    assert turn.cancelled
    assert turn.result.text == "Good "
    assert [each["content"] for each in talk.messages] == ["Hello?", "Good "]


def test_a_question_without_an_answer_is_forgotten(waiting: WaitingLine) -> None:
    model = Model(interrupt)
    talk = conversation(model)
    assert talk.ask("Hello?", lambda _: None, waiting).cancelled
    model.status = 400
    with pytest.raises(errors.Overloaded, match="Not now"):
        talk.ask("Hello?", lambda _: None, waiting)
    assert talk.messages == []


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    left = iter(lines)

    def read(_: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_a_session_goes_on_after_errors_and_cancelled_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waiting: WaitingLine
) -> None:
    model = Model(text_event("Good "), interrupt)
    typed(monkeypatch, "Hello?", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):  # one cancelled the answer, the next leaves
        Session(conversation(model), waiting, stats=False).run()
    model = Model(text_event("Good day"))
    model.status = 400
    typed(
        monkeypatch,
        KeyboardInterrupt,
        "Hello?",
        "/system Be kind.",
        "/stats",
        '"""One',
        'two"""',
        "/bye",
        "x",
    )
    talk = conversation(model)
    Session(talk, waiting, stats=False).run()
    captured = capsys.readouterr()
    assert "The answer was cancelled" in captured.err
    assert "Error: Not now." in captured.err
    assert talk.system == "Be kind."
    assert [each[-1]["content"] for each in model.seen] == ["Hello?", "One\ntwo"]


def test_a_message_is_a_line_or_several() -> None:
    lines = iter(['"""One', " two", 'three"""'])
    assert _message(lambda _: next(lines)) == "One\n two\nthree"
    assert _message(lambda _: " Hello? ") == "Hello?"


def test_othermembers_of_the_request() -> None:
    assert members(["top_k=4", "stop=END", 'stop2=["a"]']) == {"top_k": 4, "stop": "END", "stop2": ["a"]}
    with pytest.raises(UsageError):
        members(["top_k"])


def test_figures() -> None:
    usage = Usage(30, 11, 20)
    turn = Turn(ChatResult([], usage, "m", "", "r"), first_s=0.5, seconds=2.5, pieces=3)
    assert turn.tokens_per_s == pytest.approx(5.0)
    assert turn.stats() == (
        "first token after 0.50 s; 5.0 tokens/s; 11 tokens in 2.50 s; prompt 30 tokens, 20 of them cached"
    )
    assert turn.document("m")["usage"]["total_tokens"] == 41
    cut = Turn(ChatResult([], None, "m", "", "r"), first_s=None, seconds=1.0, pieces=0, cancelled=True)
    assert (cut.tokens, cut.tokens_per_s, cut.stats()) == (0, None, "0 tokens in 1.00 s")


def test_an_unknown_model_says_which_are_near() -> None:
    client = client_of(Model())
    assert no_such_model(client, "smolm2") == "There is no model 'smolm2'. Did you mean smollm2?"
    assert no_such_model(client, "zzz") == "There is no model 'zzz'. The models are: digits, smollm2."


def test_the_state_of_a_model_in_words() -> None:
    ready = {"type": "Ready", "ok": False, "message": "0 of 1 replicas are ready"}
    assert in_words({"ready": 0, "conditions": [ready]}) == "it is starting: 0 of 1 replicas are ready"
    assert in_words({"ready": 1, "conditions": []}).startswith("it is ready")
    assert in_words(None) == "the autoscaler has not seen the deployment yet"


def test_json_needs_a_message(tidegate: Callable[..., tuple[int, str, str]], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, told = tidegate("chat", "smollm2", "--json")
    assert code == 2
    assert "--json needs one message" in told
