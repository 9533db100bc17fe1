"""A teacher behind an OpenAI-compatible endpoint that returns log-probabilities of the prompt's tokens (vLLM)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from finetune.distill.endpoint import KEY_VARIABLE, Endpoint, Halt, Refusal
from finetune.system.console import Log
from finetune.system.errors import ConfigError, FinetuneError

# What a token's entry takes at most: its id, log-probability and rank, and its text, escaped.
_ENTRY_BYTES = 1024
_SLACK_BYTES = 2**22
_LARGEST_ID = 2**31 - 1
# A signal that arrives just before a wait begins, or in another thread, does not end it: Python looks between waits.
_LOOK_SECONDS = 1.0
# Rounding of log-probabilities may take their sum this far beyond 1.
_MASS_SLACK = 1e-3

# (status or None, a pattern of the server's words, what to do)
_ADVICE: list[tuple[int | None, str, str]] = [
    (401, "", f"set {KEY_VARIABLE} to the server's key"),
    (403, "", f"set {KEY_VARIABLE} to a key that may use this model"),
    (404, "", "distill.teacher.url is the API's root (ends in /v1), distill.teacher.name a model that it serves"),
    (None, r"greater than max allowed|max[_-]logprobs", "start vLLM with --max-logprobs {top} or lower distill.top_k"),
    (
        None,
        r"context length|(maximum )?model length|max[_-]model[_-]len|too long|longer than",
        "start the server with --max-model-len {needed} or more, or lower data.max_length",
    ),
    (None, r"prompt.?logprobs", "the server must be one that returns prompt_logprobs, such as vLLM"),
    (None, "", "see the server's log"),
]


@dataclass(frozen=True)
class TopTokens:
    """The teacher's most probable tokens at a document's targets.

    ids [n, K] int64, log_probs [n, K] fp32 descending (natural log). Ids are of the teacher's rows, which may be more
    than the tokenizer has.
    """

    ids: np.ndarray
    log_probs: np.ndarray


class LogprobServer:
    """Asks a server for the `top` most probable tokens at positions of documents.

    A request may take `timeout_seconds` and is made `attempts` times; between two lie `backoff_seconds`, doubled each
    time, or what the server asks for. say: told of each failed attempt, from several threads.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        top: int,
        *,
        timeout_seconds: float = 60.0,
        attempts: int = 6,
        backoff_seconds: float = 1.0,
        log: Log = lambda line: None,
    ):
        """url: with or without its last part, /v1. model: None is the only one that is served, which `check` finds.

        Raises: ConfigError if the url can be no address.
        """
        self._endpoint = Endpoint(
            url, timeout_seconds=timeout_seconds, attempts=attempts, backoff_seconds=backoff_seconds, log=log
        )
        self._model, self._top = model, top

    def check(self) -> None:
        """Ask what the server serves.

        Raises: ConfigError if it serves no `model`, listing what it does; FinetuneError if it does not answer.
        """
        url = self._endpoint.url
        try:
            answer = self._endpoint.ask("/models", None, _SLACK_BYTES, Halt())
        except Refusal as refusal:
            raise self._refused(refusal, 0) from None
        match answer:
            case {"data": [*models]}:
                served = [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
            case _:
                raise ConfigError(f"{url}/models lists no models; is distill.teacher.url the root of an OpenAI API?")
        if self._model is None and len(served) == 1:
            self._model = served[0]
        if self._model not in served:
            wanted = f"not {self._model}" if self._model else "and which of them is not said"
            listed = self._endpoint.quote(", ".join(served)) or "nothing"
            raise ConfigError(f"{url} serves {listed}, {wanted}; set distill.teacher.served_as to what it serves")

    def score(self, ids: np.ndarray, positions: np.ndarray) -> TopTokens:
        """The most probable tokens after positions [n] of one document.

        ids [T]: up to and including the last token that is predicted, so positions are below T - 1.
        Raises: ConfigError if the server refuses; FinetuneError if it does not answer, or not what was asked.
        """
        return self._score(ids, positions, Halt())

    def score_many(self, documents: Sequence[tuple[np.ndarray, np.ndarray]], workers: int = 8) -> Iterator[TopTokens]:
        """`score` of each (ids, positions), in order, with `workers` requests in flight.

        Raises: what `score` raises, where the failed document's turn is; the requests in flight are then dropped.
        """
        halt = Halt()
        tasks: SimpleQueue[tuple[Future[TopTokens], np.ndarray, np.ndarray] | None] = SimpleQueue()

        def work() -> None:
            for future, ids, positions in iter(tasks.get, None):
                try:
                    future.set_result(self._score(ids, positions, halt))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where its document is awaited
                    future.set_exception(error)

        # Daemons: a connection that is still being made cannot be shut, and must not hold the exit of the process.
        threads = [Thread(target=work, name="teacher", daemon=True) for _ in range(workers)]
        awaited: deque[Future[TopTokens]] = deque()
        try:
            for thread in threads:
                thread.start()
            for ids, positions in documents:
                awaited.append(Future())
                tasks.put((awaited[-1], ids, positions))
                # Twice the workers: an answer that is slow to come leaves the others something to do.
                if len(awaited) == 2 * workers:
                    yield _answer(awaited.popleft())
            while awaited:
                yield _answer(awaited.popleft())
        finally:
            halt.now()
            for _ in threads:
                tasks.put(None)

    def _score(self, ids: np.ndarray, positions: np.ndarray, halt: Halt) -> TopTokens:
        if len(positions) == 0:
            return TopTokens(np.empty((0, self._top), np.int64), np.empty((0, self._top), np.float32))
        if positions.min() < 0 or positions.max() + 1 >= len(ids):
            raise ValueError(f"positions {positions.min()} to {positions.max()} of a document of {len(ids)} tokens")
        prompt = ids.tolist()
        # A completion of one token: older servers refuse none.
        question = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        question["prompt_logprobs"] = self._top
        most_bytes = _SLACK_BYTES + len(prompt) * (self._top + 1) * _ENTRY_BYTES
        try:
            answer = self._endpoint.ask("/completions", question, most_bytes, halt, reduce=_log_prob)
        except Refusal as refusal:
            raise self._refused(refusal, len(prompt)) from None
        entries = self._entries(answer, prompt)
        return self._top_tokens([entries[t + 1] for t in positions.tolist()])

    def _entries(self, answer: Any, prompt: list[int]) -> list[dict[str, Any]]:
        """What the answer says about each of the prompt's tokens, of which it must be."""
        match answer:
            case {"choices": [{"prompt_logprobs": [*entries]}]}:
                pass
            case _:
                raise ConfigError(
                    f"{self._endpoint.url} answers without prompt_logprobs; the server must be one that returns them, "
                    "such as vLLM"
                )
        if len(entries) != len(prompt):
            raise self._wrong(f"{len(entries)} positions for a prompt of {len(prompt)} tokens")
        for place, (token, entry) in enumerate(zip(prompt, entries, strict=True)):
            # Nothing comes before the first token, so nothing is said about it.
            if place and not (isinstance(entry, dict) and str(token) in entry):
                raise self._wrong(f"nothing about token {token} at position {place}, where the prompt has it")
        return entries

    def _top_tokens(self, entries: list[dict[str, Any]]) -> TopTokens:
        rows = [self._top_of(entry) for entry in entries]
        ids = np.array([[token for _, token in row] for row in rows], dtype=np.int64)
        exact = np.array([[-negated for negated, _ in row] for row in rows])
        with np.errstate(over="ignore"):
            log_probs, mass = exact.astype(np.float32), np.exp(exact).sum(axis=1)
        if not np.isfinite(log_probs).all():
            raise self._wrong("a log-probability that is not finite")
        if mass.max() > 1 + _MASS_SLACK:
            raise self._wrong(f"probabilities that sum to {mass.max():.4g}; vLLM needs --logprobs-mode raw_logprobs")
        if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
            raise self._wrong("a token twice at one position")
        return TopTokens(ids, log_probs)

    def _top_of(self, entry: dict[str, Any]) -> list[tuple[float, int]]:
        """(-log-probability, id) of the `top` most probable; an entry has the prompt's own token beside them."""
        found = []
        for token, number in entry.items():
            # JSON has no infinity: null is a probability of 0.
            number = -np.inf if number is None else number
            if not isinstance(number, float) or number != number:
                raise self._wrong(f"a log-probability that is no number: {self._endpoint.quote(repr(number))}")
            if not (token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) <= _LARGEST_ID):
                raise self._wrong(f"a token that is no id: {self._endpoint.quote(repr(token))}")
            found.append((-number, int(token)))
        if len(found) < self._top:
            raise self._wrong(f"{len(found)} tokens at a position, asked for {self._top}")
        return sorted(found)[: self._top]

    def _wrong(self, what: str) -> FinetuneError:
        return FinetuneError(
            f"{self._endpoint.url} ({self._model}) answered {what}; this is not what vLLM returns for prompt_logprobs: "
            "see its version and flags, and what stands between (a router must pass token ids on as they are)"
        )

    def _refused(self, refusal: Refusal, prompt_tokens: int) -> ConfigError:
        where = f"{self._endpoint.url} ({self._model})"
        if 300 <= refusal.status < 400:
            return ConfigError(
                f"{where} answers with a redirect (HTTP {refusal.status}), which is not followed; "
                "set distill.teacher.url to the address that it leads to"
            )
        words = str(refusal)
        advice = next(
            advice
            for status, pattern, advice in _ADVICE
            if status in (None, refusal.status) and re.search(pattern, words, re.IGNORECASE)
        ).format(top=self._top, needed=prompt_tokens + 1)
        return ConfigError(f"{where} refuses: HTTP {refusal.status}: {words}; {advice}")


def _answer(awaited: Future[TopTokens]) -> TopTokens:
    """The result once it is there, however long that takes; Ctrl+C is seen meanwhile."""
    while not awaited.done():
        wait([awaited], timeout=_LOOK_SECONDS)
    return awaited.result()


def _log_prob(said: dict[str, Any]) -> Any:
    """A token's log-probability in place of what else is said about it: a fifth of the memory, parsed faster."""
    return said.get("logprob", said)
