"""Laws of learning from rewards: sampled = trained, packed = alone, two ranks = one, resumed = unbroken."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from finetune import load_config, train
from finetune.config.schema import RunConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.loader import load_chat_template, load_data
from finetune.data.packing import MapSampler, SequenceOrder
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.generation import sample_answers
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.folder import list_checkpoints
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.objectives.policies import base_policy
from finetune.objectives.reinforcement import PolicyLoss
from finetune.objectives.rewards import Rewards
from finetune.objectives.rollouts import Rollouts
from finetune.system.errors import FinetuneError, Interrupted
from tests.commands import train_on_ranks
from tests.equivalence.test_preference import FP32, check_close
from tests.runs import REWARDED_RUN, check_same_metrics, differing, metrics

SMALL = (*REWARDED_RUN, "train.max_steps=4", "train.eval_every=2")


def small(folder: Path, *overrides: str) -> RunConfig:
    return load_config("quickstart.yaml", [*SMALL, f"output_dir={folder}", *overrides])


def policy(cfg: RunConfig) -> PeftModel:
    """A model whose adapter does something, with the fast path, in training mode."""
    model = attach_lora(load_base(cfg.model, cfg.quant, torch.device("cpu"), print), cfg.lora)
    fuse_layers(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def rollouts(cfg: RunConfig, model: PeftModel, ranks: int = 1) -> Rollouts:
    """Groups whose rewards are the number of the answer in its step, over 7."""
    chat = load_chat_template(cfg.data, load_tokenizer(cfg.model))
    documents = load_data(Preparation(cfg.data, chat, objective="reward")).documents
    order = SequenceOrder(documents.lengths, np.ones(len(documents)), None, cfg.train.batch_size, 0)

    def write(prompts, draws):
        options = {"stop_ids": chat.stop_ids(), "temperature": cfg.reward.temperature}
        return sample_answers(model, prompts, draws, vocabulary=base_of(model).config.vocab_size, **options)

    def judge(rows: Sequence[Document], answers: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        return np.array([[len(ids) % 7 + ids.sum() % 5] for group in answers for ids in group], dtype=np.float64)

    return Rollouts(
        MapSampler(documents, order),
        write,
        judge,
        Rewards(("made up",), (1.0,), ("",), ()),
        cfg.reward,
        max_length=cfg.data.max_length,
        packing=True,
        stop_ids=frozenset(chat.stop_ids()),
        seed=0,
        ranks=ranks,
    )


@pytest.mark.parametrize("settings", [FP32, (*FP32, "reward.temperature=0.7"), (*FP32, "quant.type=none"), ()])
def test_the_update_computes_the_probabilities_that_sampling_used(tmp_path, settings):
    """To 1e-4 of a nat at every token in fp32. In bf16 the products of one token and of many round differently."""
    cfg = small(tmp_path, *settings)
    model = policy(cfg)
    sampler, loss = rollouts(cfg, model), PolicyLoss(model, cfg.reward, None)
    tokens = 0
    for sequence in sampler.step_batches(0):
        batch = build_batch(sequence, share_prefixes=True)
        assert batch.rows < batch.tokens, "nothing is shared"
        assert torch.isfinite(loss(batch))
        tokens += len(batch.targets)
    gap = loss.take_sums()[3].item()
    assert tokens > 40
    # Logits of bf16 are exact to 2**-8 of their size, about 10.
    assert gap <= (1e-4 if settings else 0.08)


@pytest.mark.parametrize("loss_name", ["grpo", "dr_grpo", "dapo"])
def test_packed_groups_equal_answers_alone(tmp_path, loss_name):
    """Loss and gradients of groups that share their prompt are those of the answers one by one, without sharing."""
    cfg = small(tmp_path, *FP32, "quant.type=none", f"reward.loss={loss_name}", "reward.beta=0.1", "reward.updates=2")
    model = policy(cfg)
    documents = [document for sequence in rollouts(cfg, model).step_batches(0) for document in sequence]
    tokens = sum(document.target_tokens for document in documents)
    drift_N = torch.empty(tokens).uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(1))

    def result(groups: list[list[Document]], share: bool) -> tuple[float, list[torch.Tensor]]:
        """Of a first update, and of a second one that clips: the policy has drifted by then."""
        loss, total = PolicyLoss(model, cfg.reward, base_policy(model)), 0.0
        batches = [build_batch(group, share_prefixes=share) for group in groups]
        for update in range(2):
            loss.start(update)
            model.zero_grad()
            if update:
                drifts = drift_N.split([len(old_N) for old_N, _ in loss._stored])
                loss._stored = [(old_N + d, r) for (old_N, r), d in zip(loss._stored, drifts, strict=True)]
            for batch in batches:
                value = loss(batch)
                value.backward()
                total += value.item()
        return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    shared = result([documents], True)
    alone = result([[document] for document in documents], False)
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    for found, expected in zip(shared[1], alone[1], strict=True):
        # Sums of about 1,000 fp32 products in another order: sqrt(1000) * 2**-24 = 2e-6.
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_group_in_several_sequences_is_the_group(tmp_path):
    cfg = small(tmp_path, *FP32)
    sampler = rollouts(cfg, policy(cfg))
    whole = [document for sequence in sampler.step_batches(0) for document in sequence]
    longest = max(map(len, whole))
    short = replace(sampler, max_length=longest, _round=-1)
    sequences = short.step_batches(0)
    assert len(sequences) > cfg.train.batch_size
    for sequence in sequences:
        assert build_batch(sequence, share_prefixes=True).rows <= longest
    for a, b in zip(whole, [document for sequence in sequences for document in sequence], strict=True):
        assert a.ids.tolist() == b.ids.tolist() and a.judged.advantage == b.judged.advantage


def test_answers_that_cannot_teach_are_left_out_and_counted(tmp_path):
    cfg = small(tmp_path, *FP32)
    model = policy(cfg)
    sampler = rollouts(cfg, model)
    equal = replace(sampler, judge=lambda rows, answers: np.ones((sum(map(len, answers)), 1)), _round=-1)
    [[only]] = equal.step_batches(0)
    assert only.judged is None and equal.figures["equal_groups"] == 1
    cfg_all = cfg.reward.model_copy(update={"skip_unfinished": True, "beta": 0.1, "max_new_tokens": 1})
    cut = replace(sampler, cfg=cfg_all, stop_ids=frozenset(), _round=-1)
    [[unfinished]] = cut.step_batches(0)
    assert PolicyLoss(model, cfg_all, None)(build_batch([unfinished])).item() == 0
    assert len(equal.lengths_A) == 12
    kept = replace(equal, cfg=cfg.reward.model_copy(update={"beta": 0.1}), _round=-1)
    assert sum(map(len, kept.step_batches(0))) == 12, "the divergence from the reference needs every answer"
    skipping = replace(sampler, cfg=cfg.reward.model_copy(update={"skip_unfinished": True}), _round=-1)
    trained = [document for sequence in skipping.step_batches(0) for document in sequence]
    assert 0 < skipping.figures["unfinished"] < 1
    assert all(document.ids[-1] in sampler.stop_ids for document in trained)
    assert (skipping.lengths_A == 0).mean() == pytest.approx(skipping.figures["unfinished"])


def test_two_ranks_equal_one(tmp_path):
    """Three prompts in a step: the ranks sample and train different numbers of them."""
    settings = (*SMALL, *FP32, "train.max_steps=2", "reward.beta=0.05")
    train(load_config("quickstart.yaml", [*settings, f"output_dir={tmp_path / '1'}", "train.world_size=1"]))
    train_on_ranks(2, *settings, f"output_dir={tmp_path / '2'}", "train.world_size=2")
    # Adam turns a sum's last bits into an error of the weight's own size.
    check_close(tmp_path / "2", tmp_path / "1", 1e-4)
    check_same_metrics(tmp_path / "1", tmp_path / "2", "train/sampling_gap")


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    """Two updates on the same answers; the continuation samples those of the next round anew."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(small(whole, "reward.updates=2"))
    train(small(broken, "reward.updates=2", "train.max_steps=2"))
    train(small(broken, "reward.updates=2", "train.resume=auto"))
    assert not differing(whole, broken)
    later = metrics(whole)[2:]
    assert [line["train/reward"] for line in later] == [line["train/reward"] for line in metrics(broken)[2:]]
    assert later[1]["train/clipped"] >= 0 and later[0]["train/reward_std"] > 0


