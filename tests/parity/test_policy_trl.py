"""The losses of GRPO equal those of TRL's GRPOTrainer and their formulas in float64, in value and every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.sections import RewardConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.generation import SampledIds
from finetune.losses.policy import group_advantages, normalization
from finetune.models.fused import fuse_layers
from finetune.objectives.policies import base_policy
from finetune.objectives.reinforcement import PolicyLoss
from finetune.objectives.rewards import build_rewards
from finetune.objectives.rollouts import Rollouts
from finetune.ops import attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer

GROUP, END = 4, 882
# Prompt, answers with their rewards. The one without an end reached the limit. The last group's rewards are equal.
TEXTS = {
    "Say a number below ten.": {" 7": 1.0, " It is 3.": 0.25, " Seven is below ten.": -0.5, " 1, 2, 3, 4, 5,": 0.0},
    "Reverse the list: 1, 2": {" 2, 1": 1.0, " 1, 2": 0.0, " The list is 2, 1 now.": 1.0, " no": 0.1},
    "x": {" a b c": 0.5, " b": 0.5, " It is x, of course": 0.5, " c, d": 0.5},
}
UNFINISHED = " 1, 2, 3, 4, 5,"
# TRL and ours in fp32 are up to 1e-5 from float64 in a gradient's norm.
TOLERANCE = 2e-5
LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
LOSSES = ("grpo", "dr_grpo", "dapo")
CASES: dict[str, dict[str, Any]] = {
    **{f"{loss}, beta={beta}": {"loss": loss, "beta": beta} for loss in LOSSES for beta in (0.0, 0.04)},
    **{f"{loss}, unfinished": {"loss": loss, "skip_unfinished": True} for loss in LOSSES},
    "two bounds": {"loss": "dapo", "clip_high": 0.28},
    "temperature": {"loss": "grpo", "temperature": 0.7, "beta": 0.04},
    "first update": {"loss": "grpo", "beta": 0.04, "updates": 1},
}


@dataclass(frozen=True)
class Group:
    """A prompt, the answers that another policy wrote, and their rewards. finished: not cut at the limit."""

    prompt: list[int]
    answers: list[list[int]]
    rewards: list[float]
    finished: list[bool]


@dataclass(frozen=True)
class Result:
    """clipped: number of tokens. divergence: mean over the tokens."""

    loss: float
    gradients: dict[str, Tensor]
    clipped: float
    divergence: float


@pytest.fixture(scope="module")
def base(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def groups(base: Path) -> list[Group]:
    encode = AutoTokenizer.from_pretrained(base).encode
    return [
        Group(
            encode(prompt),
            [encode(text) + [END] * (text != UNFINISHED) for text in answers],
            [*answers.values()],
            [text != UNFINISHED for text in answers],
        )
        for prompt, answers in TEXTS.items()
    ]


def settings_of(groups: Sequence[Group], settings: dict[str, Any]) -> RewardConfig:
    limit = max(len(answer) for group in groups for answer in group.answers)
    return RewardConfig(
        **{"functions": {"exact": 1.0}, "group_size": GROUP, "max_new_tokens": limit, "updates": 2, **settings}
    )


def load(base: Path, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=implementation)


@torch.no_grad()
def set_adapter(model: torch.nn.Module, update: int = 0) -> None:
    """Set an adapter that is neither new nor symmetric, as it is at this update on the same answers."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        start, change = torch.randn(2, *parameter.shape, generator=generator)
        parameter.copy_(0.03 * start + 0.025 * update * change)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def trainer_of(cfg: RewardConfig, base: Path, folder: Path, groups: Sequence[Group]) -> GRPOTrainer:
    """Build TRL's trainer for one batch of all answers."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        return {
            "prompt_ids": [group.prompt for group in groups for _ in group.answers],
            "completion_ids": [answer for group in groups for answer in group.answers],
            "logprobs": None,
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rollout_func is experimental
        return GRPOTrainer(
            model=load(base, "sdpa"),
            reward_funcs=lambda completions, **_: [reward for group in groups for reward in group.rewards],
            args=GRPOConfig(
                output_dir=str(folder),
                bf16=False,
                use_cpu=True,
                report_to=[],
                gradient_checkpointing=False,
                per_device_train_batch_size=GROUP * len(groups),
                num_generations=GROUP,
                num_iterations=cfg.updates,
                max_completion_length=cfg.max_new_tokens,
                temperature=cfg.temperature,
                beta=cfg.beta,
                epsilon=cfg.clip_low,
                epsilon_high=cfg.clip_high,
                loss_type=cfg.loss,
                scale_rewards="none" if cfg.loss == "dr_grpo" else "group",
                mask_truncated_completions=cfg.skip_unfinished,
                # TRL's default multiplies the divergence by the ratio (arXiv:2512.02556); GRPO's paper does not.
                use_bias_correction_kl=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in TEXTS]),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LORA,
            rollout_func=rollout,
        )


def trl_result(trainer: GRPOTrainer, cfg: RewardConfig) -> tuple[Result, np.ndarray]:
    """Return what TRL computes in the last update on the answers, and its advantages of them."""
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    trainer.model.train()
    set_adapter(trainer.model)
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in TEXTS for _ in range(GROUP)])
    assert ("old_per_token_logps" in inputs) == (cfg.updates > 1)
    set_adapter(trainer.model, cfg.updates - 1)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    clipped = metrics["clip_ratio/region_mean"] * inputs["completion_mask"].sum().item()
    result = Result(loss.item(), gradients_of(trainer.model), clipped, metrics.get("kl", 0.0))
    return result, inputs["advantages"].numpy().reshape(-1, GROUP)


def log_probs(model: torch.nn.Module, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    """Return the log-probability of each token of an answer [T], by transformers, without padding."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def exact_result(model: peft.PeftModel, cfg: RewardConfig, groups: Sequence[Group]) -> Result:
    """The formulas in float64: arXiv:2402.03300, eq. 3 and 4; divisors of 2503.20783 and 2503.14476."""
    kept = [
        (group, answer, reward)
        for group in groups
        for answer, reward, finished in zip(group.answers, group.rewards, group.finished, strict=True)
        if finished or not cfg.skip_unfinished
    ]
    tokens, answers = sum(len(answer) for _, answer, _ in kept), GROUP * len(groups)
    low, high = 1 - cfg.clip_low, 1 + (cfg.clip_high or cfg.clip_low)
    total, clipped, divergences = torch.zeros((), dtype=torch.float64), 0, 0.0
    for group, answer, reward in kept:
        rewards = np.array(group.rewards)
        advantage = reward - rewards.mean()
        if cfg.loss != "dr_grpo":
            advantage /= rewards.std(ddof=1) + 1e-4
        with torch.no_grad():
            set_adapter(model)
            old = log_probs(model, group.prompt, answer, cfg.temperature)
            with model.disable_adapter():
                reference = log_probs(model, group.prompt, answer, cfg.temperature)
        set_adapter(model, cfg.updates - 1)
        now = log_probs(model, group.prompt, answer, cfg.temperature)
        ratio = (now - old).exp()
        bounded = ratio.clamp(low, high) * advantage
        divergence = (reference - now).exp() - (reference - now) - 1
        clipped += int((bounded < ratio * advantage).sum())
        divergences += divergence.sum().item() if cfg.beta else 0.0
        divisor = {"grpo": answers * len(answer), "dr_grpo": answers * cfg.max_new_tokens, "dapo": tokens}[cfg.loss]
        part = (-torch.minimum(ratio * advantage, bounded) + cfg.beta * divergence).sum() / divisor
        part.backward()
        total += part.detach()
    result = Result(total.item(), gradients_of(model), clipped, divergences / tokens)
    model.zero_grad()
    return result


