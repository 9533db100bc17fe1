"""Blocks of keys and values: free, in use by answers, or kept for the next answer with the same prefix.

Only numbers of blocks are handled here; forward.py holds the tensors. This module imports no torch.
Source: Kwon et al. 2023, arXiv:2309.06180 (paged attention).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Return the blocks that hold a number of tokens."""
    return -(-tokens // BLOCK_TOKENS)


def digests(tokens: Sequence[int], before: bytes) -> Iterator[bytes]:
    """Yield the digest of each full block of tokens, which covers all tokens up to its end.

    before: digest of the block before the first one; for the first block of a prompt, what else decides the values.
    """
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        content = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        before = hashlib.sha256(before + content).digest()
        yield before


class BlockPool:
    """A fixed number of blocks with reference counts. A block without a reference keeps its content until it is needed.

    Blocks that lost their last reference long ago are overwritten first. taken: all that `take` gave; the owner of the
    tensors clears them and the list.
    """

    def __init__(self, blocks: int):
        self.blocks = blocks
        self.taken: list[int] = []
        self._references = [0] * blocks
        self._empty = list(range(blocks - 1, -1, -1))
        self._kept: dict[int, None] = {}  # without a reference, but with content; the first is overwritten first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Return how many blocks `take` can give."""
        return len(self._empty) + len(self._kept)

    def take(self, count: int) -> list[int]:
        """Return blocks with one reference each. Raises: MemoryError if fewer are available."""
        if count > self.available:
            raise MemoryError(f"{count} blocks of keys and values, {self.available} are available")
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block = next(iter(self._kept))
                del self._kept[block]
                del self._block_of[self._digest_of.pop(block)]
            self._references[block] = 1
            taken.append(block)
        self.taken += taken
        return taken

    def share(self, wanted: Sequence[bytes]) -> list[int]:
        """Return the blocks of the first digests, up to one that is missing, with one more reference each."""
        found = []
        for digest in wanted:
            if (block := self._block_of.get(digest)) is None:
                break
            self._kept.pop(block, None)
            self._references[block] += 1
            found.append(block)
        return found

    def holds(self, digest: bytes) -> bool:
        """Return whether a block with this digest can be shared."""
        return digest in self._block_of

    def keep(self, block: int, digest: bytes) -> None:
        """Let later answers share a block, which is computed to its end."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block of an answer; its last block is overwritten before its first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)
