"""The embedded engine survives its requests: errors, clients that go, adapters that come and go, and its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from finetune.config.command_options import ServeOptions, ServeSettings
from finetune.config.compose import load_config
from finetune.models.adapters.files import save_adapter
from finetune.ops.packed import can_pack
from finetune.serving.engine.engine import EmbeddedEngine, build_engine, cache_blocks, context_of
from finetune.serving.request import Event, Finished, Request, Token
from finetune.system.errors import ConfigError, InputError
from finetune.system.resources import packaged
from tests.models import random_qwen2, save_tiny_base

IDS = tuple(range(20))


class Client:
    """Submits one request and keeps its events. hold: the engine stops at the first event until `go` is set."""

    def __init__(self, engine: EmbeddedEngine, request: Request, hold: bool = False):
        self.events: list[Event] = []
        self.first, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        if not hold:
            self.go.set()
        self.handle = engine.submit(request, self._put)

    def _put(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        assert self.go.wait(60)
        if isinstance(event, Finished):
            self.ended.set()

    def end(self) -> Finished:
        assert self.ended.wait(60)
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]

    def ids(self) -> list[int]:
        self.end()
        return [event.id for event in self.events if isinstance(event, Token)]


@contextmanager
def serving(**settings: Any) -> Iterator[EmbeddedEngine]:
    base = random_qwen2(max_position_embeddings=256).requires_grad_(False).eval()
    engine = EmbeddedEngine(base, ServeSettings(**{"window_ms": 0, "cache_tokens": 1024, **settings}))
    try:
        yield engine
    finally:
        engine.close()


def write_adapter(folder: Path, seed: int = 1, base: dict[str, Any] | None = None, **settings: Any) -> str:
    """Save a random adapter of the base that is served, or of one with other sizes."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(random_qwen2(**(base or {})), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    save_adapter(model, folder)
    return str(folder)


def test_an_error_in_a_pass_ends_its_answers_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as engine:
        expected = Client(engine, Request(IDS, 3)).ids()
        run = engine._decoder.run
        monkeypatch.setattr(engine._decoder, "run", lambda parts: run([*parts, None]))
        end = Client(engine, Request(IDS, 3)).end()
        assert end.reason == "error" and "AttributeError" in end.error
        monkeypatch.setattr(engine._decoder, "run", run)
        assert Client(engine, Request(IDS, 3)).ids() == expected
        assert engine.load().cache_tokens_used == 0


def test_a_client_that_fails_ends_its_own_answer_alone() -> None:
    with serving() as engine:
        first = Client(engine, Request(IDS, 30), hold=True)
        assert first.first.wait(60)
        gone = threading.Event()

        def put(event: Event) -> None:
            gone.set()
            raise RuntimeError("the event loop is closed")

        engine.submit(Request(IDS, 30), put)
        first.go.set()
        assert len(first.ids()) == 30 and gone.is_set()
        assert engine.load().running == 0


def test_cancelled_answers_end_at_once_and_free_their_blocks() -> None:
    with serving(max_batch=1) as engine:
        running = Client(engine, Request(IDS, 200), hold=True)
        assert running.first.wait(60)
        waiting = Client(engine, Request(IDS, 200))
        engine.cancel(running.handle)
        engine.cancel(waiting.handle)
        running.go.set()
        assert (running.end(), waiting.end()) == (Finished("cancelled"), Finished("cancelled"))
        assert len(running.ids()) < 5 and waiting.ids() == []
        engine.cancel(running.handle)
        assert engine.load().cache_tokens_used == engine.load().running == 0


def test_closing_cancels_all_and_refuses_more() -> None:
    with serving(max_batch=1) as engine:
        clients = [Client(engine, Request(IDS, 200), hold=i == 0) for i in range(3)]
        assert clients[0].first.wait(60)
        closing = threading.Thread(target=engine.close)
        closing.start()
        clients[0].go.set()
        closing.join(60)
        assert {client.end().reason for client in clients} == {"cancelled"}
        with pytest.raises(InputError, match="closed"):
            engine.submit(Request(IDS, 1), lambda event: None)


def test_the_first_request_of_an_idle_engine_waits_for_a_full_batch() -> None:
    with serving(window_ms=60_000, max_batch=3) as engine:
        clients = [Client(engine, Request(IDS, 2)) for _ in range(3)]
        assert [len(client.ids()) for client in clients] == [2, 2, 2]
        assert engine.load().counters["steps"] <= 3  # one more where two wait for the blocks of the first


