"""The choice of tokens: parity with transformers' processors, and the laws of draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as processors

from finetune.serving.engine import sampling as module
from finetune.serving.engine.drawing import Draw, draw_ids, largest, most_probable
from finetune.serving.engine.sampling import BatchSampler, RowState
from finetune.serving.request import Finished, Request, Sampling, Token
from finetune.system.errors import InputError

PROMPT = (5, 6, 7, 7, 300)
SAMPLER = BatchSampler(1000)


def logits(rows: int, vocabulary: int = 1000, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def start(*, log_probs: int | None = None, written: tuple[int, ...] = (), **of) -> RowState:
    row = SAMPLER.start(Request(PROMPT, 64, sampling=Sampling(**of), log_probs=log_probs))
    for token in written:
        row.append(token)
    return row


def distribution_by_transformers(logits_V: Tensor, written: tuple[int, ...], of: Sampling) -> Tensor:
    """The distribution that transformers samples from. Frequency and presence penalties are OpenAI's formula."""
    ids, scores = torch.tensor([[*PROMPT, *written]]), logits_V[None].clone()
    if of.repetition_penalty != 1:
        scores = processors.RepetitionPenaltyLogitsProcessor(of.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(written, dtype=torch.long), minlength=len(logits_V))
    scores = scores - of.frequency_penalty * counts - of.presence_penalty * (counts > 0)
    scores = processors.TemperatureLogitsWarper(of.temperature)(ids, scores)
    if of.top_k:
        scores = processors.TopKLogitsWarper(of.top_k)(ids, scores)
    if of.top_p < 1:
        scores = processors.TopPLogitsWarper(of.top_p)(ids, scores)
    return scores.double().softmax(1)[0]


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 2.5, "top_k": 500},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 5.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 3.0, "top_k": 400, "top_p": 0.99, "repetition_penalty": 1.3},
    {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 1.5, "repetition_penalty": 0.8},
    {"temperature": 1.0, "presence_penalty": -1.0, "top_p": 0.9},
]


@pytest.mark.parametrize("of", SETTINGS, ids=str)
def test_draws_in_the_interval_of_a_token_choose_it(of):
    """In the order of ids, each token has an interval of [0, 1) as long as its probability in transformers."""
    scores, written = logits(1)[0], (3, 3, 9)
    scores -= scores.max()
    scores[[3, 9, 300]] = torch.tensor([1.0, -0.5, -1.0])  # of answer and prompt: penalties of both signs show
    expected = distribution_by_transformers(scores, written, Sampling(**of))
    ends = expected.cumsum(0)
    kept = torch.nonzero(expected > 1e-5).flatten().tolist()
    some = kept[:: max(1, len(kept) // 40)]
    rows, tokens = [], []
    for token in some:
        for place in (0.02, 0.98):
            rows.append(start(written=written, **of))
            rows[-1]._random = Constant(float(ends[token] - expected[token] * place))
            tokens.append(token)
    assert [token.id for token in SAMPLER.choose(scores.expand(len(rows), -1), rows)] == tokens


class Constant:
    def __init__(self, number: float):
        self.number = number

    def random(self) -> float:
        return self.number


@given(st.integers(0, 2**32), st.integers(1, 700), st.sampled_from([0.1, 1.0, 20.0]), st.integers(0, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_the_kept_tokens_are_the_fewest_most_probable_ones_with_their_ties(seed, vocabulary, scale, top_k, data):
    """Rounded logits have many ties: all of a value are kept, or none."""
    top_p = data.draw(st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]))
    scores = logits(1, vocabulary, seed=seed, scale=scale).bfloat16().float()
    weights = scores[0].double().sub(scores.max()).exp()
    if 0 < top_k < vocabulary:
        weights = weights.where(scores[0] >= scores[0].topk(top_k).values[-1], 0)
    ordered = weights.sort(descending=True).values
    before = ordered.cumsum(0) - ordered
    limit = top_p * ordered.sum()
    if top_p < 1:
        if ((before - limit).abs() < 1e-5 * ordered.sum()).any():
            return  # rounding decides
        kept = ordered[: max(1, int((before < limit).sum()))]
        weights = weights.where(weights >= kept[-1], 0)
    shares = np.random.default_rng(seed).random(50)
    expected = torch.searchsorted(weights.cumsum(0), torch.from_numpy(shares) * weights.sum(), right=True)
    found = draw_ids(scores.expand(50, -1).clone(), [Draw(share, 1.0, top_k, top_p) for share in shares])
    sums = weights.cumsum(0) / weights.sum()
    for share, token, other in zip(shares, found.tolist(), expected.tolist(), strict=True):
        assert token == other or min(abs(sums[other] - share), abs(share - sums[max(other - 1, 0)])) < 1e-5


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_largest_values_equal_those_of_a_sort(seed, vocabulary, count):
    values = logits(3, vocabulary, seed=seed).bfloat16().float()
    found, places = largest(values, min(count, vocabulary))
    assert torch.equal(found, values.sort(1, descending=True).values[:, :count])
    assert torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == len(row) for row in places.tolist())
    best, ids = most_probable(values)
    assert torch.equal(best, values.amax(1))
    assert torch.equal(ids, values.argmax(1))


def mixed_rows(number: int) -> list[RowState]:
    every = [{}, *SETTINGS, {"repetition_penalty": 1.2}, {"presence_penalty": 0.4}]
    return [
        start(seed=i, log_probs=(None, 0, 3, 7)[i % 4], written=(i, 2 * i, i), **every[i % len(every)])
        for i in range(number)
    ]


def test_a_row_alone_and_in_any_batch_chooses_the_same_tokens():
    """Also when the other rows change from step to step, as after a preemption. 40 rows: more than one part.

    Rounded logits have more equal ones than top_k expects.
    """
    steps = [logits(40, seed=step) if step % 2 else logits(40, seed=step, scale=1.0).round() for step in range(6)]
    alone: dict[int, list] = {
        n: [SAMPLER.choose(scores[n : n + 1], [row])[0] for scores in steps] for n, row in enumerate(mixed_rows(40))
    }
    rows, generator = mixed_rows(40), np.random.default_rng(0)
    together: dict[int, list] = {n: [] for n in range(40)}
    while any(len(tokens) < 6 for tokens in together.values()):
        running = [int(n) for n in generator.permutation(40)[:25] if len(together[int(n)]) < 6]
        if running:
            scores = torch.stack([steps[len(together[n])][n] for n in running])
            for n, token in zip(running, SAMPLER.choose(scores, [rows[n] for n in running]), strict=True):
                together[n].append(token)
    for n in range(40):
        assert [token.id for token in together[n]] == [token.id for token in alone[n]]
        for one, other in zip(together[n], alone[n], strict=True):
            assert (one.log_prob is None) == (n % 4 == 0)
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-6)
            tops = [[top.log_prob for top in each.top] for each in (one, other)]  # of equal ones, any may come
            assert tops[0] == pytest.approx(tops[1], abs=1e-6)


