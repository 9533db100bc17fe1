"""The choice of rewritten documents is the same on every rank; a random writer stands in for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pytest

from finetune.config.compose import load_config
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.on_policy import OnPolicySampler
from finetune.system.errors import ConfigError

MAX_LENGTH, TOKENS = 24, 10


def document(number: int, length: int = 12, targets: Sequence[slice] = (slice(7, 11),), **more) -> Document:
    """Unique ids below 500; the slices give the targets."""
    ids = (np.arange(length) + 13 * number).astype(np.int32) % 500
    labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
    for span in targets:
        labels[span] = np.roll(ids, -1)[span]
    return Document(ids, labels, f"rows:{number}", row=number, **more)


@dataclass
class Rows:
    """A sampler of two documents a sequence, three sequences a step, other ones in each step."""

    closed: list[bool] = field(default_factory=list)
    digest = "rows"

    def step_batches(self, step: int) -> list[list[Document]]:
        return [
            [document(100 * step + 2 * i, 5 + i, [slice(2, 4)]), document(100 * step + 2 * i + 1)] for i in range(3)
        ]

    def steps_for(self, epochs: float) -> int:
        return round(7 * epochs)

    def close(self) -> None:
        self.closed.append(True)


def write(prompts: Sequence[np.ndarray], draws: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Answers that only these prompts and draws give, of ids from 500 on; how long they are is drawn as well."""
    return [
        (500 + 400 * d[: 1 + int(d[0] * len(d))] + len(p) / 8).astype(np.int32)
        for p, d in zip(prompts, draws, strict=True)
    ]


def sampler(share: float = 1.0, rows=None, **more) -> OnPolicySampler:
    return OnPolicySampler(
        rows or Rows(), more.pop("write", write), share, TOKENS, MAX_LENGTH, more.pop("seed", 0), **more
    )


def flat(sequences: list[list[Document]]) -> list[Document]:
    return [document for sequence in sequences for document in sequence]


def contents(sequences: list[list[Document]]) -> list[list[tuple]]:
    return [
        [(d.ids.tolist(), d.labels.tolist(), d.location, d.row, d.student_generated) for d in sequence]
        for sequence in sequences
    ]


def one_step(documents: list[Document]) -> Rows:
    rows = Rows()
    rows.step_batches = lambda step: [[d] for d in documents]  # type: ignore[method-assign]
    return rows


def test_share_0_leaves_every_document_and_share_1_none():
    assert contents(sampler(0.0).step_batches(3)) == contents(Rows().step_batches(3))
    for before, after in zip(flat(Rows().step_batches(3)), flat(sampler(1.0).step_batches(3)), strict=True):
        prompt = int(np.flatnonzero(before.labels != IGNORE_INDEX)[0]) + 1
        answer = after.ids[prompt:]
        assert after.student_generated and (after.location, after.row) == (before.location, before.row)
        assert after.ids[:prompt].tolist() == before.ids[:prompt].tolist()
        assert 1 <= len(answer) <= TOKENS and (answer >= 500).all()
        assert after.labels.tolist() == [IGNORE_INDEX] * (prompt - 1) + answer.tolist() + [IGNORE_INDEX]
        assert after.target_tokens == len(answer)


def test_a_documents_chance_depends_on_seed_step_and_number_alone():
    assert contents(sampler(0.5).step_batches(3)) == contents(sampler(0.5).step_batches(3))
    recorded = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        sampler(write=lambda prompts, draws: recorded.extend(draws) or write(prompts, draws), seed=seed).step_batches(
            step
        )
    firsts = {float(draws[0]) for draws in recorded}
    assert len(firsts) == len(recorded) == 18
    # Not the numbers that shuffle an epoch either.
    orders = {x for seed, step in ((0, 0), (0, 1), (1, 0)) for x in np.random.default_rng([seed, step]).random(3)}
    assert not firsts & orders
    # Beside other documents, or with others chosen, a document is decided by the same draws.
    few = one_step(flat(Rows().step_batches(0))[:2])
    assert contents(sampler(rows=few).step_batches(0)) == [[d] for d in contents(sampler().step_batches(0))[0]]
    for some, more in zip(flat(sampler(0.5).step_batches(0)), flat(sampler(1.0).step_batches(0)), strict=True):
        assert not some.student_generated or some.ids.tolist() == more.ids.tolist()


