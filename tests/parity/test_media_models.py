"""Models that read media: losses and gradients of transformers + PEFT, packed = alone, cached = computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from finetune.config.schema import LoraConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.attach import attach_lora
from finetune.models.fused import fuse_layers
from finetune.ops import attention
from finetune.system.errors import FinetuneError
from finetune.towers.cache import EmbeddingCache
from finetune.towers.towers import Towers
from tests.media_models import MediaDocuments, random_media_model

CASES = [
    ("qwen2_5_vl", []),
    ("qwen2_5_vl", ["image"]),
    ("qwen2_5_vl", ["image", "image", "image"]),
    ("qwen2_5_vl", ["video"]),
    ("qwen2_5_vl", ["image", "video"]),
    ("qwen2_5_omni", []),
    ("qwen2_5_omni", ["image", "image"]),
    ("qwen2_5_omni", ["audio"]),
    ("qwen2_5_omni", ["audio", "audio"]),
    ("qwen2_5_omni", ["video"]),
    ("qwen2_5_omni", ["audio", "image", "video", "image", "audio"]),
]


def adapted(family: str, towers: tuple[str, ...] = (), *, segmented: bool = True) -> PeftModel:
    base = random_media_model(family)
    model = attach_lora(base, LoraConfig(rank=4, towers=list(towers)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    if segmented:
        attention.register()
        base.config.get_text_config()._attn_implementation = attention.SEGMENTED
        fuse_layers(model)
    return model.train()


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    gaps = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    assert max(gaps.values()) < bound, gaps


def stock_loss(model: PeftModel, documents: MediaDocuments, document: Document) -> Tensor:
    place = next(model.parameters()).device
    inputs = {name: x if x is None else x.to(place) for name, x in documents.inputs(document).items()}
    logits = model(**inputs, use_cache=False).logits[0].float()
    return F.cross_entropy(logits, torch.from_numpy(document.labels).long().to(place), reduction="sum")


@pytest.mark.parametrize(
    ("family", "kinds"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_loss_and_gradients_equal_those_of_transformers(family: str, kinds: list[str], tmp_path: Path) -> None:
    documents = MediaDocuments(family, tmp_path)
    document = documents.build(kinds, 1)
    stock = adapted(family, segmented=False)
    theirs = stock_loss(stock, documents, document)
    ours = adapted(family)
    Towers(base_of(ours), documents.processor, None)
    loss = CrossEntropy(ours)(build_batch([document]))
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    assert_near(gradients(ours, loss), gradients(stock, theirs), 1e-4)


@pytest.mark.parametrize("segmented", [True, False], ids=["fused", "transformers' own layers"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni"])
def test_packed_documents_are_computed_as_if_alone(family: str, segmented: bool, tmp_path: Path) -> None:
    documents = MediaDocuments(family, tmp_path)
    kinds = [["image"], [], ["video", "image"], ["image", "image"]]
    rows = [documents.build(each, 10 * number) for number, each in enumerate(kinds)]
    model = adapted(family, segmented=segmented)
    Towers(base_of(model), documents.processor, None)
    loss = CrossEntropy(model)
    packed = loss(build_batch(rows))
    packed_gradients = gradients(model, packed)
    alone = [loss(build_batch([row])) for row in rows]
    torch.testing.assert_close(packed, sum(alone), rtol=1e-6, atol=0)
    assert_near(packed_gradients, gradients(model, sum(alone)), 1e-5)


def test_rows_that_share_a_picture_compute_it_once_and_equal(tmp_path: Path) -> None:
    documents = MediaDocuments("qwen2_5_vl", tmp_path)
    first, other = documents.build(["image"], 1), documents.build(["image"], 2)
    model = adapted("qwen2_5_vl")
    Towers(base_of(model), documents.processor, None)
    loss = CrossEntropy(model)
    shared = build_batch([first, first, other], share_prefixes=True)
    assert shared.rows < shared.tokens
    once = loss(shared)
    torch.testing.assert_close(once, loss(build_batch([first, first, other])), rtol=1e-6, atol=0)


def test_embeddings_from_the_cache_give_the_same_bits(tmp_path: Path) -> None:
    documents = MediaDocuments("qwen2_5_omni", tmp_path)
    batch = build_batch([documents.build(["image", "audio"], 1), documents.build(["video"], 2)])
    model = adapted("qwen2_5_omni")
    Towers(base_of(model), documents.processor, None)
    loss = CrossEntropy(model)
    computed = loss(batch)
    expected = gradients(model, computed)
    cache = EmbeddingCache(tmp_path / "cache")
    towers = Towers(base_of(model), documents.processor, cache)
    lines: list[str] = []
    towers.fill(batch.media, lines.append)
    assert not cache.missing(batch.media) and "computed=3 files" in lines[0]
    assert towers.release() > 0
    cached = loss(batch)
    assert cached.equal(computed)
    assert all(found.equal(expected[name]) for name, found in gradients(model, cached).items())


def test_adapted_towers_get_the_gradients_of_peft(tmp_path: Path) -> None:
    documents = MediaDocuments("qwen2_5_omni", tmp_path)
    document = documents.build(["image", "audio"], 1)
    towers = ("vision", "audio")
    stock, ours = adapted("qwen2_5_omni", towers, segmented=False), adapted("qwen2_5_omni", towers)
    Towers(base_of(ours), documents.processor, None)
    theirs = gradients(stock, stock_loss(stock, documents, document))
    assert any("audio_tower" in name for name in theirs) and any("visual" in name for name in theirs)
    assert_near(gradients(ours, CrossEntropy(ours)(build_batch([document]))), theirs, 1e-4)


def test_positions_of_one_axis_and_missing_towers_are_errors(tmp_path: Path) -> None:
    documents = MediaDocuments("qwen2_5_vl", tmp_path)
    batch = build_batch([documents.build(["image"], 1)])
    model = adapted("qwen2_5_vl")
    with pytest.raises(FinetuneError, match="no towers"):
        CrossEntropy(model)(batch)
    Towers(base_of(model), documents.processor, None)
    with pytest.raises(ValueError, match="3 axes, found 1"):
        CrossEntropy(model)(replace(batch, position_ids=batch.position_ids[:1]))
