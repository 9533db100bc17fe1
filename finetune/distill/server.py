"""Query a teacher on an OpenAI-compatible server that returns log-probabilities of prompt tokens (vLLM)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from finetune.distill.endpoint import KEY_VARIABLE, Cancellation, Endpoint, Refusal
from finetune.system.errors import ConfigError, FinetuneError

# Limit of one token's entry: id, log-probability, rank, and escaped text.
_ENTRY_BYTES = 1024
_SLACK_BYTES = 2**22
_LARGEST_ID = 2**31 - 1
# Ctrl+C just before a wait, or in another thread, does not end the wait. Python handles it between waits.
_POLL_SECONDS = 1.0
# Rounding of log-probabilities may take their sum this far beyond 1.
_MASS_SLACK = 1e-3

# (status or None for any, pattern of the server's message, help)
_ADVICE: list[tuple[Sequence[int] | None, str, str]] = [
    (range(300, 400), "", "redirects are not followed; set distill.teacher.url to the target"),
    ([401], "", f"set {KEY_VARIABLE} to the server's key"),
    ([403], "", f"set {KEY_VARIABLE} to a key that may use this model"),
    ([404], "", "set distill.teacher.url to the API's root (ends in /v1), distill.teacher.name to one of its models"),
    (None, r"greater than max allowed|max[_-]logprobs", "start vLLM with --max-logprobs {top} or lower distill.top_k"),
    (
        None,
        r"context length|(maximum )?model length|max[_-]model[_-]len|too long|longer than",
        "start the server with --max-model-len {needed} or more, or lower data.max_length",
    ),
    (None, r"prompt.?logprobs", "use a server that returns prompt_logprobs, such as vLLM"),
    (None, "", "read the server's log"),
]


class TopTokens(NamedTuple):
    """The teacher's most probable tokens at the targets of a document. Its table may exceed the tokenizer."""

    ids: np.ndarray  # [N, K] int64
    log_probs: np.ndarray  # [N, K] fp32, natural log, descending


