"""Write a Qwen2.5 with random weights of any size: speed and memory do not depend on the values.

    python -m benchmarks.models size=7B tokenizer=FOLDER folder=TARGET [layers=4]

One random layer is written under every layer's name, so a 7B takes only the time of writing its bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import parse
from finetune.models.families import QWEN25_SHAPES

# Two layers and grouped heads: runs a benchmark from end to end within seconds, to test it.
TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
DEFAULTS = {"size": "0.5B", "tokenizer": "data/tiny-qwen2.5", "folder": "", "layers": ""}
# Random values per tensor, repeated if it has more: drawing a billion takes 10 seconds.
_DRAWN_VALUES = 2**24
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")


def shape_of_size(size: str, tokenizer: Path) -> dict[str, Any]:
    """Return the config of a size; `tiny` has the vocabulary of its tokenizer."""
    if size == "tiny":
        from tokenizers import Tokenizer

        words = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
        return {**TINY, "vocab_size": max(TINY["vocab_size"], words)}
    if size not in QWEN25_SHAPES:
        raise SystemExit(f"size={size}: unknown; choose from {', '.join(QWEN25_SHAPES)}, tiny")
    return QWEN25_SHAPES[size]


def write_random_model(size: str, tokenizer: Path, folder: Path, seed: int = 0, layers: int | None = None) -> Path:
    """Write a bf16 checkpoint of that size with that tokenizer to `folder` if it is missing; one file per layer.

    layers: a smaller number of layers, with the real widths. Biases are random too: a test would not notice a
    missing bias of zero.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from safetensors.torch import save_file

    shape = shape_of_size(size, tokenizer)
    shape = {**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        count = math.prod(sizes)
        drawn = (0.02 * torch.randn(min(count, _DRAWN_VALUES), generator=generator)).to(torch.bfloat16)
        return drawn.repeat(-(-count // len(drawn)))[:count].clone().view(sizes)

    layer = {
        name: torch.ones(sizes, dtype=torch.bfloat16) if "norm" in name else normal(*sizes)
        for name, sizes in layer_tensors(shape)
    }
    files = {
        f"layer-{i:02d}.safetensors": {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        for i in range(shape["num_hidden_layers"])
    }
    table = (shape["vocab_size"], shape["hidden_size"])
    files["embeddings.safetensors"] = {
        "model.embed_tokens.weight": normal(*table),
        "model.norm.weight": torch.ones(shape["hidden_size"], dtype=torch.bfloat16),
        **({} if shape["tie_word_embeddings"] else {"lm_head.weight": normal(*table)}),
    }
    places: dict[str, str] = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    config = {
        **shape,
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "bfloat16",
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1 << 20,
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    # Written last, so that an incomplete folder is written again.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def layer_tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return names and sizes of one Qwen2 layer's tensors."""
    from finetune.planning.static_memory import linear_shapes

    hidden = shape["hidden_size"]
    for name, (out, inputs) in linear_shapes(shape).items():
        room = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        yield f"{room}.{name}.weight", (out, inputs)
        if name in ("q_proj", "k_proj", "v_proj"):
            yield f"{room}.{name}.bias", (out,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    layers = int(options["layers"]) if options["layers"] else None
    folder = write_random_model(options["size"], Path(options["tokenizer"]), Path(options["folder"]), layers=layers)
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(json.dumps({"folder": str(folder), "bytes": size_bytes}))


if __name__ == "__main__":
    main(sys.argv[1:])
