"""Answers of a server: sampled by the adapter in training, of which the server gets the adapter's file alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import load_config, train
from finetune.data.loader import load_chat_template
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError, ResourceError
from tests.equivalence.test_preference import FP32
from tests.equivalence.test_rewards import SMALL
from tests.rollout_vllm import RolloutVllm
from tests.runs import metrics

SERVER = (
    "reward.engine=server",
    "train.max_steps=2",
    "train.eval_every=null",
    "data.eval=[]",
    "generation.num_examples=0",
)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's client without vLLM, of which it needs nothing here."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda **_: True)


def config(folder: Path, url: str, *overrides: str):
    return load_config(
        "quickstart.yaml", [*SMALL, *FP32, *SERVER, f"reward.url={url}", f"output_dir={folder}", *overrides]
    )


def server(folder: Path, **options) -> RolloutVllm:
    cfg = config(folder, "http://localhost:1")
    base = load_base(cfg.model, cfg.quant, torch.device("cpu"), print)
    tokenizer = load_tokenizer(cfg.model)
    return RolloutVllm(base, set(load_chat_template(cfg.data, tokenizer).stop_ids()), **options)


def test_the_server_samples_with_the_adapter_in_training(client, tmp_path):
    with server(tmp_path) as vllm:
        train(config(tmp_path / "run", vllm.url))
    for line in metrics(tmp_path / "run"):
        assert line["train/reward_std"] > 0
        # The second step's answers are of the adapter after the first one.
        assert line["train/sampling_gap"] <= 1e-4
    names = [(action, body["lora_name"]) for action, body in vllm.actions]
    assert names == [
        ("load_lora_adapter", "finetune-1"),
        ("load_lora_adapter", "finetune-2"),
        ("unload_lora_adapter", "finetune-1"),
    ]
    assert vllm.bytes_received < 20_000, "prompts and names, no weights"
    first, second = (body["lora_path"] for action, body in vllm.actions[:2])
    assert not Path(first).exists() and (Path(second) / "adapter_model.safetensors").exists()


def test_a_server_without_adapters_is_refused_with_its_command(client, tmp_path):
    with server(tmp_path, takes_adapters=False) as vllm, pytest.raises(ResourceError, match="--enable-lora"):
        train(config(tmp_path / "run", vllm.url))


def test_no_server_and_no_vllm_are_named_before_weights_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.training.assemble.load_base", None)
    with pytest.raises(ConfigError, match=r"reward\.engine") as error:
        train(config(tmp_path / "1", "http://localhost:1"))
    assert "vllm serve" in str(error.value) and "--max-lora-rank 8" in str(error.value)
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda **_: True)
    with pytest.raises(ResourceError, match=r"reward\.url") as error:
        train(config(tmp_path / "2", "http://localhost:1"))
    assert "vllm serve" in str(error.value)
