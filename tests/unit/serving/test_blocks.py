"""Blocks are given once, come back, and are shared only with their content."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from finetune.serving.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for, digests

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Answers that take, keep, share and release blocks in any order, beside a plain account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what a block holds, until it is taken again

    @rule(count=st.integers(0, BLOCKS + 1))
    def take(self, count: int) -> None:
        if count > self.pool.available:
            with pytest.raises(MemoryError):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not {block for blocks in self.held for block in blocks} & set(taken)
        for block in taken:
            self.content.pop(block, None)
        self.held.append(taken)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), digest=st.binary(min_size=1, max_size=1))
    def keep(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.held for block in blocks]))
        self.pool.keep(block, digest)
        if block not in self.content and digest not in self.content.values():
            self.content[block] = digest

    @rule(wanted=st.lists(st.binary(min_size=1, max_size=1), max_size=3))
    def share(self, wanted: list[bytes]) -> None:
        found = self.pool.share(wanted)
        assert [self.content[block] for block in found] == wanted[: len(found)]
        assert len(found) == len(wanted) or not self.pool.holds(wanted[len(found)])
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.available == BLOCKS - len(held)

    @invariant()
    def content_stays_until_a_block_is_taken(self) -> None:
        assert all(self.pool.holds(digest) for digest in self.content.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def test_the_block_released_first_is_taken_first() -> None:
    pool = BlockPool(3)
    for digest in (b"a", b"b", b"c"):
        (block,) = pool.take(1)
        pool.keep(block, digest)
        pool.release([block])
    (used,) = pool.share([b"a"])
    pool.release([used])
    pool.take(2)
    assert [pool.holds(digest) for digest in (b"a", b"b", b"c")] == [True, False, False]


def test_the_end_of_a_prefix_is_taken_before_its_start() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    for block, digest in zip(blocks, (b"start", b"end"), strict=True):
        pool.keep(block, digest)
    pool.release(blocks)
    pool.take(1)
    assert pool.holds(b"start") and not pool.holds(b"end")


def test_a_digest_covers_the_adapter_and_all_tokens_before() -> None:
    tokens = list(range(3 * BLOCK_TOKENS + 1))
    found = list(digests(tokens, b""))
    assert len(found) == 3
    assert list(digests(tokens[BLOCK_TOKENS:], found[0])) == found[1:]
    changed = list(digests([99, *tokens[1:]], b""))
    other = list(digests(tokens, b"adapter"))
    assert len({*found, *changed, *other}) == 9


def test_blocks_for_tokens() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]
