"""Tiny random bases on disk, and every kind of adapter that training writes, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import save_adapter
from finetune.models.load import load_base
from tests.models import save_tiny_base


@contextmanager
def no_progress(task: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show no progress of a merge."""
    yield lambda done_bytes: None


@dataclass(frozen=True)
class Kind:
    """The settings of an adapter, and the quantization of the base that it is trained on."""

    lora: dict[str, Any] = field(default_factory=dict)
    quant: str = "nf4"
    new_tokens: tuple[str, ...] = ()


KINDS = {
    "q,v": Kind(),
    "all linears": Kind({"target_modules": "all-linear"}),
    "one regex": Kind({"target_modules": r".*\.1\..*\.(k_proj|down_proj)"}),
    "rslora": Kind({"rslora": True, "rank": 4}),
    "dora": Kind({"dora": True}),
    "dora on all, rslora": Kind({"dora": True, "rslora": True, "target_modules": "all-linear"}),
    "patterns": Kind({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 40.0}}),
    "some layers": Kind({"layers_to_transform": [1]}),
    "gaussian": Kind({"init": "gaussian"}),
    "orthogonal": Kind({"init": "orthogonal"}),
    "loftq": Kind({"init": "loftq"}),
    "pissa": Kind({"init": "pissa"}, "none"),
    "olora, rslora": Kind({"init": "olora", "rslora": True}, "none"),
    "norms in full": Kind({"modules_to_save": ["input_layernorm", "model.norm"]}),
    "embedding in full": Kind({"modules_to_save": ["embed_tokens"]}),
    "head in full": Kind({"modules_to_save": ["lm_head"]}),
    "embedding and head in full": Kind({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "new tokens": Kind({"new_tokens": ["<a>", "<b>"]}),
    "new tokens beyond the table": Kind({"new_tokens": [f"<{i}>" for i in range(30)]}),
}

MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Return a function that saves a random two-layer Qwen2 with a tokenizer of the words t0 to t299."""
    made: dict[tuple, Path] = {}

    def make(tied: bool = True, max_shard_size: str = "5GB", seed: int = 0) -> Path:
        key = (tied, max_shard_size, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            made[key] = save_tiny_base(folder, tied, 320, max_shard_size, noise=0.05, seed=seed, eos_token_id=1)
            tokenizer().save_pretrained(folder)
        return made[key]

    return make


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words t0 to t299 with a chat template."""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(300)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1", pad_token="t2")
    found.chat_template = "{% for m in messages %}t3 {{ m.content }} t1 {% endfor %}"
    return found


@pytest.fixture
def make_adapter(make_base: MakeBase, tmp_path: Path) -> MakeAdapter:
    """Return a function that saves an adapter of a kind with random weights, as a run saves it."""

    def make(kind: str, tied: bool = True, name: str = "adapter", seed: int = 1, base: Path | None = None) -> Path:
        chosen = KINDS[kind]
        base = base or make_base(tied)
        torch.manual_seed(seed)
        model = load_base(ModelConfig(name=str(base)), QuantConfig(type=chosen.quant), device="cpu")
        words = tokenizer()
        settings = {"rank": 4, "alpha": 8.0, **chosen.lora}
        adapted = attach_lora(model, LoraConfig(**settings), words)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path / name
        folder.mkdir()
        save_adapter(adapted, folder, words)
        return folder

    return make
