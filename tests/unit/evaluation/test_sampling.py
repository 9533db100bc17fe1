"""Answers follow the model's own probabilities, token by token, whatever is answered beside them."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

from finetune.data.encoded import Prompt
from finetune.evaluation import generation
from finetune.evaluation.generation import draw_tokens, sample_answers
from finetune.models.fused import fuse_layers
from tests.models import prompts_of, random_qwen2

WORDS, STOP = 97, 5


@pytest.fixture(scope="module")
def model():
    """A model in training mode with an adapter that does something, dropout, and the fast path."""
    adapted = peft.get_peft_model(
        random_qwen2(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.3)
    )
    fuse_layers(adapted)
    return adapted.train()


def prompts_and_draws(count: int, seed: int = 0, tokens: int = 7) -> tuple[list[Prompt], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    prompts = prompts_of(rng.integers(WORDS, size=rng.integers(1, 12), dtype=np.int32) for _ in range(count))
    return prompts, [rng.random(rng.integers(1, tokens + 1)) for _ in range(count)]


def answer(model, prompts, draws, stop_ids=(STOP,), vocabulary=WORDS, temperature=1.0) -> list[list[int]]:
    options = {"stop_ids": stop_ids, "vocabulary": vocabulary, "temperature": temperature}
    answers = sample_answers(model, prompts, [d[None] for d in draws], **options)
    assert all(a.ids.dtype == np.int32 for [a] in answers)
    return [a.ids.tolist() for [a] in answers]


@torch.no_grad()
def probabilities(model, ids: list[int], vocabulary: int = WORDS, temperature: float = 1.0) -> np.ndarray:
    """The next token's, of the whole sequence alone, by transformers' own forward pass."""
    modes = [(module, module.training) for module in model.modules()]
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1, :vocabulary].double()
    for module, training in modes:
        module.training = training
    return (logits / temperature).softmax(-1).numpy()


def reference(model, prompt: Prompt, draws: np.ndarray, vocabulary: int, temperature: float) -> list[int]:
    """One prompt by itself, without a cache."""
    ids, written = prompt.ids.tolist(), []
    for draw in draws:
        cumulated = probabilities(model, ids + written, vocabulary, temperature).cumsum()
        written.append(int(np.searchsorted(cumulated, draw * cumulated[-1], side="right")))
        if written[-1] == STOP:
            break
    return written


@pytest.mark.parametrize(("vocabulary", "temperature"), [(WORDS, 1.0), (WORDS, 3.0), (40, 0.7)])
def test_an_answer_is_that_of_its_prompt_alone_without_a_cache(model, vocabulary, temperature):
    prompts, draws = prompts_and_draws(24)
    answers = answer(model, prompts, draws, vocabulary=vocabulary, temperature=temperature)
    expected = [reference(model, p, d, vocabulary, temperature) for p, d in zip(prompts, draws, strict=True)]
    assert answers == expected
    assert max(token for a in answers for token in a) < vocabulary
    assert len({len(a) for a in answers}) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("answers", [64, 8])
def test_answers_to_one_prompt_are_those_to_copies_of_it(model, monkeypatch, answers, temperature):
    """With the log-probability of every token, when the prompt is computed once."""
    monkeypatch.setattr(generation, "SAMPLED_ANSWERS", answers)
    prompts, _ = prompts_and_draws(6)
    draws = list(np.random.default_rng(5).random((6, 5, 7)))
    options = {"stop_ids": (STOP,), "vocabulary": WORDS, "temperature": temperature}
    groups = sample_answers(model, prompts, draws, **options)
    alone = answer(model, [prompt for prompt in prompts for _ in range(5)], list(np.concatenate(draws)), **options)
    assert [a.ids.tolist() for group in groups for a in group] == alone
    for prompt, group in zip(prompts, groups, strict=True):
        for found in group:
            contexts = [[*prompt.ids.tolist(), *found.ids[:t].tolist()] for t in range(len(found.ids))]
            expected = [
                probabilities(model, context, temperature=temperature)[token]
                for context, token in zip(contexts, found.ids, strict=True)
            ]
            assert found.log_probs == pytest.approx(np.log(expected), abs=1e-5)


@pytest.mark.parametrize("limits", [(1, 10**6), (3, 10**6), (64, 1), (64, 60)])
def test_batches_change_no_answer(model, monkeypatch, limits):
    prompts, draws = prompts_and_draws(20)
    together = answer(model, prompts, draws)
    monkeypatch.setattr(generation, "SAMPLED_ANSWERS", limits[0])
    monkeypatch.setattr(generation, "SAMPLED_TOKENS", limits[1])
    assert answer(model, prompts, draws) == together
    assert answer(model, prompts[::-1], draws[::-1]) == together[::-1]
    assert answer(model, prompts[4:9], draws[4:9]) == together[4:9]


def test_batches_hold_what_the_limits_allow(monkeypatch):
    monkeypatch.setattr(generation, "SAMPLED_ANSWERS", 3)
    monkeypatch.setattr(generation, "SAMPLED_TOKENS", 40)
    batches = list(generation._batches([9, 3, 50, 3, 4, 3, 11], [2, 2, 2, 2, 7, 2, 2], 1))
    assert batches == [[1, 3, 5], [4, 0], [6], [2]]


def test_it_ends_with_a_stop_token_or_when_its_draws_are_used_up(model):
    prompts, draws = prompts_and_draws(60, tokens=12)
    stops = tuple(range(0, WORDS, 6))
    answers = answer(model, prompts, draws, stop_ids=stops)
    stopped = [a[-1] in stops for a in answers]
    assert 10 < sum(stopped) < 60
    for tokens, given, ended in zip(answers, draws, stopped, strict=True):
        assert len(tokens) == len(given) or (ended and len(tokens) < len(given))
        assert not set(tokens[:-1]) & set(stops)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(model, temperature):
    """Chi-square of the first token of 4,000 answers to one prompt, and of the second after the commonest first."""
    [prompt] = prompts_of([[3, 14, 15, 92]])
    draws = list(np.random.default_rng(1).random((4000, 2)))
    answers = answer(model, [prompt] * 4000, draws, stop_ids=(), temperature=temperature)
    firsts = [first for first, _ in answers]
    common = max(set(firsts), key=firsts.count)
    seconds = [second for first, second in answers if first == common]
    assert len(seconds) > 200
    for tokens, context in ((firsts, prompt.ids.tolist()), (seconds, [*prompt.ids.tolist(), common])):
        expected = probabilities(model, context, temperature=temperature) * len(tokens)
        counts = np.bincount(tokens, minlength=WORDS)
        frequent = expected >= 5
        cells = np.append(expected[frequent], expected[~frequent].sum())
        found = np.append(counts[frequent], counts[~frequent].sum())
        square = ((found - cells) ** 2 / cells).sum()
        freedom = len(cells) - 1
        assert freedom > 5
        # Four standard deviations of a chi-square.
        assert square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_draw_takes_the_stretch_it_lies_in():
    never = float("-inf")
    logits = torch.tensor([never, 0.0, never, 0.0, 0.0, never]).repeat(5, 1)
    draws = torch.tensor([0.0, 1 / 3 - 1e-9, 1 / 3 + 1e-9, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, draws, 1.0)[0].tolist() == [1, 1, 3, 3, 4]


@pytest.mark.parametrize("block", [1, 7, WORDS - 1, WORDS, 512])
def test_a_token_found_by_its_block_is_that_of_the_whole_row(monkeypatch, block):
    monkeypatch.setattr(generation, "_DRAW_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(2000, WORDS, generator=generator)
    draws = torch.rand(2000, dtype=torch.float64, generator=generator)
    probs = (logits.double() / 0.7).softmax(-1)
    expected = torch.searchsorted(probs.cumsum(-1), draws[:, None], right=True)
    ids, log_probs = draw_tokens(logits, draws, 0.7)
    assert ids.tolist() == expected.squeeze(1).tolist()
    assert log_probs == pytest.approx(probs.gather(1, expected).log().squeeze(1), abs=3e-6)


def test_rows_that_are_drawn_block_by_block_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, draws = (
        torch.randn(50, WORDS, generator=generator),
        torch.rand(50, dtype=torch.float64, generator=generator),
    )
    whole = draw_tokens(logits.clone(), draws, 1.0)
    monkeypatch.setattr(generation, "ROWS_DRAWN", 7)
    assert all(map(torch.equal, draw_tokens(logits, draws, 1.0), whole))


def test_nothing_of_the_model_or_of_chance_is_touched(model):
    prompts, draws = prompts_and_draws(6)
    modes = [module.training for module in model.modules()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(7)
    np.random.seed(7)
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    answer(model, prompts, draws)
    assert torch.equal(torch.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    assert [module.training for module in model.modules()] == modes and model.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert answer(model, [], []) == []
