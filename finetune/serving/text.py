"""Tokens of an answer become text that is final: never half a character, never a part of a stop text."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class AnswerText:
    """The text of one answer. stopped: whether a stop text ended it."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Return the text that is final after one more token."""
        text = self._held + (self._stream.step(self._tokenizer, token_id) or "")
        ends = [text.index(stop) for stop in self._stop if stop in text]
        if ends:
            self._held, self.stopped = "", True
            return text[: min(ends)]
        longest = max(map(len, self._stop), default=1) - 1
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._starts_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the rest."""
        held, self._held = self._held, ""
        return held

    def _starts_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
