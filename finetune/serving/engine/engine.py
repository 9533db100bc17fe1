"""The embedded engine: one thread that answers all requests over a base in memory, with any of its adapters.

transformers' continuous batching runs one adapter at a time and has no LoRA code, so this package has its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.config.command_options import ServeSettings
from finetune.models.decoder import text_config
from finetune.serving.engine.adapters import LoadedAdapter, load_lora
from finetune.serving.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from finetune.serving.engine.forward import RaggedDecoder, context_limit
from finetune.serving.engine.rows import Part
from finetune.serving.engine.sampling import BatchSampler
from finetune.serving.engine.scheduler import Answer, Scheduler, Span
from finetune.serving.request import Event, Finished, FinishReason, Load, PromptScores, Put, Request, Token, TokenScore
from finetune.system.accelerator import free_bytes_of, table_key
from finetune.system.errors import ConfigError, InputError

if TYPE_CHECKING:
    from finetune.config.command_options import ServeOptions
    from finetune.config.schema import RunConfig
    from finetune.serving.engine.grammar import GrammarCompiler

_log = logging.getLogger(__name__)
# Share of the free memory for keys and values; a GPU shares its memory with nobody.
_CACHE_SHARE = {"cpu": 0.5, "gpu": 0.8}
# Logits of prompts at a time.
_SCORED_VALUES = 2**23
_COUNTERS = ("steps", "tokens_written", "prompt_tokens_computed", "prompt_tokens_shared", "preemptions")


class EmbeddedEngine:
    """An `Engine` (serving/request.py) over a loaded base. One thread computes; all other methods only note requests.

    base: from `load_base`. grammars: None refuses requests with a grammar. packed: see `RaggedDecoder`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        settings: ServeSettings,
        *,
        grammars: GrammarCompiler | None = None,
        packed: bool = False,
    ):
        self.base, self.settings = base, settings
        self.context_tokens = context_of(base, settings)
        pool = BlockPool(cache_blocks(base, settings, self.context_tokens))
        self._decoder = RaggedDecoder(base, pool.blocks, packed=packed)
        self._sampler = BatchSampler(self._decoder.vocabulary, grammars)
        self._scheduler = Scheduler(pool, max_batch=settings.max_batch, prefill_tokens=settings.prefill_tokens)
        self._counters: Counter[str] = Counter()
        self._adapters: dict[str, LoadedAdapter] = {}  # the least recently used one first
        self._number = 0
        self._events: list[tuple[Answer, Event]] = []  # of the thread, in the order to put them
        # Guards all above but the decoder and the events, which only the thread uses.
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, put: Put) -> Answer:
        """Start an answer; see `Engine`.

        Raises:
            InputError: the adapter is not loaded, or the request does not fit.
        """
        if not request.ids or not 0 <= min(request.ids) <= max(request.ids) < self._decoder.vocabulary:
            raise InputError(f"a prompt has one or more ids, from 0 to {self._decoder.vocabulary - 1}")
        tokens = len(request.ids) + request.max_tokens
        if tokens > self.context_tokens or not self._scheduler.fits(request):
            most = min(self.context_tokens, self._scheduler.pool.blocks * BLOCK_TOKENS)
            raise InputError(f"prompt and answer have {tokens} tokens; at most {most} fit")
        row = self._sampler.start(request)
        with self._changed:
            if self._closing:
                raise InputError("the engine is closed")
            adapter = None if request.adapter is None else self._used(request.adapter)
            self._number += 1
            answer = Answer(request, put, self._number, adapter, adapter.origin if adapter else b"", row)
            self._scheduler.add(answer)
            self._changed.notify()
        return answer

    def cancel(self, handle: Any) -> None:
        """End an answer; see `Engine`."""
        with self._changed:
            handle.cancelled = True
            self._changed.notify()

    def load(self) -> Load:
        """Return what the engine does now. counters: since its start, in tokens, passes and answers."""
        with self._changed:
            scheduler = self._scheduler
            pool = scheduler.pool
            counters = dict.fromkeys(_COUNTERS, 0.0)
            return Load(
                len(scheduler.running),
                len(scheduler.waiting),
                pool.blocks * BLOCK_TOKENS,
                (pool.blocks - pool.available) * BLOCK_TOKENS,
                counters | self._counters | scheduler.counters,
            )

    def load_adapter(self, name: str, folder: str) -> None:
        """Read an adapter; see `Engine`. With `max_adapters` in memory, the least recently used idle one is forgotten.

        Raises:
            ConfigError: it does not fit the base, its kind cannot be served, or all adapters in memory are in use.
            IntegrityError: it is corrupt.
        """
        adapter = load_lora(name, Path(folder), self.base)
        with self._changed:
            others = [other for other in self._adapters if other != name]
            if len(others) >= self.settings.max_adapters:
                used = {answer.adapter for answer in self._unfinished()}
                idle = next((other for other in others if self._adapters[other] not in used), None)
                if idle is None:
                    raise ConfigError(
                        f"adapters.{name}: serve.max_adapters={self.settings.max_adapters} adapters are in use"
                    )
                del self._adapters[idle]
            self._adapters.pop(name, None)
            self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; see `Engine`. Raises: InputError if it is not loaded."""
        with self._changed:
            self._used(name)
            del self._adapters[name]

    def adapters(self) -> list[str]:
        """Return the names of the adapters in memory."""
        with self._changed:
            return list(self._adapters)

    def close(self) -> None:
        """End every answer as cancelled and free the memory; see `Engine`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        with self._changed:
            self._adapters.clear()
        self._decoder.close()

    def _used(self, name: str) -> LoadedAdapter:
        """Return a loaded adapter and note its use."""
        if name not in self._adapters:
            raise InputError(f"the adapter {name!r} is not loaded")
        self._adapters[name] = adapter = self._adapters.pop(name)
        return adapter

    def _unfinished(self) -> list[Answer]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    @torch.inference_mode()
    def _work(self) -> None:
        """Run pass after pass until `close`."""
        while True:
            with self._changed:
                self._wait()
                for answer in self._unfinished():
                    if answer.cancelled or self._closing:
                        self._end(answer, "cancelled")
                closing = self._closing
                spans = self._scheduler.plan()
                taken, self._scheduler.pool.taken = self._scheduler.pool.taken, []
            try:
                if taken:
                    self._decoder.clear(taken)
                if spans:
                    self._step(spans)
            except Exception as error:  # noqa: BLE001 - the thread serves all other requests
                _log.exception("a pass over %d answers failed", len(spans))
                with self._changed:
                    for span in spans:
                        if not span.answer.ended:
                            self._end(span.answer, "error", f"{type(error).__name__}: {error}")
            self._deliver()
            if closing:
                return

    def _wait(self) -> None:
        """Wait for a request; the first one of an idle engine waits for others."""
        scheduler = self._scheduler
        if scheduler.running or scheduler.waiting or self._closing:
            return
        self._changed.wait_for(lambda: self._closing or scheduler.waiting)
        until = time.monotonic() + self.settings.window_ms / 1000

        def full() -> bool:
            return self._closing or len(scheduler.waiting) >= self.settings.max_batch

        while not full() and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _end(self, answer: Answer, reason: FinishReason, error: str = "") -> None:
        answer.ended = True
        self._scheduler.remove(answer)
        self._events.append((answer, Finished(reason, answer.shared or 0, error)))

    def _deliver(self) -> None:
        """Put the events of a pass, without the lock: other threads do not wait for it."""
        for answer, event in self._events:
            try:
                answer.put(event)
            except Exception:  # noqa: BLE001 - a client that is gone must not end the answers of others
                _log.exception("an event could not be delivered")
                answer.cancelled = True
        self._events.clear()

    def _step(self, spans: list[Span]) -> None:
        """Compute the tokens of a plan and note the events of their answers."""
        spans.sort(key=lambda span: span.answer.origin)  # rows of one adapter side by side
        parts = [Part(each.tokens[start:stop], start, each.blocks, each.adapter) for each, start, stop in spans]
        hidden_TD, firsts = self._decoder.run(parts)
        for span, first in zip(spans, firsts, strict=True):
            if span.answer.scores is not None:
                self._score_prompt(span, hidden_TD[first : first + span.stop - span.start])
        ready = [(span, first) for span, first in zip(spans, firsts, strict=True) if span.writes]
        writing = [span.answer for span, _ in ready if span.answer.request.max_tokens]
        chosen: list[Token | Finished] = []
        if writing:
            last = [first + span.stop - span.start - 1 for span, first in ready if span.answer.request.max_tokens]
            hidden_ND = hidden_TD.index_select(0, torch.tensor(last, device=hidden_TD.device))
            chosen = self._sampler.choose(self._decoder.logits(hidden_ND), [answer.row for answer in writing])
        with self._changed:
            self._counters["steps"] += 1
            self._scheduler.done(spans)
            for answer, event in zip(writing, chosen, strict=True):
                self._write(answer, event)
            for span, _ in ready:
                if not span.answer.request.max_tokens:
                    self._end(span.answer, "length")

    def _write(self, answer: Answer, event: Token | Finished) -> None:
        """Add the next token of an answer, or end it."""
        request = answer.request
        if isinstance(event, Finished):
            self._end(answer, event.reason, event.error)
        elif event.id in request.stop_ids:
            self._end(answer, "stop")
        else:
            answer.tokens.append(event.id)
            self._counters["tokens_written"] += 1
            self._events.append((answer, event))
            if answer.written == request.max_tokens:
                self._end(answer, "length")

    def _score_prompt(self, span: Span, hidden_CD: Tensor) -> None:
        """Add the log-probabilities of the tokens of a prompt; after the last one, note them. hidden_CD: of all."""
        answer, start, stop = span
        ids, scores = answer.request.ids, answer.scores
        assert scores is not None
        most = min(answer.request.prompt_log_probs or 0, self._decoder.vocabulary)
        hidden_ND = hidden_CD[: len(ids) - 1 - start]  # each scores the token after its own
        targets = torch.tensor(ids[start + 1 : stop + 1], device=hidden_CD.device)
        size = max(1, _SCORED_VALUES // self._decoder.vocabulary)
        for some_ND, some in zip(hidden_ND.split(size), targets.split(size), strict=True):
            log_probs_NV = self._decoder.logits(some_ND).float().log_softmax(-1)
            found = log_probs_NV.gather(1, some[:, None]).squeeze(1).tolist()
            top, top_ids = (values.tolist() for values in log_probs_NV.topk(most))
            for target, score, best, best_ids in zip(some.tolist(), found, top, top_ids, strict=True):
                scores.append((TokenScore(target, score), tuple(map(TokenScore, best_ids, best))))
        if len(scores) == len(ids) - 1:
            answer.scores = None
            tokens, tops = [score for score, _ in scores], [top for _, top in scores]
            self._events.append((answer, PromptScores([None, *tokens], [(), *tops])))


def context_of(base: PreTrainedModel, settings: ServeSettings) -> int:
    """Return the longest prompt with its answer.

    Raises:
        ConfigError: serve.context_tokens is more.
    """
    most = context_limit(base)
    if settings.context_tokens is not None and settings.context_tokens > most:
        raise ConfigError(f"serve.context_tokens: the model has {most}, found {settings.context_tokens}")
    return settings.context_tokens or most


def cache_blocks(base: PreTrainedModel, settings: ServeSettings, context_tokens: int) -> int:
    """Return the number of blocks of keys and values."""
    config = text_config(base)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * width * base.dtype.itemsize
    if settings.cache_tokens is not None:
        return blocks_for(settings.cache_tokens)
    room = int(free_bytes_of(base.device) * _CACHE_SHARE[table_key(base.device)])
    return max(1, min(room // token_bytes, settings.max_batch * context_tokens) // BLOCK_TOKENS)


def build_engine(
    config: RunConfig, options: ServeOptions, *, grammars: GrammarCompiler | None = None
) -> EmbeddedEngine:
    """Load the base of a config and start an engine with the adapters of the options.

    grammars: for requests with a JSON schema.

    Raises:
        ConfigError: lists the adapters that cannot be served; or the base cannot.
    """
    from finetune.evaluation.generation import dequantize_once
    from finetune.models.load import load_base

    most = options.serve.max_adapters
    if len(options.adapters) > most:
        raise ConfigError(f"serve.max_adapters: found {most}, and {len(options.adapters)} adapters to serve")
    base = load_base(config.model, config.quant)
    dequantize_once(base, config.quant)
    engine = EmbeddedEngine(base, options.serve, grammars=grammars, packed=True)
    try:
        problems = []
        for name, folder in options.adapters.items():
            try:
                engine.load_adapter(name, folder)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
    except BaseException:
        engine.close()
        raise
    return engine
