"""Loss and gradients of packed documents equal transformers in float64, document by document."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

from finetune.data.batch import build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.cross_entropy import CrossEntropy, score
from finetune.ops.attention import plan_segments
from finetune.ops.limits import LOGITS_VALUES
from tests.models import random_qwen2


def documents(lengths: list[int], seed: int = 0, weighted: bool = False) -> list[Document]:
    rng = np.random.default_rng(seed)
    result = []
    for i, length in enumerate(lengths):
        ids = rng.integers(0, 97, length).astype(np.int32)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
        if length > 1:
            trained = rng.random(length - 1) < 0.6
            trained[-1] = True
            labels[:-1] = np.where(trained, ids[1:], IGNORE_INDEX)
        # Every other document: weights and none must mix in a batch.
        weights = rng.choice([0.25, 1.0, 3.0], length).astype(np.float32) if weighted and i % 2 == 0 else None
        result.append(Document(ids, labels, f"row {i}", weights))
    return result


def reference(docs: list[Document]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Sum over documents, one forward pass each, plain attention, float64."""
    model = random_qwen2("eager", torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    correct = 0
    for doc in docs:
        logits = model(input_ids=torch.tensor(doc.ids[None].astype(np.int64))).logits[0]
        labels = torch.tensor(doc.labels.astype(np.int64))
        weights = torch.tensor(np.ones(len(doc)) if doc.weights is None else doc.weights.astype(np.float64))
        total = total + (F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none") * weights).sum()
        correct += int((logits.argmax(-1) == labels).sum())
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}, correct


@pytest.mark.parametrize("attn", ["segmented", "sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[7], [5, 70, 2, 64, 9, 130], [1, 3, 1]])
@pytest.mark.parametrize("chunk_rows", [3, 1000])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_loss_and_gradients_equal_float64_documents_alone(
    attn, lengths, chunk_rows, frozen_head, weighted, monkeypatch
):
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 97 * chunk_rows)
    docs = documents(lengths, weighted=weighted)
    expected, expected_gradients, correct = reference(docs)
    model = random_qwen2(attn)
    if frozen_head:
        model.lm_head.weight.requires_grad_(False)  # tied: the embedding is frozen too
    loss = CrossEntropy(model)(build_batch(docs))
    (3.0 * loss).backward()
    # fp32 arithmetic over two layers: 1e-5 relative is about a hundred roundings.
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.testing.assert_close(
            parameter.grad.double() / 3, expected_gradients[name], rtol=1e-4, atol=2e-5, msg=name
        )
    scored = score(model, build_batch(docs))
    if not weighted:  # an evaluation does not weigh
        torch.testing.assert_close(scored.nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert (int(scored.correct), scored.tokens) == (correct, sum(d.target_tokens for d in docs))


def test_a_batch_without_targets_gives_zero_and_reaches_every_parameter():
    model = random_qwen2()
    loss = CrossEntropy(model)(dummy_batch(documents([9])[0]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_lengths_that_do_not_cover_the_batch_are_an_error():
    model = random_qwen2()
    batch = build_batch(documents([4, 4]))
    with pytest.raises(ValueError, match=r"64.*8"):
        model.model(
            batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": None},
            segments=plan_segments([4, 3], torch.arange(7), 64, torch.device("cpu"), torch.float32),
            use_cache=False,
        )


ADAPTERS = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 90]}},
}


def adapted(settings: dict, seed: int = 3) -> peft.PeftModel:
    model = peft.get_peft_model(random_qwen2(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie:UserWarning", "ignore:.*tied:UserWarning")
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_a_trained_head_gets_the_gradients_of_the_plain_model(settings, monkeypatch):
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 97 * 4)
    [document] = documents([40])
    plain = adapted(settings).double()
    logits = plain(input_ids=torch.tensor(document.ids[None].astype(np.int64))).logits[0]
    expected = F.cross_entropy(logits, torch.tensor(document.labels.astype(np.int64)), reduction="sum")
    expected.backward()
    model = adapted(settings)
    loss = CrossEntropy(model)(build_batch([document]))
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for (name, found), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (exact.grad is None), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=5e-5, msg=name)
    model.zero_grad(set_to_none=True)
    CrossEntropy(model)(dummy_batch(document)).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.any())]
    assert not missing  # DDP waits for each of them


def test_neftune_noise_is_bounded_by_each_documents_own_length_and_off_in_evaluation():
    docs = documents([4, 64])
    batch = build_batch(docs)
    model = random_qwen2()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0][:, : batch.rows]))
    clean = model.get_input_embeddings()(batch.input_ids)
    for mode in (True, False):
        model.train(mode)
        CrossEntropy(model, neftune_alpha=5.0)(batch)
    noise = (seen[0] - clean).abs()[0]
    for rows, length in ((noise[:4], 4), (noise[4:], 64)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.9 * bound < rows.max() <= bound
    assert torch.equal(seen[1], clean)
