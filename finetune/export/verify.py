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
from transformers import AutoTokenizer, GenerationConfig

from finetune.config.command_options import ExportOptions
from finetune.models.adapters.files import load_adapter
from finetune.models.decoder import family_in
from finetune.models.hub import TOKENIZER_FILES, read_json
from finetune.models.skeleton import build_skeleton, model_class
from finetune.models.tokenizer import quiet
from finetune.system.errors import IntegrityError

OFFLINE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
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
    """The result of a comparison."""

    reader: str
    tokens: int  # compared tokens of the answers
    same: float  # share of them that are the export's top token
    kl: float  # mean KL(source || export) in nats per token
    largest: float  # largest difference of a logit

    def describe(self) -> str:
        return (
            f"verify: reader={self.reader}, same greedy tokens={self.same:.1%} of {self.tokens}, "
            f"KL={self.kl:.2g} nats per token, largest logit difference={self.largest:.2g}"
        )


def open_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder, offline."""
    with quiet():
        return AutoTokenizer.from_pretrained(folder, **OFFLINE)


def open_model(folder: Path, **options: Any) -> Any:
    """Load a model folder with transformers alone, in fp32, by the class of its family.

    options: of `from_pretrained`.
    """
    skeleton = build_skeleton(folder, torch.float32, "sdpa")
    return model_class(family_in(skeleton)).from_pretrained(
        folder, config=skeleton.config, dtype=torch.float32, use_safetensors=True, **OFFLINE, **options
    )


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a model folder; a missing one is empty."""
    return read_json(folder / name, f"model {folder}") if (folder / name).is_file() else {}


@torch.no_grad()
def source_answers(source: Path, options: ExportOptions, adapter: Path | None = None) -> Answers:
    """Answer prompts greedily with a model folder in fp32, and compute the logits of one pass over each answer.

    With an adapter, its folder is loaded over the model; its tokenizer is used if it has one.
    """
    owner = adapter if adapter is not None and (adapter / TOKENIZER_FILES[0]).is_file() else source
    tokenizer = open_tokenizer(owner)
    with quiet():
        model: Any = open_model(source).eval()
        model = model if adapter is None else load_adapter(model, adapter)
    greedy = GenerationConfig(
        max_new_tokens=options.tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=model.generation_config.eos_token_id,
    )
    answers = Answers([], [], [])
    for number in range(options.prompts):
        text = PROMPTS[number % len(PROMPTS)]
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            prompt = tokenizer(text)["input_ids"]
        with quiet():
            ids = model.generate(torch.tensor([prompt]), generation_config=greedy)[0].tolist()
        answers.ids.append(ids)
        answers.begins.append(len(prompt))
        answers.logits.append(model(torch.tensor([ids])).logits[0].float())
    return answers


@torch.no_grad()
def compare(answers: Answers, read: Reader, reader: str, *, exact: bool) -> Verification:
    """Compare a reader's logits with the source's over the tokens of the answers.

    exact: every token must be the same, for types that keep every bit. Rounding changes some tokens; a KL of 1 nat or
    fewer than half of the tokens mean an error or a useless model.

    Raises:
        IntegrityError: the export does not compute what its source computes.
    """
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
    found = Verification(reader, tokens, same / tokens, kl / tokens, largest)
    if found.same < (1.0 if exact else 0.5) or not found.kl < 1.0:
        raise IntegrityError(f"the export differs too much from its source: {found.describe()}; nothing was kept")
    return found


def require_same_ids(reader: str, texts: dict[str, list[int]], encode: Callable[[str], list[int]]) -> None:
    """Raise IntegrityError with the first text that a reader encodes differently."""
    for text, ids in texts.items():
        if (found := list(encode(text))) != ids:
            raise IntegrityError(
                f"tokenizer: {reader} encodes {text!r} as {found}, the source as {ids}; nothing was kept"
            )
