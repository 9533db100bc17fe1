"""What the HTTP API answers over the embedded engine is what the model computes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from finetune.config.command_options import ServeSettings
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.template.chat import ChatTemplate
from finetune.distill.server import LogprobServer
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.serving.engine.engine import EmbeddedEngine
from finetune.serving.engine.grammar import GrammarCompiler
from tests.equivalence.test_serving_engine import generated, write_adapters
from tests.serving_http import TOOLS_TEMPLATE, Served, listening

TOKENS = 64
PROMPTS = ["Ahoy! What is the capital of France?", "Write a line about the sea."]


@pytest.fixture(scope="module")
def model(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path], Any]:
    """The embedded base in fp32, folders of three adapters, and its tokenizer."""
    config = ModelConfig(name=str(repo_root / "data/tiny-qwen2.5"), dtype="float32")
    base = load_base(config, QuantConfig(type="none"), "cpu").eval()
    folders = write_adapters(base, tmp_path_factory.mktemp("adapters"))
    return base, folders, load_tokenizer(config)


@pytest.fixture
def url(model):
    """Return the URL of a server with the base and all adapters."""
    base, folders, tokenizer = model
    engine = EmbeddedEngine(
        base, ServeSettings(window_ms=20, cache_tokens=4096), grammars=GrammarCompiler(tokenizer, len(tokenizer))
    )
    with closing(engine):
        for name, folder in folders.items():
            engine.load_adapter(name, str(folder))
        served = Served(ChatTemplate(tokenizer, TOOLS_TEMPLATE), engine=engine, adapters=list(folders))
        with listening(served.app) as url:
            yield url


def test_greedy_answers_of_a_mixed_batch_are_those_of_generate(url, model):
    base, folders, tokenizer = model
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    texts = ChatTemplate(tokenizer).encode_texts(PROMPTS)
    names = ["base", *folders]

    def ask(number: int) -> list[int]:
        reply = client.completions.create(
            model=names[number % len(names)],
            prompt=texts[number // len(names)].tolist(),
            max_tokens=TOKENS,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        return [int(token.removeprefix("token_id:")) for token in reply.choices[0].logprobs.tokens]

    count = len(names) * len(PROMPTS)
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(ask, range(count)))
    for number, ids in enumerate(found):
        folder, prompt = folders.get(names[number % len(names)]), texts[number // len(names)].tolist()
        assert ids == generated(base, folder, prompt, TOKENS), number


def test_a_served_teacher_has_the_probabilities_of_the_model(url, model):
    base, _, tokenizer = model
    documents = [(ids, np.arange(len(ids) - 1)) for ids in ChatTemplate(tokenizer).encode_texts(PROMPTS)]
    teacher = LogprobServer(url, "base", 5)
    teacher.check()
    for (ids, positions), found in zip(documents, teacher.score_many(documents), strict=True):
        with torch.no_grad():
            logits = base(torch.tensor(ids[None].astype(np.int64))).logits[0]
        expected = torch.log_softmax(logits, -1)[positions].topk(5)
        np.testing.assert_array_equal(found.ids, expected.indices.numpy())
        np.testing.assert_allclose(found.log_probs, expected.values.numpy(), atol=1e-4)


@pytest.mark.parametrize("chosen", ["required", {"type": "function", "function": {"name": "sail"}}])
def test_a_forced_call_obeys_the_schema_of_its_function(url, chosen):
    # The schema refers to itself, from within the schema of the call.
    wind = {"type": "object", "properties": {"from": {"enum": ["north", "south"]}}, "required": ["from"]}
    parameters = {"type": "object", "properties": {"wind": {"$ref": "#/$defs/wind"}}, "required": ["wind"]}
    sail = {"name": "sail", "parameters": parameters | {"additionalProperties": False, "$defs": {"wind": wind}}}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Set sail!"}],
        tools=[{"type": "function", "function": sail}],
        tool_choice=chosen,
        temperature=0,
    )
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, reply.choices[0].finish_reason) == ("sail", "tool_calls")
    assert json.loads(call.function.arguments)["wind"]["from"] in ("north", "south")


def test_an_answer_obeys_its_schema(url):
    schema = {"type": "object", "properties": {"ships": {"type": "integer"}}, "required": ["ships"]}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "How many ships?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "fleet", "schema": schema | {"additionalProperties": False}},
        },
        max_tokens=200,
        seed=1,
    )
    text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert isinstance(json.loads(text)["ships"], int) if reason == "stop" else text.startswith("{")