class Prompts:
    """A sampler of one step with all prompts."""

    digest = ""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    def step_batches(self, step: int) -> list[list[Document]]:
        return [[self.document(group.prompt)] for group in self.groups]

    def document(self, prompt: list[int]) -> Document:
        labels = [IGNORE_INDEX] * (len(prompt) - 1) + [END, IGNORE_INDEX]
        return Document(np.array([*prompt, END], np.int32), np.array(labels, np.int32), "row")

    def steps_for(self, epochs: float) -> int:
        return 1

    def close(self) -> None:
        """Nothing works in the background."""


def rollouts_of(cfg: RewardConfig, groups: Sequence[Group]) -> Rollouts:
    """Return our sampler, with the given answers and rewards."""
    by_prompt = {tuple(group.prompt): group for group in groups}

    def write(prompts: Sequence[np.ndarray], draws: Sequence[np.ndarray]) -> list[list[SampledIds]]:
        found = [by_prompt[tuple(prompt.ids.tolist())].answers for prompt in prompts]
        return [[SampledIds(np.array(ids, np.int32), np.zeros(len(ids), np.float32)) for ids in some] for some in found]

    def judge(documents: Sequence[Document], answers: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        found = [by_prompt[tuple(document.ids[:-1].tolist())].rewards for document in documents]
        return np.concatenate(found)[:, None]

    options: dict[str, Any] = {"max_length": 4096, "packing": True, "stop_ids": frozenset([END]), "seed": 0}
    return Rollouts(Prompts(groups), write, judge, build_rewards(cfg), cfg, **options)


def our_result(model: peft.PeftModel, cfg: RewardConfig, batches: Sequence[Batch], rollouts: Rollouts) -> Result:
    """Return what we compute in the last update on the answers."""
    loss = PolicyLoss(model, cfg, base_policy(model) if cfg.beta else None)
    total = torch.zeros(())
    for update in range(cfg.updates):
        set_adapter(model, update)
        model.zero_grad()
        loss.start(update)
        loss.take_sums()
        total = torch.stack([loss(batch) for batch in batches]).sum() / normalization(rollouts.lengths_A, cfg)
        total.backward()
    clipped, divergence, tokens, _ = loss.take_sums().tolist()
    return Result(total.item(), gradients_of(model), clipped, divergence / tokens)


def check_equal(found: Result, expected: Result) -> None:
    """Compare values, and gradients relative to the norm of each tensor."""
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=TOLERANCE)
    assert found.clipped == pytest.approx(expected.clipped)
    assert found.divergence == pytest.approx(expected.divergence, rel=TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.any(), name
        assert (found.gradients[name].double() - gradient.double()).norm() <= TOLERANCE * gradient.norm(), name


@pytest.fixture(scope="module")
def exact(base: Path) -> peft.PeftModel:
    """The model in float64."""
    return peft.get_peft_model(load(base, "sdpa"), LORA).double()


@pytest.fixture(scope="module")
def ours(base: Path) -> peft.PeftModel:
    """The model on our kernels."""
    attention.register()
    model = peft.get_peft_model(load(base, attention.SEGMENTED), LORA)
    fuse_layers(model)
    return model.train()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_trl_and_of_the_formula(settings, base, groups, exact, ours, tmp_path):
    cfg = settings_of(groups, settings)
    trl, advantages = trl_result(trainer_of(cfg, base, tmp_path, groups), cfg)
    formula = exact_result(exact, cfg, groups)
    assert (formula.clipped > 3) == (cfg.updates > 1), "nothing is clipped"
    check_equal(trl, formula)

    given = group_advantages(np.array([group.rewards for group in groups]), cfg.loss)
    np.testing.assert_allclose(given, advantages, rtol=1e-6, atol=1e-6)
    rollouts = rollouts_of(cfg, groups)
    [sequence] = rollouts.step_batches(cfg.updates - 1)
    batch = build_batch(sequence, share_prefixes=True)
    assert batch.rows < batch.tokens, "nothing is shared"
    result = our_result(ours, cfg, [batch], rollouts)
    check_equal(result, formula)
    check_equal(result, trl)
