"""Attention over packed documents equals float64, document by document, with shared rows."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.ops.attention import attend, plan_segments, round_up, segmented_attention

CPU = torch.device("cpu")


def reference(rows: list[torch.Tensor], documents: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Plain causal softmax attention of each document over its rows, [L, H, D] each."""
    outputs = []
    for document in documents:
        q, k, v = (x[document].transpose(0, 1) for x in rows)
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        hidden = torch.ones(len(document), len(document), dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return outputs


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [[1], [5, 70, 2, 64, 9, 130, 1], [129, 200, 129]])
@pytest.mark.parametrize("common", [0, 1, 60])
def test_values_and_gradients_equal_float64(dtype, relative, lengths, common):
    """The first `common` tokens of every document are the same rows."""
    torch.manual_seed(len(lengths))
    rows, documents, used = [], [], 0
    for length in lengths:
        shared = min(common, length) if documents else 0
        shared = min(shared, len(documents[0])) if documents else 0
        own = torch.arange(used, used + length - shared)
        documents.append(torch.cat([documents[0][:shared], own]) if documents else own)
        used += length - shared
    padded = round_up(used)
    rows = [torch.randn(padded, heads, 16).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    segments = plan_segments(lengths, torch.cat(documents), padded, CPU, dtype)
    output = attend(*rows, segments, 0.3)
    expected = torch.zeros(padded, 4, 16, dtype=torch.float64)
    for document, part in zip(documents, reference([x.detach().double() for x in rows], documents, 0.3), strict=True):
        expected[document] = part
    assert not output[used:].any()
    assert (output - expected).abs().max() <= relative * expected.abs().max()

    direction = torch.randn(padded, 4, 16)
    direction[used:] = 0
    found = torch.autograd.grad(output, rows, direction.to(dtype))
    wide = [x.detach().double().requires_grad_() for x in rows]
    parts = reference(wide, documents, 0.3)
    # A shared row's output is read once: from the first document that has it.
    seen, total = torch.zeros(padded, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    for document, part in zip(documents, parts, strict=True):
        total = total + (part * direction[document] * ~seen[document][:, None, None]).sum()
        seen[document] = True
    for a, b in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert (a - b).abs().max() <= relative * b.abs().max().clamp_min(1e-3)


def test_documents_do_not_attend_to_each_other_and_padding_has_no_effect():
    lengths, rows = [40, 90], 192
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 2, 8) for _ in range(3))
    segments = plan_segments(lengths, torch.arange(130), rows, CPU, torch.float32)
    before = attend(q, k, v, segments, 1.0)
    for x in (q, k, v):
        x[130:] = torch.nan
        x[:40] += 7
    after = attend(q, k, v, segments, 1.0)
    assert torch.equal(after[40:], before[40:]) and not torch.equal(after[:40], before[:40])


def test_segments_that_do_not_cover_the_rows_are_an_error():
    segments = plan_segments([3], torch.arange(3), 64, CPU, torch.float32)
    with pytest.raises(ValueError, match="segments: cover 64 rows, found 3"):
        attend(*(torch.zeros(3, 1, 4) for _ in range(3)), segments, 1.0)


def test_gradients_of_shared_rows_have_the_same_bits_with_many_threads():
    row_of_token = torch.cat([torch.cat([torch.arange(64), torch.arange(64 + 8 * i, 72 + 8 * i)]) for i in range(24)])
    rows = int(row_of_token.max()) + 1
    segments = plan_segments([72] * 24, row_of_token, rows, torch.device("cpu"), torch.float32)
    inputs = [torch.randn(rows, heads, 64, requires_grad=True) for heads in (4, 2, 2)]

    def gradients():
        return torch.autograd.grad(attend(*inputs, segments, 0.125).square().sum(), inputs)

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradients()
        assert all(torch.equal(a, b) for _ in range(30) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_generated_token_attends_as_in_transformers(heads, masked):
    """Whose kernel copies keys and values for every query head."""
    generator, (queries, keys) = torch.Generator().manual_seed(0), heads
    query = torch.randn(5, queries, 1, 8, generator=generator)
    key, value = (torch.randn(5, keys, 11, 8, generator=generator) for _ in range(2))
    mask = torch.arange(11)[None] >= torch.tensor([0, 3, 5, 1, 10])[:, None] if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = queries // keys
    options = {"scaling": 0.3, "attention_mask": None if mask is None else mask[:, None, None]}
    expected, _ = sdpa_attention_forward(module, query, key, value, **options)
    found, _ = segmented_attention(module, query, key, value, **options)
    assert found.shape == expected.shape == (5, 1, queries, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
