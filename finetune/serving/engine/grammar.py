"""Answers that obey a JSON schema, by the library llguidance (extra `serve`)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class GrammarCompiler:
    """Compiles JSON schemas for one tokenizer; the most recent ones are kept. Any thread may use it.

    tokenizer: a fast one. vocabulary: number of ids to choose from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