def test_the_share_is_that_of_documents_chosen_and_a_larger_one_keeps_the_choice():
    rows = one_step([document(i) for i in range(2000)])
    chosen = [
        {d.row for d in flat(sampler(share, rows).step_batches(0)) if d.student_generated} for share in (0.3, 0.6)
    ]
    assert chosen[0] < chosen[1]
    for share, rows_chosen in zip((0.3, 0.6), chosen, strict=True):
        assert abs(len(rows_chosen) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_any_number_of_ranks_sees_the_same_documents_each_written_once(ranks):
    given: list[list] = []
    for rank in range(ranks):  # what every rank gives to the others
        sampler(0.8, rank=rank, ranks=ranks, gather=lambda mine: given.append(mine) or mine).step_batches(2)
    numbers = [number for mine in given for number, _ in mine]
    assert len(numbers) == len(set(numbers)) == sum(d.student_generated for d in flat(sampler(0.8).step_batches(2))) > 0
    assert max(map(len, given)) - min(map(len, given)) <= 1
    for rank in range(ranks):
        seen = sampler(0.8, rank=rank, ranks=ranks, gather=lambda mine: list(chain(*given))).step_batches(2)
        assert contents(seen) == contents(sampler(0.8).step_batches(2))


def test_a_sequence_beyond_the_limit_is_split_with_its_documents_in_order():
    longest = sampler(write=lambda prompts, draws: [np.full(len(d), 7, np.int32) for d in draws])
    sequences = longest.step_batches(0)  # prompts of 3 and 8 tokens, answers of 10
    assert [[len(d) for d in sequence] for sequence in sequences] == [[13], [18]] * 3
    assert [d.location for d in flat(sequences)] == [d.location for d in flat(Rows().step_batches(0))]
    shortest = sampler(write=lambda prompts, draws: [np.full(1, 7, np.int32) for _ in draws])
    assert [[len(d) for d in sequence] for sequence in shortest.step_batches(0)] == [[4, 9]] * 3


def test_no_document_is_longer_than_the_limit_and_one_without_room_stays():
    room = [document(i, MAX_LENGTH, [slice(MAX_LENGTH - 1 - i, MAX_LENGTH - 1)]) for i in (1, 3)]
    full = document(0, MAX_LENGTH + 1, [slice(MAX_LENGTH - 1, MAX_LENGTH)])
    silent = document(5, 6, [])
    greedy = sampler(
        rows=one_step([*room, full, silent]), write=lambda prompts, draws: [np.full(len(d), 7) for d in draws]
    )
    after = flat(greedy.step_batches(0))
    assert [(len(d), d.student_generated) for d in after] == [(24, True), (24, True), (25, False), (6, False)]
    assert [d.target_tokens for d in after[:2]] == [1, 3]


def test_each_turn_of_a_conversation_is_answered_equally_often():
    turns = [slice(3, 5), slice(7, 8), slice(9, 11)]
    rows = one_step([document(i, 12, turns) for i in range(1500)])
    prompts = [int((d.ids < 500).sum()) for d in flat(sampler(rows=rows).step_batches(0))]
    counts = {prompt: prompts.count(prompt) for prompt in sorted(set(prompts))}
    assert list(counts) == [4, 8, 10]
    assert all(abs(count - 500) < 4 * (1500 * 2 / 9) ** 0.5 for count in counts.values())
    assert all(
        (d.labels[: int((d.ids < 500).sum()) - 1] == IGNORE_INDEX).all()
        for d in flat(sampler(rows=rows).step_batches(0))
    )


def test_an_answer_keeps_the_weight_of_the_answer_it_replaces():
    weights = np.zeros(12, np.float32)
    weights[7:11] = 0.25
    (after,) = flat(sampler(rows=one_step([document(0, weights=weights)])).step_batches(0))
    assert after.weights is not None and len(after.weights) == len(after.ids)
    assert (after.weights[after.labels != IGNORE_INDEX] == 0.25).all()


def test_all_else_comes_from_the_sampler():
    rows = Rows()
    own = sampler(rows=rows)
    assert (own.digest, own.steps_for(2)) == ("rows", 14)
    own.close()
    assert rows.closed == [True]


def test_steps_ahead_cannot_be_combined_with_on_policy():
    settings = ["distill.objective=recover", "distill.on_policy=0.5", "distill.teacher.placement=streamed"]
    assert load_config("quickstart.yaml", settings).distill.on_policy == 0.5
    with pytest.raises(ConfigError, match=r"distill\.teacher\.steps_ahead"):
        load_config("quickstart.yaml", [*settings, "distill.teacher.steps_ahead=2"])
