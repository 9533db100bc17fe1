"""Whether student and teacher mean the same by a token's number.

Qwen2.5's sizes have tables of 151,936 or 152,064 rows for one tokenizer of 151,665 tokens: both are cut to the tokens.
DeepSeek-R1-Distill-Qwen has the same tables and gives its control tokens other meanings, which must be refused.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.system.errors import ConfigError

_SHOWN = 8


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int) -> int:
    """How many ids, from 0 on, take part in a divergence: those of the tokenizer that both tables have."""
    return min(len(tokenizer), student_rows, teacher_rows)


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase, used: np.ndarray, teacher: str
) -> None:
    """Refuse a teacher that means something else by a token that the rows hold.

    used: ids that the rows hold, each once.
    Raises: ConfigError with the ids and both meanings.
    """
    ids = used.tolist()
    ours, theirs = (_meanings(which, ids) for which in (tokenizer, teachers))
    different = [(i, a, b) for i, a, b in zip(ids, ours, theirs, strict=True) if a != b]
    if not different:
        return
    shown = [f"  {i}: {a!r} here, {b!r} to the teacher" for i, a, b in different[:_SHOWN]]
    more = [f"  … and {len(different) - _SHOWN:,} more"] if len(different) > _SHOWN else []
    raise ConfigError(
        "\n".join(
            [
                f"distill.teacher.name={teacher} means something else by {len(different):,} of the {len(ids):,} "
                "tokens that "
                "the rows hold:",
                *shown,
                *more,
                f"train with its tokenizer (model.tokenizer={teacher}, and a data.chat_template that suits it), or "
                "choose a "
                "teacher with the student's own",
            ]
        )
    )


def _meanings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | None]:
    size = len(tokenizer)
    return [tokenizer.convert_ids_to_tokens(i) if i < size else None for i in ids]  # type: ignore[misc]
