"""Answers that obey a JSON schema, by the library llguidance (extra `serve`)."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from finetune.serving.request import Finished
from finetune.system.errors import InputError, MissingExtra

# Any object: `response_format` json_object.
JSON_OBJECT = '{"type": "object"}'
# Bounds the time of compilation: 0.2 s for the worst schemas found.
_SCHEMA_CHARACTERS = 2**16
_KEPT_GRAMMARS = 64
# Blanks between the parts of a JSON text. Without a bound a model may write them until its answer is cut.
_BLANKS = r"[ \n\r\t]{1,32}"


def check_schema(schema: str) -> None:
    """Check a JSON schema in milliseconds, without a tokenizer. `GrammarCompiler` may still find it too complex.

    Raises:
        InputError: it is not JSON, not a schema, too large, or has a keyword that cannot be obeyed.
        MissingExtra: the library is not installed.
    """
    library = _library()
    _refuse(library.LLMatcher.validate_grammar(_grammar_of(schema), limits=_limits(library)))


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

    Args:
        tokenizer: a fast one. Preparing it takes 2 s and 120 MB for 150,000 tokens.
        vocabulary: number of ids to choose from.

    Raises:
        MissingExtra: the library is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int):
        self._library = _library()
        from llguidance.hf import from_tokenizer

        self._tokenizer = from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)))
        self._words = -(-self._tokenizer.vocab_size // 32)
        self._end_ids = frozenset(self._tokenizer.eos_tokens)
        self._lock = Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def prepare(self, schema: str) -> None:
        """Compile a schema, so that `start` takes no time: in a thread, since it may take 0.2 s.

        Raises:
            InputError: it is not JSON, not a schema, too large or too complex, or has a keyword that cannot be obeyed.
        """
        self._compiled(schema)

    def start(self, schema: str, stop_ids: frozenset[int]) -> AnswerGrammar:
        """Return the grammar of a new answer. Raises: as `prepare`."""
        ids = frozenset(i for i in stop_ids if 0 <= i < 32 * self._words)
        return AnswerGrammar(self._compiled(schema).deep_copy(), self._words, self._end_ids, ids)

    def _compiled(self, schema: str) -> Any:
        with self._lock:
            if schema in self._kept:
                self._kept.move_to_end(schema)
                return self._kept[schema]
        matcher = self._compile(schema)
        with self._lock:
            self._kept[schema] = matcher
            if len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return matcher

    def _compile(self, schema: str) -> Any:
        limits = _limits(self._library)
        matcher = self._library.LLMatcher(self._tokenizer, _grammar_of(schema), log_level=0, limits=limits)
        matcher.compute_bitmask()  # some grammars are found too complex only here
        _refuse(matcher.get_error())
        return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra('answers by a JSON schema need: pip install "finetune-qlora[serve]"') from error
    return llguidance


def _limits(library: Any) -> Any:
    """Allow less work than the library does: a hostile regular expression could stop all answers for 3 s."""
    return library.LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, verbose_errors=False)


def _grammar_of(schema: str) -> str:
    if len(schema) > _SCHEMA_CHARACTERS:
        raise InputError(f"the JSON schema has {len(schema)} characters; at most {_SCHEMA_CHARACTERS} are allowed")
    options = {"whitespace_pattern": _BLANKS, "lenient": False}
    try:
        return _library().LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise InputError(f"the JSON schema is not JSON: {error}") from error


def _refuse(problem: str) -> None:
    if problem:
        raise InputError(f"the JSON schema cannot be obeyed: {_first_line(problem)}")


def _first_line(problem: str) -> str:
    return problem.strip().split("\n")[0]
