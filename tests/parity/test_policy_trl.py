"""The losses of GRPO equal those of TRL's GRPOTrainer and their formulas in float64, in value and every gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.sections import RewardConfig
from finetune.ops import attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer

GROUP = 4
# The last answer of the first group has no end: it reached the limit. The last group's rewards are equal.
GROUPS = {
    "Say a number below ten.": [
        " 7",
        " It is 3.",
        " Seven is below ten.",
        " 1, 2, 3, 4, 5,",
    ],
    "Reverse the list: 1, 2": [" 2, 1", " 1, 2", " The list is 2, 1 now.", " no"],
    "x": [" a b c", " b", " It is x, of course", " c, d"],
}
REWARDS = [1.0, 0.25, -0.5, 0.0, 1.0, 0.0, 1.0, 0.1, 0.5, 0.5, 0.5, 0.5]
UNFINISHED = 3
# Rounding in fp32 alone moves a gradient by up to 1.1e-5 of its largest entry.
TOLERANCE = 2e-5
LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """A sampled answer. old: log-probabilities of its tokens [T] when it was sampled, float64."""

    prompt: list[int]
    ids: list[int]
    old: Tensor


def adapted(base: Path, implementation: str, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=implementation)
    model = peft.get_peft_model(model, LORA)
    fill(model)
    return model.to(dtype)


def fill(model: torch.nn.Module) -> None:
    """Set an adapter that is neither new nor symmetric."""
    torch.manual_seed(3)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.05)


def log_probs(model: torch.nn.Module, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token of an answer [T], by transformers, without padding."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.fixture(scope="module")
def base(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def exact(base: Path) -> peft.PeftModel:
    """The model in float64."""
    return adapted(base, "sdpa", torch.float64)


def sample(base: Path, model: peft.PeftModel, temperature: float) -> list[Answer]:
    """Return answers of a policy that is not the current one: the ratios of probabilities are from 0.67 to 1.5."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers: list[Answer] = []
    torch.manual_seed(5)
    for prompt, texts in GROUPS.items():
        for text in texts:
            end = [] if len(answers) == UNFINISHED else [tokenizer.eos_token_id]
            prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"] + end
            with torch.no_grad():
                now = log_probs(model, prompt_ids, ids, temperature)
            answers.append(Answer(prompt_ids, ids, now + torch.empty_like(now).uniform_(-0.4, 0.4)))
    return answers


def trl_inputs(
    cfg: RewardConfig, base: Path, folder: Path, answers: list[Answer]
) -> tuple[GRPOTrainer, dict[str, Any]]:
    """Return TRL's trainer, and what it makes of the answers for its loss: masks, advantages, reference."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        return {
            "prompt_ids": [answer.prompt for answer in answers],
            "completion_ids": [answer.ids for answer in answers],
            "logprobs": None,
        }

    prompts = [{"prompt": prompt} for prompt in GROUPS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rollout_func is experimental
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=lambda completions, **_: REWARDS,
            args=GRPOConfig(
                output_dir=str(folder),
                bf16=False,
                use_cpu=True,
                report_to=[],
                gradient_checkpointing=False,
                per_device_train_batch_size=len(answers),
                num_generations=GROUP,
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
            train_dataset=Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LORA,
            rollout_func=rollout,
        )
    fill(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    inputs = trainer._generate_and_score_completions([row for row in prompts for _ in range(GROUP)])
    assert inputs["prompt_ids"].shape[0] == len(answers)
    padded = torch.nn.utils.rnn.pad_sequence([answer.old for answer in answers], batch_first=True)
    return trainer, inputs | {"old_per_token_logps": padded.float()}


def trl_result(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[float, Gradients]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def advantages_of(cfg: RewardConfig) -> Tensor:
    """Rewards minus their group's mean; divided by its deviation (plus 1e-4, as in TRL) except in dr_grpo."""
    groups = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
    centered = groups - groups.mean(1, keepdim=True)
    return (centered if cfg.loss == "dr_grpo" else centered / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def token_losses(cfg: RewardConfig, now: Tensor, answer: Answer, reference: Tensor, advantage: Tensor) -> Tensor:
    """Return the loss of each token [T]: the clipped ratio and k3, arXiv:2402.03300, eq. 3 and 4."""
    ratio = (now - answer.old).exp()
    high = cfg.clip_low if cfg.clip_high is None else cfg.clip_high
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + high)
    divergence = (reference - now).exp() - (reference - now) - 1
    return -torch.minimum(ratio * advantage, clipped * advantage) + cfg.beta * divergence


def exact_result(cfg: RewardConfig, model: peft.PeftModel, answers: list[Answer]) -> tuple[float, Gradients]:
    """The formula in float64. Sources of what it is divided by: arXiv:2402.03300, 2503.20783, 2503.14476."""
    kept = [i for i in range(len(answers)) if not (cfg.skip_unfinished and i == UNFINISHED)]
    tokens = sum(len(answers[i].ids) for i in kept)
    total = torch.zeros((), dtype=torch.float64)
    for i in kept:
        answer, advantage = answers[i], advantages_of(cfg)[i]
        now = log_probs(model, answer.prompt, answer.ids, cfg.temperature)
        with torch.no_grad(), model.disable_adapter():
            reference = log_probs(model, answer.prompt, answer.ids, cfg.temperature)
        share = {
            "grpo": 1 / (len(answers) * len(answer.ids)),
            "dr_grpo": 1 / (len(answers) * cfg.max_new_tokens),
            "dapo": 1 / tokens,
        }[cfg.loss]
        total = total + share * token_losses(cfg, now, answer, reference, advantage).sum()
    model.zero_grad()
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def check_equal(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    """Compare losses, and gradients relative to the largest entry of each tensor."""
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE, abs=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[1][name].double(), gradient.double(), rtol=0, atol=TOLERANCE * scale, msg=name)


LOSSES = ("grpo", "dr_grpo", "dapo")
CASES = {
    **{f"{loss}, beta={beta}": {"loss": loss, "beta": beta} for loss in LOSSES for beta in (0.0, 0.04)},
    "asymmetric clip": {"loss": "dapo", "clip_high": 0.28},
    "temperature": {"loss": "grpo", "temperature": 0.7, "beta": 0.04},
    **{f"{loss}, unfinished": {"loss": loss, "skip_unfinished": True} for loss in LOSSES},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_trl_computes_the_formula(settings: dict[str, Any], base: Path, tmp_path: Path, exact: peft.PeftModel):
    answers = sample(base, exact, settings.get("temperature", 1.0))
    limit = len(answers[UNFINISHED].ids)
    assert limit == max(len(answer.ids) for answer in answers)
    cfg = RewardConfig(functions={"exact": 1.0}, group_size=GROUP, max_new_tokens=limit, **settings)
    trainer, inputs = trl_inputs(cfg, base, tmp_path, answers)
    torch.testing.assert_close(inputs["advantages"].double(), advantages_of(cfg), rtol=1e-6, atol=1e-6)
    check_equal(trl_result(trainer, inputs), exact_result(cfg, exact, answers))
