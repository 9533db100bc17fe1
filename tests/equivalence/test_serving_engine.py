"""The embedded engine answers as the model that was trained: whatever else runs, and in whatever order it comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from finetune.config.command_options import ServeSettings
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.adapters.files import save_adapter
from finetune.models.load import load_base
from finetune.serving.engine.engine import EmbeddedEngine
from finetune.serving.request import Event, Finished, PromptScores, Request, Token
from tests.models import random_model, save_tiny_base

VOCABULARY = 97
TOKENS = 64
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 3}},
    "mlp": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
}


class Collector:
    """The events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.first, self.ended = threading.Event(), threading.Event()
        self.handle: Any = None

    def put(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()
        self.first.set()

    @property
    def ids(self) -> list[int]:
        assert self.ended.wait(60)
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def end(self) -> Finished:
        assert self.ended.wait(60)
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def write_adapters(base: Any, folder: Path) -> dict[str, Path]:
    """Save random adapters of a base, which loses its layers to them."""
    folders = {name: folder / name for name in ADAPTERS}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(seed)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name].mkdir()
        save_adapter(wrapped, folders[name])
        base = wrapped.unload()
    return folders


@pytest.fixture(scope="module", params=["qwen2", "llama", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """A base in fp32, or in 4 bit with products in fp32, and folders of adapters."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "nf4":
        save_tiny_base(folder / "base", vocab_size=VOCABULARY, dtype=torch.float32, noise=0.1)
        quant = QuantConfig(compute_dtype="float32")
        base: Any = load_base(ModelConfig(name=str(folder / "base"), dtype="float32"), quant, "cpu")
    else:
        base = random_model(request.param).requires_grad_(False).eval()
    return base, write_adapters(base, folder)


@contextmanager
def serving(base: Any, folders: dict[str, Path] | None = None, **settings: Any) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(base, ServeSettings(**{"window_ms": 20, "cache_tokens": 1024, **settings}))
    try:
        for name, folder in (folders or {}).items():
            engine.load_adapter(name, str(folder))
        yield engine
    finally:
        engine.close()


def ask(engine: EmbeddedEngine, ids: Sequence[int], tokens: int = TOKENS, **settings: Any) -> Collector:
    collector = Collector()
    collector.handle = engine.submit(Request(tuple(ids), tokens, **settings), collector.put)
    return collector


def prompt(number: int, length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(number)).tolist()


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


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_tokens": 7, "max_batch": 4},
        {"prefill_tokens": 64, "max_batch": 8, "cache_tokens": 160},  # too few for all: some make room and come back
    ],
    ids=["chunks", "few blocks"],
)
def test_base_and_adapters_in_one_batch_answer_as_generate(
    model: tuple[Any, dict[str, Path]], settings: dict[str, Any]
) -> None:
    base, folders = model
    asked = [(name, prompt(i, 3 + 9 * i)) for i, name in enumerate([None, *folders] * 2)]
    with serving(base, folders, **settings) as engine:
        collectors = [ask(engine, ids, adapter=name) for name, ids in asked[:5]]
        leaving = ask(engine, prompt(99, 20), adapter="all")
        assert leaving.first.wait(60)
        engine.cancel(leaving.handle)
        collectors += [ask(engine, ids, adapter=name) for name, ids in asked[5:]]
        found = [collector.ids for collector in collectors]
        assert leaving.ids is not None and leaving.end.reason == "cancelled"
        preemptions = engine.load().counters["preemptions"]
    assert (preemptions > 0) == ("cache_tokens" in settings)
    expected = [generated(base, name and folders[name], ids, TOKENS) for name, ids in asked]
    assert found == expected
    assert [collector.end for collector in collectors] == [Finished("length")] * len(asked)


def test_answers_share_what_was_computed_before(model: tuple[Any, dict[str, Path]]) -> None:
    base, folders = model
    start = prompt(0, 40)
    with serving(base, folders) as engine:
        together = [ask(engine, start, 30) for _ in range(3)]
        answer = together[0].ids
        turn = [*start, *answer, *prompt(1, 10)]
        again, adapted = ask(engine, turn, 20), ask(engine, turn, 20, adapter="small")
        found = [again.ids, adapted.ids]
        counters = engine.load().counters
    assert [collector.ids for collector in together] == [answer] * 3
    assert found == [generated(base, None, turn, 20), generated(base, folders["small"], turn, 20)]
    # Whole blocks of 16 tokens; the last token of an answer was never computed.
    assert [collector.end.cached_tokens for collector in (*together, again, adapted)] == [0, 32, 32, 64, 0]
    assert counters["prompt_tokens_shared"] == 128
    assert counters["prompt_tokens_computed"] == 40 + 2 * 8 + 16 + 80


@pytest.mark.parametrize("ids", [[5], [7, 3], list(range(40))])
def test_scores_of_a_prompt_are_those_of_the_model(model: tuple[Any, dict[str, Path]], ids: list[int]) -> None:
    base, _ = model
    with serving(base, prefill_tokens=7) as engine:
        collector = ask(engine, ids, 2, prompt_log_probs=3)
        assert len(collector.ids) == 2
        assert ask(engine, ids, 0, prompt_log_probs=0).ids == []
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