class LogprobServer:
    """Query a server for the `top` most probable tokens at positions of documents."""

    def __init__(self, url: str, model: str | None, top: int, **settings: Any):
        """Build a client; nothing is sent yet.

        Args:
            url: root of the API, with or without /v1.
            model: None for the only model that the server has, which `check` finds.
            settings: of `Endpoint`.

        Raises:
            ConfigError: the URL is invalid.
        """
        self._endpoint = Endpoint(url, **settings)
        self._model, self._top = model, top

    def check(self) -> None:
        """Check that the server has the model."""
        url = self._endpoint.url
        try:
            answer = self._endpoint.request("/models", None, most_bytes=_SLACK_BYTES)
        except Refusal as refusal:
            raise self._refused(refusal, 0) from None
        match answer:
            case {"data": [*models]}:
                served = [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
            case _:
                raise ConfigError(
                    f"{url}/models: no list of models\nhelp: set distill.teacher.url to the root of an OpenAI API"
                )
        if self._model is None and len(served) == 1:
            self._model = served[0]
        if self._model not in served:
            wanted = f"not {self._model}" if self._model else "and the config names none of them"
            listed = self._endpoint.quote(", ".join(served)) or "nothing"
            raise ConfigError(
                f"{url} serves {listed}, {wanted}\nhelp: set distill.teacher.served_as to a model that it serves"
            )

    def score_many(self, documents: Sequence[tuple[np.ndarray, np.ndarray]], workers: int = 8) -> Iterator[TopTokens]:
        """Yield `score` of each (ids, positions), in order, with `workers` requests in flight.

        Raises: as `score`, at the turn of the failed document. The requests in flight are then cancelled.
        """
        cancellation = Cancellation()
        tasks: SimpleQueue[tuple[Future[TopTokens], np.ndarray, np.ndarray] | None] = SimpleQueue()

        def work() -> None:
            for future, ids, positions in iter(tasks.get, None):
                try:
                    future.set_result(self.score(ids, positions, cancellation))
                except Exception as error:  # noqa: BLE001 - any error is raised where its document is awaited
                    future.set_exception(error)

        # Daemons: a connection that is still being opened cannot be shut, and must not delay the exit of the process.
        threads = [Thread(target=work, name="teacher", daemon=True) for _ in range(workers)]
        awaited: deque[Future[TopTokens]] = deque()
        try:
            for thread in threads:
                thread.start()
            for ids, positions in documents:
                awaited.append(Future())
                tasks.put((awaited[-1], ids, positions))
                # Twice the workers, so that one slow answer leaves no other worker idle.
                if len(awaited) == 2 * workers:
                    yield _answer(awaited.popleft())
            while awaited:
                yield _answer(awaited.popleft())
        finally:
            cancellation.cancel()
            for _ in threads:
                tasks.put(None)

    def score(self, ids: np.ndarray, positions: np.ndarray, cancellation: Cancellation | None = None) -> TopTokens:
        """Return the most probable tokens after each position of one document.

        Args:
            ids: [T], up to and including the last predicted token.
            positions: [N], below T - 1.
        """
        if len(positions) == 0:
            return TopTokens(np.empty((0, self._top), np.int64), np.empty((0, self._top), np.float32))
        if positions.min() < 0 or positions.max() + 1 >= len(ids):
            raise ValueError(f"positions {positions.min()} to {positions.max()} of a document of {len(ids)} tokens")
        prompt = ids.tolist()
        # A completion of one token, because older servers refuse zero.
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        try:
            answer = self._endpoint.request(
                "/completions",
                {**body, "prompt_logprobs": self._top},
                most_bytes=_SLACK_BYTES + len(prompt) * (self._top + 1) * _ENTRY_BYTES,
                cancellation=cancellation,
                # Of a token's entry, the log-probability alone takes a fifth of the memory and parses faster.
                reduce=lambda entry: entry.get("logprob", entry),
            )
        except Refusal as refusal:
            raise self._refused(refusal, len(prompt)) from None
        entries = self._entries(answer, prompt)
        return self._top_tokens([entries[t + 1] for t in positions.tolist()])

    def _entries(self, answer: Any, prompt: list[int]) -> list[dict[str, Any]]:
        """Return the entries of the prompt's tokens, and check that they belong to this prompt."""
        match answer:
            case {"choices": [{"prompt_logprobs": [*entries]}]}:
                pass
            case _:
                raise ConfigError(
                    f"{self._endpoint.url} answers without prompt_logprobs\n"
                    "help: use a server that returns them, such as vLLM"
                )
        if len(entries) != len(prompt):
            raise self._wrong(f"{len(entries)} positions for a prompt of {len(prompt)} tokens")
        for place, (token, entry) in enumerate(zip(prompt, entries, strict=True)):
            # The first token has no prediction.
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
        """Return (-log-probability, id) of the `top` most probable tokens; an entry also has the prompt's own token."""
        found = []
        for token, number in entry.items():
            # JSON has no infinity: null is a probability of 0.
            number = -np.inf if number is None else number
            if not isinstance(number, float) or number != number:
                raise self._wrong(f"a log-probability that is not a number: {self._endpoint.quote(repr(number))}")
            if not (token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) <= _LARGEST_ID):
                raise self._wrong(f"a token that is not an id: {self._endpoint.quote(repr(token))}")
            found.append((-number, int(token)))
        if len(found) < self._top:
            raise self._wrong(f"{len(found)} tokens at a position, expected {self._top}")
        return sorted(found)[: self._top]

    def _wrong(self, what: str) -> FinetuneError:
        return FinetuneError(
            f"{self._endpoint.url} ({self._model}): invalid prompt_logprobs, found {what}\n"
            "help: check the server's version and flags; a router in between must not change token ids"
        )

    def _refused(self, refusal: Refusal, prompt_tokens: int) -> ConfigError:
        message = str(refusal)
        advice = next(
            advice
            for status, pattern, advice in _ADVICE
            if (status is None or refusal.status in status) and re.search(pattern, message, re.IGNORECASE)
        ).format(top=self._top, needed=prompt_tokens + 1)
        where = f"{self._endpoint.url} ({self._model})"
        return ConfigError(f"{where} refuses: HTTP {refusal.status}: {message}\nhelp: {advice}")


def _answer(awaited: Future[TopTokens]) -> TopTokens:
    """Wait for a result without delaying Ctrl+C."""
    while not awaited.done():
        wait([awaited], timeout=_POLL_SECONDS)
    return awaited.result()
