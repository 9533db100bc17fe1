"""Answers that obey a JSON schema, by the library llguidance (extra `serve`)."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from finetune.serving.request import Finished
from finetune.system.errors import InputError, MissingExtra

# `response_format` json_object: any object.
JSON_OBJECT = '{"type": "object"}'
# Bounds the time of compilation: 0.2 s for the worst schemas found.
_SCHEMA_CHARACTERS = 2**16
_KEPT_GRAMMARS = 64
# Blanks between the parts of a JSON text. Without a bound a model may write them until its answer is cut.
_BLANKS = r"[ \n\r\t]{1,32}"


def check_schema(schema: str) -> None:
    """Check a JSON schema for answers, in milliseconds. `GrammarCompiler.start` may still find it too complex.

    Raises:
        InputError: it is not JSON, not a schema, too large, or has a keyword that cannot be obeyed.
        MissingExtra: the library is not installed.
    """
    _refuse(_library().LLMatcher.validate_grammar(_grammar_of(schema), limits=_limits()))


class AnswerGrammar:
    """The place of one answer in its grammar."""

    def __init__(self, matcher: Any, words: int, end_ids: frozenset[int], stop_ids: frozenset[int]):
        self._matcher, self._words, self._end_ids, self._stop_ids = matcher, words, end_ids, stop_ids

    def allowed(self) -> np.ndarray | Finished:
        """Return the tokens that may come next as bits, lowest first, in bytes [B]; or why none may.

        The stop ids of the request are allowed where the answer may end.
        """
        bits = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            return Finished("error", error=f"the answer's grammar failed: {_first_line(self._matcher.get_error())}")
        complete = self._matcher.is_accepting()
        for token in self._end_ids:
            bits[token >> 5] &= ~np.uint32(1 << (token & 31))
        for token in self._stop_ids if complete else ():
            bits[token >> 5] |= np.uint32(1 << (token & 31))
        if not bits.any():
            return Finished("stop") if complete else Finished("error", error="the answer's grammar allows no token")
        return bits.view(np.uint8)

    def advance(self, token: int) -> None:
        """Add a token of the answer; an error shows up in `allowed`."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)


class GrammarCompiler:
    """Compiles JSON schemas for one tokenizer, and keeps the most recent ones. Any thread may use it.

    tokenizer: a fast one; it is prepared at the first schema, in 2 s. vocabulary: number of ids to choose from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self._lock = Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    @cached_property
    def _prepared(self) -> Any:
        """The tokenizer as the library reads it."""
        _library()
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=max(self.vocabulary, len(self.tokenizer)))

    def start(self, schema: str, stop_ids: frozenset[int]) -> AnswerGrammar:
        """Return the grammar of a new answer.

        Raises:
            InputError: as `check_schema`, or the grammar of the schema is too complex.
            MissingExtra: the library is not installed.
        """
        with self._lock:
            if schema not in self._kept:
                self._kept[schema] = self._compile(schema)
                if len(self._kept) > _KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(schema)
            matcher = self._kept[schema].deep_copy()
            prepared = self._prepared
        return AnswerGrammar(matcher, -(-prepared.vocab_size // 32), frozenset(prepared.eos_tokens), stop_ids)

    def _compile(self, schema: str) -> Any:
        matcher = _library().LLMatcher(self._prepared, _grammar_of(schema), log_level=0, limits=_limits())
        matcher.compute_bitmask()  # some grammars are found too complex only here
        _refuse(matcher.get_error())
        return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra('answers by a JSON schema need: pip install "finetune-qlora[serve]"') from error
    return llguidance


def _limits() -> Any:
    """Return limits on work, below those of the library: a hostile regular expression could stop all answers for 3 s."""
    return _library().LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, verbose_errors=False)


def _grammar_of(schema: str) -> str:
    if len(schema) > _SCHEMA_CHARACTERS:
        raise InputError(f"the JSON schema has {len(schema)} characters; at most {_SCHEMA_CHARACTERS} are allowed")
    try:
        return _library().LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _BLANKS, "lenient": False}
        )
    except ValueError as error:
        raise InputError(f"the JSON schema is not JSON: {error}") from error


def _refuse(problem: str) -> None:
    if problem:
        raise InputError(f"the JSON schema cannot be obeyed: {_first_line(problem)}")


def _first_line(problem: str) -> str:
    return problem.strip().split("\n")[0]
