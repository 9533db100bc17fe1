"""A ragged pass computes the logits of transformers, for every family and however answers are cut into passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finetune.models.families import FAMILIES
from finetune.ops.packed import can_pack
from finetune.serving.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from finetune.serving.engine.forward import RaggedDecoder, context_limit
from finetune.serving.engine.rows import Part
from finetune.system.errors import ConfigError
from tests.models import random_model, random_qwen2

LENGTHS = (1, 3, 16, 17, 40)


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def ragged(base: Any, rows: list[list[int]], chunk: int, **options: Any) -> list[torch.Tensor]:
    """Return the logits of all tokens of each row, from passes of at most `chunk` tokens of each."""
    pool = BlockPool(sum(blocks_for(len(ids)) for ids in rows) + 1)
    decoder = RaggedDecoder(base, pool.blocks, **options)
    blocks = [pool.take(blocks_for(len(ids))) for ids in reversed(rows)][::-1]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), chunk):
        some = [i for i, ids in enumerate(rows) if start < len(ids)]
        hidden_TD, firsts = decoder.run([Part(rows[i][start : start + chunk], start, blocks[i], None) for i in some])
        for i, first in zip(some, firsts, strict=True):
            found[i].append(decoder.logits(hidden_TD[first : first + len(rows[i][start : start + chunk])]))
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen2_5_omni"}))  # its thinker is loaded
def test_every_family(family: str) -> None:
    base = random_model(family).requires_grad_(False).eval()
    for chunk in (1, 7, 64):
        for ids, logits_TV in zip(prompts(), ragged(base, prompts(), chunk), strict=True):
            with torch.no_grad():
                expected = base(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
            torch.testing.assert_close(logits_TV, expected, rtol=1e-4, atol=1e-5)


def test_a_row_alone_has_the_logits_of_a_row_among_others() -> None:
    base = random_qwen2().eval()
    together = ragged(base, prompts(), 64)
    for ids, logits_TV in zip(prompts(), together, strict=True):
        torch.testing.assert_close(ragged(base, [ids], 5)[0], logits_TV, rtol=1e-4, atol=1e-5)


def test_groups_that_gather_few_blocks_at_once_change_nothing() -> None:
    base = random_qwen2().eval()
    pool = BlockPool(64)
    decoder = RaggedDecoder(base, pool.blocks)
    rows = [list(range(20))] * 6
    parts = [Part(ids, 0, pool.take(2), None) for ids in rows]
    with torch.inference_mode():
        whole, _ = decoder.run(parts)
        decoder._gathered_blocks = 3
        split, _ = decoder.run(parts)
    torch.testing.assert_close(split, whole)


def test_packed_weights_compute_the_same_and_leave_the_base() -> None:
    plain, packed = (random_qwen2(dtype=torch.bfloat16).requires_grad_(False).eval() for _ in range(2))
    layer = packed.model.layers[0].mlp.gate_proj
    if not can_pack(layer.weight):
        pytest.skip("this CPU has no products in bfloat16")
    expected, found = ragged(plain, prompts(), 64), ragged(packed, prompts(), 64, packed=True)
    for logits_TV, expected_TV in zip(found, expected, strict=True):
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0.05, atol=0.05)
    assert layer.weight.numel() == 0
    assert plain.model.layers[0].mlp.gate_proj.weight.numel() > 0


@pytest.mark.usefixtures("sixteen_bit_products")
def test_sixteen_bit_attention_on_every_processor() -> None:
    base = random_qwen2(dtype=torch.bfloat16).requires_grad_(False).eval()
    wide = random_qwen2().eval()
    for logits_TV, expected_TV in zip(ragged(base, prompts(), 7), ragged(wide, prompts(), 7), strict=True):
        torch.testing.assert_close(logits_TV.float(), expected_TV, rtol=0.1, atol=0.1)


def test_context_ends_where_a_window_would_begin() -> None:
    assert context_limit(random_model("mistral", sliding_window=24, max_position_embeddings=64)) == 24
    assert context_limit(random_model("mistral", max_position_embeddings=64)) == 64


def test_other_arithmetic_is_refused() -> None:
    ropes = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_type=dynamic"):
        RaggedDecoder(random_qwen2(rope_parameters=ropes), 1)
    base = random_qwen2()
    base.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ConfigError, match="hidden_act"):
        RaggedDecoder(base, 1)


def test_a_block_holds_the_tokens_of_its_answer_alone() -> None:
    base = random_qwen2().eval()
    decoder = RaggedDecoder(base, 4)
    decoder._cache.fill_(float("nan"))
    decoder.clear([1, 3])
    ids = prompts()[-1][: BLOCK_TOKENS + 1]
    with torch.inference_mode():
        hidden_TD, _ = decoder.run([Part(ids, 0, [3, 1], None)])
    assert hidden_TD.isfinite().all()
