"""Continuous batching: which tokens of which answers the next pass computes. This module imports no torch.

Every running answer gets one token in each pass. Beside them, prompts are computed in chunks. A request joins when
another one has ended and there are blocks for its prompt.
Source: Yu et al. 2022 (Orca); chunks of prompts: Agrawal et al. 2023, arXiv:2308.16369.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetune.serving.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for, digests
from finetune.serving.request import Put, Request


@dataclass(eq=False, slots=True)
class Answer:
    """A request while it is answered.

    number: of its arrival. adapter: None for the base; `origin` tells adapters apart in digests. row: of the sampler.
    tokens: of the prompt, then of the answer. computed: how many have keys and values in `blocks`.
    shared: tokens of the prompt that were not computed again. scores: of the tokens of the prompt after the first;
    None if they are put, or not asked for.
    """

    request: Request
    put: Put
    number: int
    adapter: Any = None
    origin: bytes = b""
    row: Any = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    shared: int | None = None
    scores: list[Any] | None = None
    preempted: bool = False
    cancelled: bool = False
    ended: bool = False

    @property
    def written(self) -> int:
        """Return how many tokens of the answer there are."""
        return len(self.tokens) - len(self.request.ids)


class Span(NamedTuple):
    """Tokens `start` to `stop` of an answer, computed in one pass."""

    answer: Answer
    start: int
    stop: int

    @property
    def writes(self) -> bool:
        """Return whether the next token follows from this pass."""
        return self.stop == len(self.answer.tokens)


class Scheduler:
    """The waiting and the running answers, both in the order of arrival, and the blocks that they share.

    max_batch: most running answers. prefill_tokens: most tokens of prompts in one pass.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, prefill_tokens: int):
        self.pool, self.max_batch, self.prefill_tokens = pool, max_batch, prefill_tokens
        self.waiting: list[Answer] = []
        self.running: list[Answer] = []
        self.counters: Counter[str] = Counter()

    def fits(self, request: Request) -> bool:
        """Return whether the blocks are enough for a request that runs alone."""
        # Keys and values of the last token are never read.
        return blocks_for(len(request.ids) + max(request.max_tokens - 1, 0)) <= self.pool.blocks

    def add(self, answer: Answer) -> None:
        """Let an answer wait for its turn."""
        answer.tokens = list(answer.request.ids)
        answer.scores = None if answer.request.prompt_log_probs is None else []
        self.waiting.append(answer)

    def remove(self, answer: Answer) -> None:
        """Forget an answer that has ended; its blocks become available."""
        (self.running if answer in self.running else self.waiting).remove(answer)
        self._release(answer)

    def plan(self) -> list[Span]:
        """Return the tokens of the next pass; their blocks are taken."""
        prompts, spans = [], []
        for answer in list(self.running):  # oldest first: those preempted meanwhile come later
            if len(answer.tokens) - answer.computed > 1:
                prompts.append(answer)
            elif answer in self.running and self._make_room(answer):
                spans.append(Span(answer, answer.computed, len(answer.tokens)))
        prompts = [answer for answer in prompts if answer in self.running] + self._admit()
        budget = self.prefill_tokens
        for answer in prompts:
            count = min(len(answer.tokens) - answer.computed, budget)
            if count:
                spans.append(Span(answer, answer.computed, answer.computed + count))
            budget -= count
        self.counters["prompt_tokens_computed"] += self.prefill_tokens - budget
        return spans

    def done(self, spans: Sequence[Span]) -> None:
        """Note that the tokens of a plan are computed; later answers may share their full blocks."""
        for answer, start, stop in spans:
            answer.computed = stop
            for number in range(start // BLOCK_TOKENS, stop // BLOCK_TOKENS):
                self.pool.keep(answer.blocks[number], self._digests(answer, number + 1)[number])

    def _make_room(self, answer: Answer) -> bool:
        """Take the block of the next token, at the expense of the youngest answers.

        Returns: False if the answer itself is the youngest and has to wait.
        """
        missing = blocks_for(len(answer.tokens)) - len(answer.blocks)
        while missing > self.pool.available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is answer:
                return False
        answer.blocks += self.pool.take(missing)
        return True

    def _preempt(self, answer: Answer) -> None:
        """Let a running answer wait. What it has written is then part of its prompt."""
        self.running.remove(answer)
        self._release(answer)
        answer.preempted = True
        if answer.scores is not None:
            answer.scores = []  # the prompt is computed again from its start
        insort(self.waiting, answer, key=lambda each: each.number)
        self.counters["preemptions"] += 1

    def _release(self, answer: Answer) -> None:
        self.pool.release(answer.blocks)
        answer.blocks, answer.computed = [], 0

    def _admit(self) -> list[Answer]:
        """Let waiting answers run while there are blocks; preempted ones first, then the adapter with the fewest."""
        admitted: list[Answer] = []
        while self.waiting and len(self.running) < self.max_batch:
            running = Counter(answer.origin for answer in self.running)
            # What a running answer computes now can be shared after this pass.
            pending = {
                digest for answer in self.running for digest in answer.digests[answer.computed // BLOCK_TOKENS :]
            }
            candidates = [answer for answer in self.waiting if not self._follows(answer, pending)]
            if not candidates:
                break
            answer = min(candidates, key=lambda each: (not each.preempted, running[each.origin], each.number))
            if not self._start(answer):
                break
            admitted.append(answer)
        return sorted(admitted, key=lambda each: each.number)

    def _follows(self, answer: Answer, pending: set[bytes]) -> bool:
        """Return whether a running answer computes the next block of this one."""
        if answer.scores is not None:
            return False
        wanted = self._digests(answer, (len(answer.tokens) - 1) // BLOCK_TOKENS)
        missing = next((digest for digest in wanted if not self.pool.holds(digest)), None)
        return missing in pending

    def _start(self, answer: Answer) -> bool:
        """Take the blocks of all tokens so far; False if they are not available."""
        tokens = len(answer.tokens)
        # The last token is computed in any case: the next one follows from it.
        wanted = [] if answer.scores is not None else self._digests(answer, (tokens - 1) // BLOCK_TOKENS)
        blocks = self.pool.share(wanted)
        missing = blocks_for(tokens) - len(blocks)
        # One block for each running answer: it would be preempted soon otherwise.
        if missing + len(self.running) > self.pool.available:
            self.pool.release(blocks)
            return False
        answer.computed = len(blocks) * BLOCK_TOKENS
        answer.blocks = blocks + self.pool.take(missing)
        if answer.shared is None:
            answer.shared = answer.computed
            self.counters["prompt_tokens_shared"] += answer.computed
        self.waiting.remove(answer)
        insort(self.running, answer, key=lambda each: each.number)
        return True

    def _digests(self, answer: Answer, count: int) -> list[bytes]:
        """Return the digests of the first blocks of an answer."""
        if (known := len(answer.digests)) < count:
            new = answer.tokens[known * BLOCK_TOKENS : count * BLOCK_TOKENS]
            answer.digests += digests(new, answer.digests[-1] if known else answer.origin)
        return answer.digests[:count]
