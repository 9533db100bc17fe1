"""Answers of a model to held-out rows, and how many of them equal the rows' own."""

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
    """One held-out row answered: the turn before the answer, the answer of the row, the answer of the model."""

    prompt: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to the row's own, outer white space aside."""
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
    """Greedy answers to each conversation's last assistant turn, in the order given.

    Rows are answered in batches of like length, padded on the left; the model's mode and random state stay as they are.
    progress: told after each batch how many are done, and of how many.
    Raises: DataError if the template refuses a conversation.
    """
    asked = [_up_to_last_answer(conversation) for conversation in conversations]
    prompts = [chat.prompt_ids(row.messages[:-1], row.tools) for row in asked]
    stop_ids, vocabulary = frozenset(chat.stop_ids()), base_of(model).config.vocab_size
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            batch = Decoding(model, [prompts[i] for i in rows], [max_new_tokens] * len(rows))
            written = batch.write(greedy, stop_ids, vocabulary)
            for i, text in zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                answers[i] = Answer(_prompt_of(asked[i]), _expected(chat, asked[i]), text)
            progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _up_to_last_answer(conversation: Conversation) -> Conversation:
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return Conversation(conversation.messages[: last + 1], conversation.tools)


def _prompt_of(conversation: Conversation) -> str:
    return conversation.messages[-2].content if len(conversation.messages) > 1 else ""


def _expected(chat: ChatTemplate, conversation: Conversation) -> str:
    """The row's answer as the model would write it: tool calls in the template's words."""
    answer = conversation.messages[-1]
    return chat.answer_text(conversation) if answer.tool_calls else answer.content
