"""What the HTTP API answers over the embedded engine is what the model computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.template.chat import ChatTemplate
from finetune.distill.server import LogprobServer
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from tests.equivalence.test_serving_engine import generated, serving, write_adapters
from tests.serving_http import Served, listening

TOKENS = 64
PROMPTS = ["Ahoy! What is the capital of France?", "Write a line about the sea."]


@pytest.fixture(scope="module")
def model(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path], ChatTemplate]:
    """The embedded base in fp32, folders of three adapters, and its template."""
    config = ModelConfig(name=str(repo_root / "data/tiny-qwen2.5"), dtype="float32")
    base = load_base(config, QuantConfig(type="none"), "cpu").eval()
    folders = write_adapters(base, tmp_path_factory.mktemp("adapters"))
    return base, folders, ChatTemplate(load_tokenizer(config))


@pytest.fixture
def url(model):
    """Return the URL of a server with the base and all adapters."""
    base, folders, chat = model
    with serving(base, folders, cache_tokens=4096) as engine:
        served = Served(chat, engine=engine, adapters=list(folders))
        with listening(served.app) as url:
            yield url


def test_greedy_answers_of_a_mixed_batch_are_those_of_generate(url, model):
    base, folders, chat = model
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    texts = chat.encode_texts(PROMPTS)
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
    base, _, chat = model
    documents = [(ids, np.arange(len(ids) - 1)) for ids in chat.encode_texts(PROMPTS)]
    teacher = LogprobServer(url, "base", 5)
    teacher.check()
    for (ids, positions), found in zip(documents, teacher.score_many(documents), strict=True):
        with torch.no_grad():
            logits = base(torch.tensor(ids[None].astype(np.int64))).logits[0]
        expected = torch.log_softmax(logits, -1)[positions].topk(5)
        np.testing.assert_array_equal(found.ids, expected.indices.numpy())
        np.testing.assert_allclose(found.log_probs, expected.values.numpy(), atol=1e-4)
