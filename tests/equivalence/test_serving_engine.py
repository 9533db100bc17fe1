"""The embedded engine answers as the model that was trained: whatever else runs, and in whatever order it comes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from finetune.config.command_options import ServeSettings
from finetune.models.adapters.files import save_adapter
from finetune.serving.engine.engine import EmbeddedEngine
from finetune.serving.request import Event, Finished, PromptScores, Request, Token
from tests.models import random_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 3}},
    "mlp": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
}


class Collector:
    """The events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def put(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        assert self.ended.wait(60)
        return [event.id for event in self.events if isinstance(event, Token)]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    folders = {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        wrapped = peft.get_peft_model(random_model(request.param), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(seed)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(wrapped, folders[name])
    return random_model(request.param).eval(), folders


def generated(base: Any, folder: Path | None, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return the greedy answer of transformers, with PEFT's adapter."""
    model = base if folder is None else peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([prompt], device=base.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    try:
        ids = model.generate(ids, max_new_tokens=tokens, **options)
    finally:
        if folder is not None:
            model.unload()
    return ids[0, len(prompt) :].tolist()


def test_base_and_adapters_in_one_batch_answer_as_generate(model: tuple[Any, dict[str, Path]]) -> None:
    base, folders = model
    engine = EmbeddedEngine(base, ServeSettings(window_ms=20, prefill_tokens=7, max_batch=4, cache_tokens=512))
    generator = torch.Generator().manual_seed(0)
    try:
        for name, folder in folders.items():
            engine.load_adapter(name, str(folder))
        asked = []
        for i, name in enumerate([None, *folders] * 2):
            prompt = torch.randint(97, (3 + 9 * i,), generator=generator).tolist()
            collector = Collector()
            engine.submit(Request(tuple(prompt), 64, name), collector.put)
            asked.append((name, prompt, collector))
        found = [collector.ids for _, _, collector in asked]
    finally:
        engine.close()
    expected = [generated(base, name and folders[name], prompt, 64) for name, prompt, _ in asked]
    assert found == expected


@pytest.mark.parametrize("ids", [[5], [7, 3], list(range(40))])
def test_scores_of_a_prompt_are_those_of_the_model(model: tuple[Any, dict[str, Path]], ids: list[int]) -> None:
    base, _ = model
    engine = EmbeddedEngine(base, ServeSettings(window_ms=0, prefill_tokens=7, cache_tokens=512))
    try:
        collector = Collector()
        engine.submit(Request(tuple(ids), 2, prompt_log_probs=3), collector.put)
        assert len(collector.ids) == 2
    finally:
        engine.close()
    scores = collector.events[0]
    assert isinstance(scores, PromptScores)
    with torch.no_grad():
        log_probs = base(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert scores.tokens[0] is None and scores.top[0] == ()
    assert len(scores.tokens) == len(scores.top) == len(ids)
    for position, (score, top) in enumerate(zip(scores.tokens[1:], scores.top[1:], strict=True)):
        expected = log_probs[position]
        assert score is not None and score.id == ids[position + 1]
        assert score.log_prob == pytest.approx(expected[score.id].item(), abs=1e-5)
        assert [each.id for each in top] == expected.topk(3).indices.tolist()
        assert [each.log_prob for each in top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
