"""Greedy answers of a model to held-out rows, and exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.formats.messages import Conversation
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.decoding import Decoding, greedy
from finetune.evaluation.scoring import evaluating
from finetune.losses.hidden_states import base_of


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered row. prompt: the turn before the answer. expected: the row's answer. given: the model's answer."""

    prompt: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of answers equal to the expected ones, ignoring outer white space."""
    return sum(answer.exact for answer in answers) / len(answers)


@torch.no_grad()
def answer_rows(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Generate the last assistant turn of each conversation, greedily.

    Rows of similar length form a batch. The model's mode and the random state do not change.

    Args:
        progress: called after each batch with the numbers of answered and of all rows.

    Returns:
        Answers in the order of `conversations`.

    Raises:
        DataError: the template refuses a conversation.
    """
    rows = [_up_to_last_answer(conversation) for conversation in conversations]
    prompts = [chat.prompt_ids(row.messages[:-1], row.tools) for row in rows]
    stop_ids, vocabulary = frozenset(chat.stop_ids()), base_of(model).config.vocab_size
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            batch_rows = by_length[start : start + batch_size]
            batch = Decoding(model, [prompts[i] for i in batch_rows], [max_new_tokens] * len(batch_rows))
            written = batch.write(greedy, stop_ids, vocabulary)
            for i, text in zip(batch_rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                answers[i] = Answer(_prompt_of(rows[i]), _expected(chat, rows[i]), text)
            progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _up_to_last_answer(conversation: Conversation) -> Conversation:
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return Conversation(conversation.messages[: last + 1], conversation.tools)


def _prompt_of(conversation: Conversation) -> str:
    return conversation.messages[-2].content if len(conversation.messages) > 1 else ""


def _expected(chat: ChatTemplate, conversation: Conversation) -> str:
    """The row's answer as a model writes it: tool calls are rendered by the template."""
    answer = conversation.messages[-1]
    return chat.answer_text(conversation) if answer.tool_calls else answer.content
