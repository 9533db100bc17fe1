"""Every request is answered, in few passes, fairly, and within the blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from finetune.serving.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from finetune.serving.engine.scheduler import Answer, Scheduler
from finetune.serving.request import Request


@dataclass
class Run:
    """A scheduler whose model writes the token 7 for ever. orders: numbers of answers in the order of their ends."""

    scheduler: Scheduler
    passes: list[list[tuple[int, int, int]]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def step(self) -> None:
        scheduler = self.scheduler
        spans = scheduler.plan()
        self.passes.append([(span.answer.number, span.start, span.stop) for span in spans])
        held = Counter(block for answer in scheduler.running for block in answer.blocks)
        for span in spans:
            answer = span.answer
            assert answer.computed == span.start < span.stop <= len(answer.tokens)
            assert span.stop <= len(answer.blocks) * BLOCK_TOKENS
            # What is written in this pass goes to blocks of this answer alone.
            assert all(held[block] == 1 for block in answer.blocks[span.start // BLOCK_TOKENS :])
        scheduler.done(spans)
        for span in spans:
            if span.writes:
                span.answer.tokens.append(7)
                if span.answer.written == span.answer.request.max_tokens:
                    scheduler.remove(span.answer)
                    self.ends.append(span.answer.number)

    def until_empty(self, most: int = 5000) -> None:
        for _ in range(most):
            if not (self.scheduler.running or self.scheduler.waiting):
                return
            self.step()
        raise AssertionError("answers never end")


def scheduler_of(blocks: int, max_batch: int = 4, prefill_tokens: int = 32) -> Scheduler:
    return Scheduler(BlockPool(blocks), max_batch=max_batch, prefill_tokens=prefill_tokens)


def add(scheduler: Scheduler, number: int, ids: range | list[int], tokens: int = 4, origin: bytes = b"") -> Answer:
    answer = Answer(Request(tuple(ids), tokens), lambda event: None, number, origin=origin)
    assert scheduler.fits(answer.request)
    scheduler.add(answer)
    return answer


@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.sampled_from([b"", b"a"])), max_size=12),
    max_batch=st.integers(1, 5),
    prefill_tokens=st.integers(1, 40),
    spare=st.integers(0, 4),
    later=st.integers(0, 6),
)
def test_every_answer_ends_within_the_blocks(
    requests: list[tuple[int, int, bytes]], max_batch: int, prefill_tokens: int, spare: int, later: int
) -> None:
    blocks = max((blocks_for(prompt + tokens - 1) for prompt, tokens, _ in requests), default=1) + spare
    run = Run(scheduler_of(blocks, max_batch, prefill_tokens))
    answers = []
    for number, (prompt, tokens, origin) in enumerate(requests):
        answers.append(add(run.scheduler, number, range(prompt), tokens, origin))
        for _ in range(later):
            run.step()
            assert len(run.scheduler.running) <= max_batch
    run.until_empty()
    assert sorted(run.ends) == list(range(len(requests)))
    assert run.scheduler.pool.available == blocks
    assert all(answer.tokens[len(answer.request.ids) :] == [7] * answer.request.max_tokens for answer in answers)


def test_prompts_come_in_chunks_beside_the_tokens_of_running_answers() -> None:
    run = Run(scheduler_of(32, prefill_tokens=20))
    add(run.scheduler, 0, range(5), tokens=6)
    run.step()
    add(run.scheduler, 1, range(100, 150))
    for _ in range(3):
        run.step()
    assert run.passes == [
        [(0, 0, 5)],
        [(0, 5, 6), (1, 0, 20)],
        [(0, 6, 7), (1, 20, 40)],
        [(0, 7, 8), (1, 40, 50)],
    ]


def test_the_youngest_answer_makes_room_and_ends_too() -> None:
    run = Run(scheduler_of(6))
    for number in range(3):
        add(run.scheduler, number, range(100 * number, 100 * number + 20), tokens=40)
    run.until_empty()
    assert run.scheduler.counters["preemptions"] > 0
    assert run.ends == [0, 1, 2]


def test_a_request_that_never_fits_is_known_at_once() -> None:
    scheduler = scheduler_of(2)
    assert scheduler.fits(Request(tuple(range(20)), 2 * BLOCK_TOKENS - 20 + 1))
    assert not scheduler.fits(Request(tuple(range(20)), 2 * BLOCK_TOKENS - 20 + 2))


def test_a_common_prefix_is_computed_once() -> None:
    run = Run(scheduler_of(32, prefill_tokens=100))
    prompt = list(range(40))
    first, same, longer, other = (
        add(run.scheduler, 0, prompt),
        add(run.scheduler, 1, prompt),
        add(run.scheduler, 2, [*prompt[:32], *range(200, 230)]),
        add(run.scheduler, 3, prompt, origin=b"adapter"),
    )
    run.step()
    assert run.passes[0] == [(0, 0, 40), (3, 0, 40)]  # the others wait for the prefix instead of computing it again
    run.until_empty()
    assert [answer.shared for answer in (first, same, longer, other)] == [0, 32, 32, 0]
    again = add(run.scheduler, 4, prompt[:32])
    run.until_empty()
    assert again.shared == 16  # the last token is always computed
    assert run.scheduler.counters["prompt_tokens_shared"] == 80


def test_a_turn_shares_the_answer_before() -> None:
    run = Run(scheduler_of(32))
    add(run.scheduler, 0, range(20), tokens=29)
    run.until_empty()
    turn = add(run.scheduler, 1, [*range(20), *[7] * 29, 1, 2, 3])
    run.until_empty()
    assert turn.shared == 48


def test_an_adapter_with_many_requests_leaves_room_to_others() -> None:
    run = Run(scheduler_of(64, max_batch=2))
    for number in range(6):
        add(run.scheduler, number, [number], origin=b"busy")
    add(run.scheduler, 6, [6], origin=b"quiet")
    run.step()
    assert [answer.number for answer in run.scheduler.running] == [0, 6]


def test_a_prompt_with_scores_shares_nothing() -> None:
    run = Run(scheduler_of(32))
    prompt = list(range(40))
    add(run.scheduler, 0, prompt)
    run.until_empty()
    answer = Answer(Request(tuple(prompt), 1, prompt_log_probs=0), lambda event: None, 1)
    run.scheduler.add(answer)
    run.step()
    assert run.passes[-1] == [(1, 0, 32)]
