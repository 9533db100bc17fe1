"""Answers of a model to held-out rows, and how many of them equal the rows' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from finetune.data.chat import ChatTemplate
from finetune.data.formats import Message
from finetune.evaluation.perplexity import evaluating


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out row answered: the last user turn, the answer of the row, the answer of the model."""

    prompt: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to the row's own, outer white space aside."""
    return sum(answer.exact for answer in answers) / len(answers)


def _pad_left(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device),
    }


@torch.no_grad()
def answer_rows(
    model: PreTrainedModel | nn.Module,
    chat: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Greedy answers to each conversation's last assistant turn, in the order given.

    Rows are answered in batches of like length, padded on the left; the model's mode and random state stay as they are.
    """
    tokenizer = chat.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
        eos_token_id=chat.stop_ids(), pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    device = next(model.parameters()).device
    turns = [_split_at_last_answer(conversation) for conversation in conversations]
    prompts = [chat.prompt_ids(context) for context, _ in turns]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            inputs = _pad_left([prompts[i] for i in rows], pad, device)
            outputs = model.generate(**inputs, generation_config=greedy)  # type: ignore[operator]
            new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(rows, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
                context, expected = turns[i]
                answers[i] = Answer(context[-1].content if context else "", expected, text)
    return [answers[i] for i in range(len(prompts))]


def _split_at_last_answer(conversation: Sequence[Message]) -> tuple[list[Message], str]:
    last = max(i for i, message in enumerate(conversation) if message.role == "assistant")
    return list(conversation[:last]), conversation[last].content
