"""Figures of target tokens against plain transformers in float64 and whole distributions, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetune.config.schema import DataConfig, ModelConfig, QuantConfig, SourceConfig
from finetune.data.documents import Documents
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.intervals import Bootstrap
from finetune.evaluation.measure import ReferenceCache, token_figures
from finetune.evaluation.scoring import TokenScores, agreement, reference_kl, score_tokens
from finetune.losses.cross_entropy import head_of
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.ops.limits import LOGITS_VALUES
from finetune.system.errors import FinetuneError
from finetune.system.resources import packaged

BASE = packaged("data") / "tiny-qwen2.5"
SMALL, ALL = 1, 4096  # tokens of a batch: each document alone, or all in one pack


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Rows of unequal length; the last ones longer than a document may be, so that they are cut into several."""
    lines = (packaged("data") / "sample" / "heldout.jsonl").read_text().splitlines()[:10]
    long = [
        {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three " * n}]}
        for n in (20, 45)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join([*lines, *map(json.dumps, long)]) + "\n")
    source = SourceConfig(path=str(file))
    data = DataConfig(train=[source], eval=[source], max_length=96, truncation="split")
    found = load_data(Preparation(data, ChatTemplate(load_tokenizer(ModelConfig(name=str(BASE)))))).eval[0].documents
    assert len(found) > len(np.unique(found.rows)) == 12
    return found


def shaken(model: nn.Module) -> nn.Module:
    """The same architecture with other probabilities."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)
            parameter.mul_(1 + 0.05 * noise)
    return model


def fast(other: bool = False) -> nn.Module:
    model = load_base(ModelConfig(name=str(BASE), dtype="float32"), QuantConfig(type="none"), "cpu")
    fuse_layers(shaken(model) if other else model)
    return model.eval()


@dataclass
class Plain:
    """By transformers in float64, one document at a time. log_probs_NV: of every target, whole."""

    log_probs_NV: torch.Tensor
    labels_N: torch.Tensor
    row_N: np.ndarray


def plain(documents: Documents, other: bool = False) -> Plain:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    model = shaken(model) if other else model
    found = []
    for i, document in enumerate(documents):
        labels = torch.tensor(document.labels, dtype=torch.long)
        with torch.no_grad():
            logits = model(torch.tensor(document.ids, dtype=torch.long)[None]).logits[0]
        targets = labels != IGNORE_INDEX
        rows = np.full(int(targets.sum()), np.unique(documents.rows).searchsorted(documents.rows[i]))
        found.append((logits[targets].log_softmax(-1), labels[targets], rows))
    log_probs, labels, rows = zip(*found, strict=True)
    return Plain(torch.cat(log_probs), torch.cat(labels), np.concatenate(rows))


@pytest.fixture(scope="module")
def expected(documents) -> Plain:
    return plain(documents)


@pytest.fixture(scope="module")
def other(documents) -> Plain:
    return plain(documents, other=True)


@pytest.fixture(scope="module")
def reference(documents, tmp_path_factory) -> tuple[TokenScores, ReferenceCache]:
    """Scores of the model in one pack, and the cache of its hidden states."""
    model = fast()
    cache = ReferenceCache(tmp_path_factory.mktemp("reference") / "0", torch.device("cpu"))
    scores = score_tokens(model, documents, limit_tokens=ALL, keep=cache.keep)
    cache.head = head_of(model)
    return scores, cache


def test_each_targets_nats_and_choice_are_those_of_plain_transformers(reference, expected):
    scores, _ = reference
    nll_N = -expected.log_probs_NV.gather(1, expected.labels_N[:, None])[:, 0]
    # fp32 sums over 192 products in four layers.
    np.testing.assert_allclose(scores.nll_N, nll_N, rtol=1e-3, atol=2e-4)
    np.testing.assert_array_equal(scores.correct_N, expected.log_probs_NV.argmax(-1) == expected.labels_N)
    np.testing.assert_array_equal(scores.row_N, expected.row_N)


def test_loss_perplexity_and_accuracy_are_means_over_all_targets(reference, expected):
    figures = token_figures(reference[0], Bootstrap(12, 100, 0))
    nll_N = -expected.log_probs_NV.gather(1, expected.labels_N[:, None])
    assert figures["loss"].value == pytest.approx(float(nll_N.mean()), rel=1e-4)
    assert figures["perplexity"].value == pytest.approx(float(nll_N.mean().exp()), rel=1e-3)
    right = (expected.log_probs_NV.argmax(-1) == expected.labels_N).double().mean()
    assert figures["accuracy"].value == pytest.approx(float(right), abs=1e-12)


def test_a_pack_and_each_document_alone_score_the_same(reference, documents):
    alone = score_tokens(fast(), documents, limit_tokens=SMALL)
    np.testing.assert_allclose(alone.nll_N, reference[0].nll_N, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(alone.correct_N, reference[0].correct_N)
    np.testing.assert_array_equal(alone.row_N, reference[0].row_N)


def test_a_model_is_no_distance_from_itself(reference, documents):
    scores = score_tokens(fast(), documents, limit_tokens=ALL, teacher=reference[1].replay(), vocabulary=1000)
    assert np.abs(scores.kl_N).max() < 1e-6 and scores.agree_N.all()


def test_distances_are_those_of_whole_distributions(reference, documents, expected, other):
    words = expected.log_probs_NV.shape[1]
    scores = score_tokens(
        fast(other=True), documents, limit_tokens=ALL, teacher=reference[1].replay(), vocabulary=words
    )
    kl_N = (expected.log_probs_NV.exp() * (expected.log_probs_NV - other.log_probs_NV)).sum(-1).numpy()
    same_N = (expected.log_probs_NV.argmax(-1) == other.log_probs_NV.argmax(-1)).numpy()
    np.testing.assert_allclose(scores.kl_N, kl_N, rtol=5e-3, atol=2e-5)
    figures = token_figures(scores, Bootstrap(12, 100, 0))
    assert figures["kl"].value == pytest.approx(kl_N.mean(), rel=1e-3)
    assert figures["kl_p99"].value == pytest.approx(np.quantile(kl_N, 0.99, method="inverted_cdf"), rel=5e-3)
    assert 0.5 < same_N.mean() < 1 and figures["top1"].value == same_N.mean()


def test_what_training_watches_is_what_is_measured_afterwards(reference, documents, expected, other):
    words = expected.log_probs_NV.shape[1]
    found = agreement(fast(other=True), reference[1].replay(), documents, words, limit_tokens=ALL)
    kl_N = (expected.log_probs_NV.exp() * (expected.log_probs_NV - other.log_probs_NV)).sum(-1).numpy()
    assert found.tokens == len(kl_N) and found.kl == pytest.approx(kl_N.mean(), rel=1e-3)
    assert found.top1 == (expected.log_probs_NV.argmax(-1) == other.log_probs_NV.argmax(-1)).double().mean()


class Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary, the head's transposed weight aside."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        turned = function in (torch.ops.aten.t.default, torch.ops.aten.transpose.int)
        if isinstance(found, torch.Tensor) and not turned and found.shape[-1:] == (self.words,):
            self.rows = max(self.rows, found.numel() // self.words)
        return found


def test_no_more_logits_exist_at_once_than_a_chunk_holds(reference, documents, expected, monkeypatch):
    targets, words = expected.log_probs_NV.shape
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 16 * words)
    model = fast(other=True)
    with Widest(words) as widest:
        scores = score_tokens(model, documents, limit_tokens=ALL, teacher=reference[1].replay(), vocabulary=words)
    assert len(scores.nll_N) == targets > 300 and 1 < widest.rows <= 16


@pytest.mark.parametrize("limit_tokens", [SMALL, ALL])
def test_the_distance_from_a_reference_is_that_of_whole_distributions(
    limit_tokens, documents, expected, other, monkeypatch
):
    """The reference has other weights everywhere, also in the head."""
    words = expected.log_probs_NV.shape[1]
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 16 * words)
    model, weights = fast(), fast(other=True).state_dict()

    @contextmanager
    def policy() -> Iterator[None]:
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights)
        yield
        model.load_state_dict(own)

    with Widest(words) as widest:
        found = reference_kl(model, policy, documents, limit_tokens=limit_tokens)
    kl_N = (expected.log_probs_NV.exp() * (expected.log_probs_NV - other.log_probs_NV)).sum(-1)
    assert found == pytest.approx(kl_N.mean().item(), rel=1e-3)
    # The weights that are swapped are as wide as the vocabulary in no dimension but the first.
    assert 1 < widest.rows <= 16


def test_a_loss_that_is_nan_is_an_error(documents):
    model = fast()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FinetuneError, match="NaN"):
        score_tokens(model, documents, limit_tokens=ALL)


def test_the_reference_cache_is_on_disk(reference):
    _, cache = reference
    assert [file.suffix for file in Path(cache._folder).iterdir()] == [".safetensors"]