def test_a_seed_decides_all_tokens_and_none_means_another_answer_each_time():
    scores = logits(1, scale=0.1)

    def answer(seed: int | None) -> list[int]:
        row = start(temperature=1.0, seed=seed)
        for _ in range(20):
            SAMPLER.choose(scores, [row])
        return row.ids

    assert answer(1) == answer(1) != answer(2)
    assert answer(-1) == answer(2**64 - 1)
    assert answer(None) != answer(None)


def test_the_draws_of_a_seed_are_those_of_rollouts():
    """The t-th number of numpy's generator of the seed decides the t-th token."""
    scores, row = logits(1, scale=0.1), start(temperature=1.0, seed=7)
    ends = scores[0].double().softmax(0).cumsum(0)
    expected = torch.searchsorted(ends, torch.from_numpy(np.random.default_rng(7).random(20))).tolist()
    assert [SAMPLER.choose(scores, [row])[0].id for _ in range(20)] == expected


def test_log_probabilities_are_the_models_before_all_settings_and_over_all_logits():
    scores = logits(3, 1024)
    scores[:, 1000:] = 20.0  # ids beyond the vocabulary
    rows = [
        start(log_probs=2),
        start(log_probs=5, temperature=0.2, top_k=1, presence_penalty=5.0, written=tuple(range(900))),
        start(),
    ]
    tokens = SAMPLER.choose(scores, rows)
    expected = scores.log_softmax(1)
    for n, count in ((0, 2), (1, 5)):
        token = tokens[n]
        assert isinstance(token, Token)
        assert token.log_prob == pytest.approx(float(expected[n, token.id]), abs=1e-5)
        top = expected[n, :1000].topk(count)
        assert [score.id for score in token.top] == top.indices.tolist()
        assert [score.log_prob for score in token.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert tokens[2] == Token(int(scores[2, :1000].argmax()))


@pytest.mark.parametrize("of", [{}, *SETTINGS, {"repetition_penalty": 2.0}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_end_their_row_only(of, bad):
    """A single NaN or infinity ends a row; minus infinity everywhere too, but not at some tokens."""
    scores = logits(3)
    expected = SAMPLER.choose(scores, [start(seed=i, log_probs=1, **of) for i in range(3)])
    scores[1, :: 1 if bad == -math.inf else 999] = bad
    rows = [start(seed=i, log_probs=1, **of) for i in range(3)]
    found = SAMPLER.choose(scores, rows)
    assert isinstance(found[1], Finished)
    assert found[1].reason == "error" and rows[1].ids == []
    assert [found[0], found[2]] == [expected[0], expected[2]]


def test_tokens_of_minus_infinity_are_never_drawn():
    scores = torch.full((1, 1000), -math.inf)
    scores[0, [3, 998]] = 0.0
    drawn = {SAMPLER.choose(scores, [start(temperature=2.0, seed=i)])[0].id for i in range(30)}
    assert drawn == {3, 998}


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6, 1e30, 1e300])
def test_extreme_temperatures_choose_a_token_of_the_vocabulary(temperature):
    scores = logits(1) * 100
    token = SAMPLER.choose(scores, [start(temperature=temperature, seed=1)])[0]
    assert isinstance(token, Token)
    assert token.id == int(scores.argmax()) or temperature > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_do_not_change_and_may_have_any_type(dtype):
    scores = logits(16).to(dtype)
    before = scores.clone()
    assert all(isinstance(token, Token) for token in SAMPLER.choose(scores, mixed_rows(16)))
    assert torch.equal(scores, before)


def test_greedy_rows_cost_one_search_for_all(monkeypatch):
    """Rows without settings never reach the code of single rows."""
    for name in ("_penalize", "_obey_grammars", "_choose_by_settings", "_scores"):
        monkeypatch.setattr(module, name, None)
    scores = logits(32)
    assert [token.id for token in SAMPLER.choose(scores, [start() for _ in range(32)])] == scores.argmax(1).tolist()


def test_an_engine_without_grammars_refuses_a_schema():
    with pytest.raises(InputError):
        start(grammar="{}")


def test_no_rows_give_no_tokens():
    assert SAMPLER.choose(logits(0), []) == []