def test_stop_ids_end_an_answer_without_their_token() -> None:
    with serving() as engine:
        ids = Client(engine, Request(IDS, 10)).ids()
        client = Client(engine, Request(IDS, 10, stop_ids=frozenset({ids[4]})))
        assert client.ids() == ids[: ids.index(ids[4])]
        assert client.end().reason == "stop"


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (Request((), 1), "ids"),
        (Request((97,), 1), "ids"),
        (Request((-1,), 1), "ids"),
        (Request(IDS, 240), "at most 256"),
        (Request(IDS, 1, adapter="b"), "'b' is not loaded"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(request_: Request, problem: str) -> None:
    with serving() as engine, pytest.raises(InputError, match=problem):
        engine.submit(request_, lambda event: None)


def test_a_request_beyond_the_cache_is_refused() -> None:
    with serving(cache_tokens=32) as engine, pytest.raises(InputError, match="at most 32"):
        engine.submit(Request(IDS, 14), lambda event: None)


def test_adapters_come_and_go_while_their_answers_run(tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab"))
    with serving() as engine:
        engine.load_adapter("a", first)
        expected = Client(engine, Request(IDS, 40, adapter="a")).ids()
        running = Client(engine, Request(IDS, 40, adapter="a"), hold=True)
        assert running.first.wait(60)
        unloading = threading.Thread(target=lambda: (engine.unload_adapter("a"), engine.load_adapter("a", second)))
        unloading.start()
        running.go.set()
        unloading.join(60)
        assert running.ids() == expected
        assert Client(engine, Request(IDS, 40, adapter="a")).ids() != expected
        engine.unload_adapter("a")
        with pytest.raises(InputError, match="'a' is not loaded"):
            engine.unload_adapter("a")


def test_the_least_recently_used_adapter_leaves(tmp_path: Path) -> None:
    folders = {name: write_adapter(tmp_path / name) for name in "abc"}
    with serving(max_adapters=2) as engine:
        for name in "ab":
            engine.load_adapter(name, folders[name])
        Client(engine, Request(IDS, 1, adapter="a")).end()
        engine.load_adapter("c", folders["c"])
        assert set(engine.adapters()) == {"a", "c"}


def test_every_reason_against_an_adapter_is_named(tmp_path: Path) -> None:
    dora = write_adapter(tmp_path / "dora", use_dora=True)
    saved = write_adapter(tmp_path / "saved", modules_to_save=["norm"])
    head = write_adapter(tmp_path / "head", target_modules=["q_proj", "lm_head"])
    deeper = write_adapter(tmp_path / "deeper", base={"num_hidden_layers": 3, "hidden_size": 32})
    with serving() as engine:
        for folder, problems in (
            (dora, ["use_dora", "finetune merge"]),
            (saved, ["model.norm.weight", "finetune merge"]),
            (head, ["lm_head", "finetune merge"]),
            (deeper, ["layers.2", "layers.0.mlp.down_proj", "[32, 128]", "[64, 128]"]),
            (str(tmp_path), ["not an adapter"]),
        ):
            with pytest.raises(ConfigError) as refused:
                engine.load_adapter("a", folder)
            assert [problem for problem in problems if problem not in str(refused.value)] == []
        assert engine.adapters() == []


def test_an_engine_is_built_with_all_of_its_adapters_or_not_at_all(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 256, "vocab_size": 320}
    overrides = [f"model.name={save_tiny_base(tmp_path / 'base')}", "quant.cache=false"]
    config = load_config(str(packaged("configs") / "lora.yaml"), overrides, needs_data=False)
    good = {name: write_adapter(tmp_path / name, base=sizes) for name in "ab"}
    bad = {name: write_adapter(tmp_path / name, use_dora=True, base=sizes) for name in "cd"}
    settings = ServeSettings(window_ms=0, cache_tokens=64)
    with pytest.raises(ConfigError, match=r"(?s)adapters\.c=.*adapters\.d="):
        build_engine(config, ServeOptions(adapters={**good, **bad}, serve=settings))
    with pytest.raises(ConfigError, match=r"serve\.max_adapters"):
        build_engine(config, ServeOptions(adapters=good, serve=ServeSettings(max_adapters=1)))
    engine = build_engine(config, ServeOptions(adapters=good, serve=settings))
    try:
        assert len(Client(engine, Request(IDS, 3, adapter="b")).ids()) == 3
        # In 16 bit beside the 4-bit weights, and nowhere else.
        assert all("resident_weight" not in vars(module) for module in engine.base.modules()) or not can_pack(
            engine.base.lm_head.weight
        )
    finally:
        engine.close()


def test_sizes_of_the_cache_and_the_context() -> None:
    base = random_qwen2(max_position_embeddings=256)
    assert cache_blocks(base, ServeSettings(cache_tokens=100), 256) == 7
    assert cache_blocks(base, ServeSettings(max_batch=3), 256) == 48
    assert context_of(base, ServeSettings()) == 256
    assert context_of(base, ServeSettings(context_tokens=100)) == 100
    with pytest.raises(ConfigError, match=r"serve\.context_tokens"):
        context_of(base, ServeSettings(context_tokens=300))