def test_a_stop_waits_for_the_last_update_on_the_same_answers(tmp_path):
    """Which only the weights before the first one could sample again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = (
        "reward.updates=3",
        "train.max_steps=6",
        "train.eval_every=null",
        "data.eval=[]",
        "generation.num_examples=0",
    )
    train(small(whole, *words), reward_functions=[stopping])
    STOPS.append(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(small(broken, *words), reward_functions=[stopping])
    assert [path.name for path in list_checkpoints(broken)] == ["checkpoint-3"]
    train(small(broken, *words, "train.resume=auto"), reward_functions=[stopping])
    assert not differing(whole, broken)


STOPS: list[signal.Signals] = []


def stopping(completions, **columns):
    """Stop this process in the first round, if told so."""
    while STOPS:
        os.kill(os.getpid(), STOPS.pop())
    return [0.0] * len(completions)


def test_rewards_that_never_differ_are_warned_of_and_end_in_their_own_error(tmp_path, capsys):
    """Not in a corrupt adapter: LoRA's B stays zero."""
    cfg = small(tmp_path, "train.max_steps=6", "data.eval=[]", "train.eval_every=null", "generation.num_examples=0")
    with pytest.raises(FinetuneError, match="equal rewards") as error:
        train(
            cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"functions": {}})}), reward_functions=[same]
        )
    assert "help:" in str(error.value)
    assert "WARNING: reward" in capsys.readouterr().err


def same(completions, **columns):
    return [1.0] * len(completions)
