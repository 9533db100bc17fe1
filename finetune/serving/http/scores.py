"""Log-probabilities in OpenAI's two formats and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders

from finetune.serving.request import PromptScores, Token, TokenScore
from finetune.serving.text import byte_level_token

# JSON has no infinity. OpenAI writes this for a token that cannot come.
_LEAST = -9999.0


class Tokens:
    """The text and the bytes of single tokens; a token may be a part of a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """Return the text, with U+FFFD for a part of a character."""
        return self._both(token)[0]

    def raw(self, token: int) -> bytes:
        """Return the bytes."""
        return self._both(token)[1]

    def legacy_name(self, token: int) -> str:
        """Return the text, or as OpenAI's completions write parts of characters: `bytes:\\xe2\\x82`."""
        text, raw = self._both(token)
        return text if text.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _both(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            if self._byte_level:
                raw = byte_level_token(self._tokenizer, token)
                self._known[token] = raw.decode(errors="replace"), raw
            else:
                text = self._tokenizer.decode([token], skip_special_tokens=False)
                self._known[token] = text, text.encode()
        return self._known[token]


def chat_scores(names: Tokens, tokens: Iterable[Token], top: int) -> dict[str, Any]:
    """Return `logprobs` of a chat: each token with the `top` most probable ones in its place."""

    def entry(token: int, log_prob: float | None) -> dict[str, Any]:
        return {"token": names.text(token), "logprob": _number(log_prob), "bytes": list(names.raw(token))}

    content = [
        entry(token.id, token.log_prob) | {"top_logprobs": [entry(*score) for score in token.top[:top]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_scores(
    names: Tokens, tokens: Sequence[Token], *, start: int, as_ids: bool, first_unknown: bool = False
) -> dict[str, Any]:
    """Return `logprobs` of a completion.

    Args:
        start: characters before the first token, in prompt and answer.
        as_ids: name tokens by their ids, which are unique, as vLLM does for return_tokens_as_token_ids.
        first_unknown: the first token has no score, as in a prompt.
    """

    def name(token: int) -> str:
        return f"token_id:{token}" if as_ids else names.legacy_name(token)

    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(names.text(token.id))
    top: list[dict[str, float] | None] = []
    for token in tokens:
        # The token itself comes last: it may not be among the most probable ones.
        top.append({name(score.id): _number(score.log_prob) for score in (*token.top, TokenScore(*_score(token)))})
    numbers: list[float | None] = [_number(token.log_prob) for token in tokens]
    if first_unknown and tokens:
        numbers[0], top[0] = None, None
    return {
        "tokens": [name(token.id) for token in tokens],
        "token_logprobs": numbers,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def prompt_tokens(ids: Sequence[int], scores: PromptScores) -> list[Token]:
    """Return the tokens of a prompt with their scores; the first has none."""
    return [
        Token(token, None if score is None else score.log_prob, top)
        for token, score, top in zip(ids, scores.tokens, scores.top, strict=True)
    ]


def vllm_prompt_scores(names: Tokens, scores: PromptScores) -> list[dict[str, Any] | None]:
    """Return vLLM's prompt_logprobs: null, then {id: {logprob, rank, decoded_token}} of the prompt's token and the top.

    The rank of a prompt's token that is not among the most probable ones is null.
    """

    def entry(score: TokenScore, rank: int | None) -> dict[str, Any]:
        return {"logprob": _number(score.log_prob), "rank": rank, "decoded_token": names.text(score.id)}

    places: list[dict[str, Any] | None] = []
    for own, top in zip(scores.tokens, scores.top, strict=True):
        if own is None:
            places.append(None)
            continue
        found = {str(own.id): entry(own, None)}
        found |= {str(score.id): entry(score, rank) for rank, score in enumerate(top, 1)}
        places.append(found)
    return places


def _score(token: Token) -> tuple[int, float]:
    return token.id, _LEAST if token.log_prob is None else token.log_prob


def _number(log_prob: float | None) -> float:
    return _LEAST if log_prob is None else max(float(log_prob), _LEAST)
