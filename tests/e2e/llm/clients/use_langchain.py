"""The client langchain-openai, unmodified."""

from __future__ import annotations

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from report import MODEL, NO_KEY, OPENAI_URL, TOOLS, WEATHER, main, needs_embeddings

TO = {"model": MODEL, "base_url": OPENAI_URL, "api_key": NO_KEY, "max_retries": 0}
chat = ChatOpenAI(**TO, temperature=0, max_tokens=8)


class Paint(BaseModel):
    """A colour and a number."""

    colour: str
    number: int


def check_invoke():
    answer = chat.invoke("Name a colour.")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0


def check_stream():
    chunks = list(chat.stream("Name a colour.", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks)
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


def check_batch():
    assert all(answer.content for answer in chat.batch(["Name a colour.", "Name a city."]))


def check_structured_output():
    writer = ChatOpenAI(**TO, temperature=0, max_tokens=80)
    answer = writer.with_structured_output(Paint, method="json_schema").invoke("Name a colour.")
    assert isinstance(answer, Paint)


def check_tools():
    caller = ChatOpenAI(**TO, temperature=0, max_tokens=60).bind_tools([WEATHER], tool_choice="required")
    (call,) = caller.invoke(TOOLS["messages"]).tool_calls
    assert call["name"] == "weather"


def check_embeddings():
    needs_embeddings()
    vectors = OpenAIEmbeddings(**TO, check_embedding_ctx_length=False).embed_documents(["one", "two"])
    assert len(vectors) == 2


async def check_the_async_calls():
    assert (await chat.ainvoke("Name a colour.")).content
    assert [chunk async for chunk in chat.astream("Name a colour.")]


if __name__ == "__main__":
    main()
