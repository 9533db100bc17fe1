"""Check that student and teacher share the meaning of token ids.

Qwen2.5 models have tables of 151,936 or 152,064 rows for one tokenizer of 151,665 tokens: both are cut to the tokens.
DeepSeek-R1-Distill-Qwen has the same tables with other control tokens, so it is refused.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.system.errors import ConfigError

_SHOWN = 8


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int) -> int:
    """Return the number of ids, from 0 on, that the tokenizer and both tables have."""
    return min(len(tokenizer), student_rows, teacher_rows)


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase, used: np.ndarray, teacher: str
) -> None:
    """Compare the tokens of the ids in use. Raises: ConfigError naming the ids that differ, with both tokens.

    Args:
        used: unique ids of the rows.
    """
    ids = used.tolist()
    ours, theirs = (_meanings(which, ids) for which in (tokenizer, teachers))
    different = [(i, a, b) for i, a, b in zip(ids, ours, theirs, strict=True) if a != b]
    if not different:
        return
    shown = [f"  {i}: {a!r} here, {b!r} for the teacher" for i, a, b in different[:_SHOWN]]
    more = [f"  … and {len(different) - _SHOWN:,} more"] if len(different) > _SHOWN else []
    raise ConfigError(
        "\n".join(
            [
                f"distill.teacher.name={teacher}: {len(different):,} of the {len(ids):,} token ids in the rows have "
                "another meaning:",
                *shown,
                *more,
                f"help: set model.tokenizer={teacher} and a matching data.chat_template, or choose a teacher with the "
                "student's tokenizer",
            ]
        )
    )


def _meanings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | None]:
    size = len(tokenizer)
    return [tokenizer.convert_ids_to_tokens(i) if i < size else None for i in ids]  # type: ignore[misc]
