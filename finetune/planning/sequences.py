"""A full sequence of a run: the rows that the model computes, and the places that attention runs over.

Answers to the same prompt share its rows (data/batch.py), but each of them has a place for every token of it.

Names: G answers to a prompt, P tokens of a prompt, A tokens of an answer, M `data.max_length`.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config import schema


@dataclass(frozen=True, slots=True)
class FullSequence:
    """Tokens of a full sequence.

    rows: computed by the model. places: of its documents, each with its prompt. document: of one of them.
    targets: trained on. prompts: in this sequence; a part of 1 if the answers to one prompt fill several.
    """

    rows: int
    places: int
    document: int
    targets: float
    prompts: float = 1.0


def plain_sequence(max_length: int, document: int | None, target_share: float) -> FullSequence:
    """Return a sequence of rows that share nothing."""
    return FullSequence(max_length, max_length, document or max_length, target_share * max_length)


def sequence_of_pairs(max_length: int, pair: int | None, target_share: float, shared: bool) -> FullSequence:
    """Return a sequence of pairs of answers, whose tokens are counted with a prompt for each side.

    pair: tokens of both sides. shared: whether a prompt is computed once. P is at most 1 - `target_share` of a side.
    """
    rows = round(max_length * (1 + target_share) / 2) if shared else max_length
    return FullSequence(rows, max_length, (pair or max_length) // 2, target_share * max_length)


def sequence_of_groups(
    reward: schema.RewardConfig, max_length: int, prompt: int | None, *, shared: bool, most_prompts: int
) -> FullSequence:
    """Return a sequence of groups of answers; M limits its rows, with a prompt for each group.

    prompt: P of all prompts, whose answers are of full length A. None: an upper bound of the places, whatever the
        lengths: each row of a prompt has up to G of them.
    shared: whether a prompt is computed once. most_prompts: of a sequence.
    """
    group, answer = reward.group_size, reward.max_new_tokens
    if prompt is None:
        places = group * (max_length - answer) + answer
        return FullSequence(max_length if shared else places, places, max_length, max_length)
    groups = min(most_prompts, max_length // (prompt + group * answer))
    # A group that fills more than a sequence is split.
    answers = groups * group or max(1, (max_length - prompt) // answer)
    places, targets = answers * (prompt + answer), answers * answer
    rows = max(1, groups) * prompt + targets if shared else places
    return FullSequence(rows, places, prompt + answer, targets, answers / group)
