"""The proof that an export computes what its source computes: the same answers, read back by the format's own reader.

The source answers a few fixed prompts greedily. A reader then gives its logits for the same tokens in one pass. Where
its first choice is the source's token at every place of an answer, it would have written that answer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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
    """What the source says: whole token sequences, where each answer begins, and the logits [T, V] of each."""

    ids: list[list[int]]
    begins: list[int]
    logits: list[Tensor]


@dataclass(frozen=True)
class Verification:
    """reader: what read it. tokens: of the answers compared. same: share of them that the export prefers, too. kl:
    KL(source || export), mean nats a token. largest: of the differences between logits.
    """

    reader: str
    tokens: int
    same: float
    kl: float
    largest: float

    def describe(self) -> str:
        return (
            f"{self.reader}: {self.same:.1%} of {self.tokens} greedy tokens are the source's, "
            f"KL {self.kl:.2g} nats a token, logits within {self.largest:.2g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def source_answers(source: Path, prompts: int, tokens: int) -> Answers:
    """Greedy answers of a model folder, computed by transformers in fp32, with the logits of one pass over each."""
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
        asked = _encode(tokenizer, text)
        with quiet():
            ids = model.generate(torch.tensor([asked]), generation_config=greedy)[0].tolist()
        answers.ids.append(ids)
        answers.begins.append(len(asked))
        answers.logits.append(model(torch.tensor([ids])).logits[0].float())
    return answers


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def compare(answers: Answers, read: Reader, reader: str) -> Verification:
    """The reader's logits against the source's, over the tokens of the answers."""
    same, kl, largest, tokens = 0, 0.0, 0.0, 0
    for ids, begin, logits_TV in zip(answers.ids, answers.begins, answers.logits, strict=True):
        ours_TV = logits_TV[begin - 1 : -1]
        theirs_TV = read(ids)[begin - 1 : len(ids) - 1, : ours_TV.shape[1]].float()
        width = theirs_TV.shape[1]
        # A format may leave out rows of the vocabulary that no token has.
        p, q = (part[:, :width].double().log_softmax(-1) for part in (ours_TV, theirs_TV))
        kl += float((p.exp() * (p - q)).sum())
        same += int((theirs_TV.argmax(-1) == torch.tensor(ids[begin:])).sum())
        largest = max(largest, float((ours_TV[:, :width] - theirs_TV).abs().max()))
        tokens += len(ids) - begin
    return Verification(reader, tokens, same / tokens, kl / tokens, largest)


def require_same(found: Verification, exact: bool) -> None:
    """Refuse an export that does not compute what its source does.

    exact: for formats that keep every bit: each token must be the same. Otherwise rounding may change some; but a model
    that agrees with its source on less than half of the tokens, or is a nat from it, was written wrongly or is ruined.
    Raises: IntegrityError with the figures.
    """
    if found.same < (1.0 if exact else 0.5) or not found.kl < 1.0:
        raise IntegrityError(f"the export does not answer as its source does: {found.describe()}; nothing was kept")
