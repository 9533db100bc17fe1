"""Turn the tokens of an answer into text that is final: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class AnswerText:
    """The text of one answer, as its tokens come.

    All returned pieces together are the decoded answer, cut where the first stop string begins. The first one is that
    which is complete first, when characters are read one by one; of those that end together, the longest.

    stopped: whether a stop string ended the text.

    Args:
        stop: stop strings; empty ones are ignored.
        skip_special_tokens: leave out special tokens, as in `decode`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True):
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._decoder: _Decoder = _ByteDecoder(tokenizer) if byte_level else _PartDecoder(tokenizer)
        added = tokenizer.get_added_tokens_decoder().items() if skip_special_tokens else ()
        self._skipped = {i for i, token in added if token.special}
        self._stops = [_StopString(text) for text in stop if text]
        self._held = ""  # may be the start of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Return the text that is final after one more token."""
        return "" if self.stopped or token_id in self._skipped else self._final(self._decoder.push(token_id))

    def finish(self) -> str:
        """Return the rest."""
        rest = "" if self.stopped else self._final(self._decoder.finish())
        held, self._held = self._held, ""
        return rest + held

    def _final(self, piece: str) -> str:
        if not self._stops:
            return piece
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            found = [len(stop.text) for stop in self._stops if stop.read(text[end])]
            if found:
                self.stopped, self._held = True, ""
                return text[: end + 1 - max(found)]
        final = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[final:]
        return text[:final]


class _StopString:
    """Looks for a string in a stream of characters, in linear time. matched: characters of its start read last.

    Source: Knuth, Morris, Pratt 1977, "Fast pattern matching in strings".
    """

    def __init__(self, text: str):
        self.text, self.matched = text, 0
        self._shorter = [0, 0]  # for each number of matched characters, the next smaller number that also matches
        for end in range(1, len(text)):
            self._shorter.append(self._next(self._shorter[end], text[end]))

    def read(self, character: str) -> bool:
        """Return whether the string ends with this character."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Tokens of a byte-level BPE, whose characters stand for bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(byte_level_token(self._tokenizer, token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level tokens: printable ones stand for themselves."""
    own = sorted(character for character in ByteLevel.alphabet() if ord(character) < 256)
    others = sorted(character for character in ByteLevel.alphabet() if ord(character) >= 256)
    rest = sorted(set(range(256)) - set(map(ord, own)))
    return {character: ord(character) for character in own} | dict(zip(others, rest, strict=True))


_BYTES = _bytes_of_characters()


def byte_level_token(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the bytes of a token of a byte-level BPE."""
    token = tokenizer.id_to_token(token_id) or ""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:  # an added token with other characters
        return token.encode()


class _PartDecoder:
    """Tokens of other tokenizers. A part is a token, or a run of tokens of one byte: an error in a run changes it all.

    The part before decides about blanks.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._bytes: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if _BYTE_TOKEN.fullmatch(token):
            self._bytes.append(token_id)
            return ""
        return self.finish() + self._text([token_id])

    def finish(self) -> str:
        part, self._bytes = self._bytes, []
        return self._text(part) if part else ""

    def _text(self, part: list[int]) -> str:
        before = self._tokenizer.decode(self._before, skip_special_tokens=False)
        text = self._tokenizer.decode(self._before + part, skip_special_tokens=False)
        self._before = part
        return text[len(before) :]
