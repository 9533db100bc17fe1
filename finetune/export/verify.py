"""Compare an export with its source: the source's greedy answers, read back by the format's own reader.

The source answers fixed prompts greedily. A reader computes logits of the same tokens in one pass. If its top token is
the source's at every position of an answer, it would generate that answer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune.models.load import quiet
from finetune.system.errors import IntegrityError

# Ids [T] -> logits [T, V] in fp32, V at least the tokenizer's.
Reader = Callable[[list[int]], Tensor]

PROMPTS = (
    "Write the numbers 3, 1 and 2 in rising order.",
    "What is the capital of France?",
    'Answer in JSON: the name is "Ada", the year is 1815.',
    "Übersetze ins Englische: Guten Morgen, 世界! 👋",
    "Count from one to ten.",
    "def fibonacci(n):",
    "Repeat this twice: the quick brown fox.",
    "List three colors.",
)


@dataclass(frozen=True)
class Answers:
    """The source's token sequences (prompt and answer), the start of each answer, and the logits [T, V] of each."""

    ids: list[list[int]]
    begins: list[int]
    logits: list[Tensor]


@dataclass(frozen=True)
class Verification:
    """The result of a comparison.

    tokens: compared tokens of the answers.
    same: share of them that are the export's top token.
    kl: mean KL(source || export) in nats per token.
    largest: largest difference of a logit.
    """

    reader: str
    tokens: int
    same: float
    kl: float
    largest: float

    def describe(self) -> str:
        return (
            f"verify: reader={self.reader}, same greedy tokens={self.same:.1%} of {self.tokens}, "
            f"KL={self.kl:.2g} nats per token, largest logit difference={self.largest:.2g}"
        )


@torch.no_grad()
def source_answers(source: Path, prompts: int, tokens: int) -> Answers:
    """Answer prompts greedily with a model folder in fp32, and compute the logits of one pass over each answer.

    Args:
        source: a folder that transformers loads.
        prompts: number of prompts, from PROMPTS.
        tokens: longest answer.
    """
    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=model.generation_config.eos_token_id,
    )
    answers = Answers([], [], [])
    for number in range(prompts):
        text = PROMPTS[number % len(PROMPTS)]
        prompt = _encode(tokenizer, text)
        with quiet():
            ids = model.generate(torch.tensor([prompt]), generation_config=greedy)[0].tolist()
        answers.ids.append(ids)
        answers.begins.append(len(prompt))
        answers.logits.append(model(torch.tensor([ids])).logits[0].float())
    return answers


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def compare(answers: Answers, read: Reader, reader: str) -> Verification:
    """Compare a reader's logits with the source's over the tokens of the answers; reader: its name."""
    same, kl, largest, tokens = 0, 0.0, 0.0, 0
    for ids, begin, logits_TV in zip(answers.ids, answers.begins, answers.logits, strict=True):
        ours_TV = logits_TV[begin - 1 : -1]
        theirs_TV = read(ids)[begin - 1 : len(ids) - 1, : ours_TV.shape[1]].float()
        width = theirs_TV.shape[1]
        # A format may omit rows of the vocabulary without a token.
        p, q = (part[:, :width].double().log_softmax(-1) for part in (ours_TV, theirs_TV))
        kl += float((p.exp() * (p - q)).sum())
        same += int((theirs_TV.argmax(-1) == torch.tensor(ids[begin:])).sum())
        largest = max(largest, float((ours_TV[:, :width] - theirs_TV).abs().max()))
        tokens += len(ids) - begin
    return Verification(reader, tokens, same / tokens, kl / tokens, largest)


def require_same(found: Verification, exact: bool) -> None:
    """Refuse an export that does not compute what its source computes.

    Args:
        found: the comparison.
        exact: every token must be the same, for formats that keep every bit. Otherwise half of them, and KL below 1
            nat: rounding changes some tokens, and a larger distance is an error or a useless model.

    Raises:
        IntegrityError: with the figures.
    """
    if found.same < (1.0 if exact else 0.5) or not found.kl < 1.0:
        raise IntegrityError(f"the export differs too much from its source: {found.describe()}; nothing was kept")
