"""The `openai` package talks to `rlhf serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models import load_tokenizer
from tests.launch.serve.servers import Running

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


def test_a_chat_is_that_of_the_chat_template_and_generate(server: Running, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=True)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = plain.generate(  # type: ignore[attr-defined]
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
        )[0, len(ids) :]
    found = server.openai().chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, temperature=0)
    assert found.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert found.choices[0].finish_reason == "length"
    assert found.usage and (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 9)
    assert found.model == "tiny"


def test_a_stream_is_the_same_text_in_pieces(server: Running) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 60, "seed": 3, "n": 2}
    client = server.openai()
    whole = client.chat.completions.create(**asked)
    streamed, chunks, usage = {0: "", 1: ""}, 0, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            chunks += 1
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == {choice.index: choice.message.content for choice in whole.choices}
    assert streamed[0] != streamed[1]
    assert usage == whole.usage
    assert chunks > 6


def test_a_stop_string_is_not_in_the_text(server: Running) -> None:
    client = server.openai()
    asked: Any = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:24]
    found = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (found.text, found.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stop, stream=True))
    assert streamed == found.text


def test_logprobs_are_told_for_each_token(server: Running) -> None:
    client = server.openai()
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert chat.logprobs and chat.logprobs.content and len(chat.logprobs.content) == 5
    for entry in chat.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob  # at temperature 0 the likeliest is taken
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    asked: Any = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "logprobs": 1}
    plain = client.completions.create(**asked, temperature=0).choices[0]
    assert plain.logprobs and plain.logprobs.tokens
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs or []) == 5
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=5).choices[0].logprobs is None


def test_many_prompts_get_their_own_choices(server: Running) -> None:
    found = server.openai().completions.create(model="tiny", prompt=["hello", "what is"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    alone = server.openai().completions.create(model="tiny", prompt=[[1, 70, 71]], max_tokens=3, temperature=0)
    assert alone.usage and alone.usage.prompt_tokens == 3


def test_models_are_listed(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        client.chat.completions.create(model="other", messages=HELLO)


def test_mistakes_have_the_errors_of_the_client(server: Running) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError, match="the model holds"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10**6)
    with pytest.raises(openai.BadRequestError, match="the most is 1024"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1025)
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
    with pytest.raises(openai.UnprocessableEntityError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, tools=[], tool_choice="none")
    with pytest.raises(openai.BadRequestError, match="roles"):
        client.chat.completions.create(model="tiny", messages=[*HELLO, *HELLO])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
