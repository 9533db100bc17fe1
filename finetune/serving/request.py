"""What an engine is asked and what it answers. This module imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen.

    temperature: 0 chooses the most probable token. top_k: 0 for all tokens.
    seed: decides the answer together with the prompt and these settings, whatever else is in the batch; None: a random
    one for each request.
    presence_penalty, frequency_penalty: as OpenAI defines them, on the tokens of the answer.
    repetition_penalty: as transformers defines it, on prompt and answer.
    grammar: JSON schema (text) that the answer obeys; None: free text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    grammar: str | None = None

    @property
    def deterministic(self) -> bool:
        """Whether the same request has the same answer again."""
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to write.

    ids: of the prompt, at least one. adapter: its name; None: the base alone. max_tokens: of the answer; 0 only scores
    the prompt. stop_ids: the answer ends with one of these. log_probs: the most probable tokens to report at each token
    of the answer; None: no log-probabilities. prompt_log_probs: likewise at each token of the prompt.
    """

    ids: tuple[int, ...]
    max_tokens: int
    adapter: str | None = None
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()
    log_probs: int | None = None
    prompt_log_probs: int | None = None


class TokenScore(NamedTuple):
    """A token with its natural log-probability under the model, before temperature and penalties."""

    id: int
    log_prob: float


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of an answer. log_prob: None if not asked for. top: the most probable tokens, best first."""

    id: int
    log_prob: float | None = None
    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The scores of a prompt, before its first answered token.

    tokens: one for each token of the prompt, None for the first. top: the most probable tokens at each, best first.
    """

    tokens: list[TokenScore | None]
    top: list[tuple[TokenScore, ...]]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. cached_tokens: of the prompt, not computed again. error: of a "deadline" or an "error"."""

    reason: FinishReason
    cached_tokens: int = 0
    error: str = ""


Event = Token | PromptScores | Finished
# Called from the engine's thread with each event of a request; the last one is Finished. It must return at once.
Put = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine does now. Tokens of its cache: used ones belong to running answers."""

    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_tokens_used: int = 0
    counters: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Writes answers, many at once. Every method may be called from any thread and returns soon, unless it says so."""

    context_tokens: int  # most tokens of prompt and answer together

    def submit(self, request: Request, put: Put) -> Any:
        """Start an answer and return what `cancel` takes. Raises: InputError for an adapter that is not loaded."""
        ...

    def cancel(self, handle: Any) -> None:
        """End an answer; its last event is Finished("cancelled"). Nothing happens if it has ended."""
        ...

    def load(self) -> Load:
        """Return what the engine does now."""
        ...

    def adapters(self) -> Collection[str]:
        """Return the names of the adapters in memory."""
        ...

    def load_adapter(self, name: str, folder: str) -> None:
        """Read an adapter and serve it from now on; returns when it is loaded. Another one may be forgotten for it.

        Raises:
            ConfigError: the adapter does not fit the base, or its kind cannot be served.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter after its running answers; returns at once. Raises: InputError if it is not loaded."""
        ...

    def close(self) -> None:
        """End every answer as cancelled and free the memory; returns when that is done."""
        ...
