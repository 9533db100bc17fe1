"""Training from a cache equals training from the teacher, and a wrong cache is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune import load_config
from finetune.config.schema import DistillConfig
from finetune.data.batch import Batch, build_batch, dummy_batch, groups_of
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill import cache as cache_module
from finetune.distill import filling
from finetune.distill.cache import CachedTeacher, build_encoder, fill_cache
from finetune.distill.codec import MOST_IDS
from finetune.distill.fingerprint import key_of
from finetune.distill.resident import ResidentTeacher
from finetune.distill.server import TopTokens
from finetune.distill.shards import COMPLETE
from finetune.losses.chunked import chunked_loss
from finetune.losses.distillation import (
    DistillLossWeights,
    Teacher,
    TeacherHidden,
    TeacherTargets,
    TeacherTopK,
    distillation_loss,
)
from finetune.models.fused import fuse_layers
from finetune.system.errors import ConfigError, DataError, IntegrityError
from finetune.system.resources import packaged
from tests.models import random_qwen2

VOCABULARY, WIDTH, CPU = 97, 64, torch.device("cpu")
# Of hidden states in fp32, which a product of another shape sums in another order; they are about 1 in size.
LAST_BITS = 1e-5


def document(i: int, rng: np.random.Generator) -> Document:
    """Of 3 to 20 tokens; about half of what can be a target is one. Every third opens as the one before it."""
    length = int(rng.integers(3, 21))
    ids = np.random.default_rng(i - (i % 3 == 2)).integers(0, VOCABULARY, 21)[:length].astype(np.int32)
    labels = np.where(rng.random(length) < 0.5, np.append(ids[1:], 0), IGNORE_INDEX).astype(np.int32)
    labels[0], labels[-1] = ids[1], IGNORE_INDEX
    return Document(ids, labels, f"rows:{i + 1}")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    made = {key_of(each): each for each in (document(i, rng) for i in range(40))}
    assert len(made) > 35
    return list(made.values())


def resident(dtype: torch.dtype = torch.float32, seed: int = 0) -> ResidentTeacher:
    model = random_qwen2(dtype=dtype, seed=seed).requires_grad_(False)
    fuse_layers(model)
    return ResidentTeacher(model.eval(), CPU)


@pytest.fixture(scope="module")
def teacher() -> ResidentTeacher:
    return resident()


class TableTeacher:
    """Its targets depend on the token alone, so they have the same bits in every batch."""

    def __init__(self) -> None:
        self.table_VV = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherHidden]:
        for batch in batches:
            states_TV = self.table_VV[batch.input_ids[0]]
            yield TeacherHidden(states_TV[batch.targets], nn.Identity())


def write(folder: Path, teacher: Teacher, documents: Sequence[Document], group_tokens: int = 500, **keys) -> dict:
    cfg = DistillConfig(objective="recover", **keys)
    origin = {"kept": {"cache_kind": cfg.cache_kind}}
    fill_cache(
        folder,
        origin,
        documents,
        build_encoder(teacher, cfg, VOCABULARY),
        group_tokens=group_tokens,
        progress=lambda done, total: None,
    )
    return origin


def cached(folder: Path, teacher: Teacher, documents: Sequence[Document], **keys) -> CachedTeacher:
    head = teacher.model.lm_head if isinstance(teacher, ResidentTeacher) else nn.Identity()
    dtype = next(teacher.model.parameters()).dtype if isinstance(teacher, ResidentTeacher) else torch.float32
    return CachedTeacher(folder, write(folder, teacher, documents, **keys), CPU, head=head, dtype=dtype)


def packings(documents: list[Document]) -> Iterator[list[Batch]]:
    """The documents in other orders, other batches, and with and without shared openings."""
    for seed, limit, share_prefixes in itertools.product((0, 1), (1, 60, 10_000), (False, True)):
        some = random.Random(seed).sample(documents, len(documents)) if seed else documents
        yield [build_batch(group, share_prefixes=share_prefixes) for group in groups_of(some, limit)]


def losses(teacher_targets: TeacherTargets, targets: int) -> tuple[Tensor, Tensor]:
    """A student's divergence from the targets, and its gradient with respect to the student's states."""
    torch.manual_seed(7)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    hidden_ND = torch.randn(targets, WIDTH, requires_grad=True)
    labels_N, ones_N = torch.zeros(targets, dtype=torch.int64), torch.ones(targets)
    loss = distillation_loss(
        teacher_targets,
        DistillLossWeights(divergence="jsd", mix=0.5),
        labels_N,
        kl_weight_N=ones_N,
        ce_weight_N=ones_N,
        vocabulary=VOCABULARY,
    )
    total = chunked_loss(hidden_ND, head, VOCABULARY, loss)
    return total.detach(), torch.autograd.grad(total, hidden_ND)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hidden_states_from_disk_give_the_bits_of_loss_and_gradient(tmp_path, documents, dtype):
    teacher = resident(dtype)
    some = documents[:9]
    batch = build_batch(some, share_prefixes=True)
    online_targets = list(teacher.targets_for([batch]))
    cached_targets = list(cached(tmp_path, teacher, some, cache_kind="hidden").targets_for([batch]))
    for online, offline in zip(online_targets, cached_targets, strict=True):
        assert isinstance(offline, TeacherHidden) and offline.hidden_ND.dtype == dtype
        assert torch.equal(online.hidden_ND, offline.hidden_ND) and offline.head is teacher.model.lm_head
        for a, b in zip(losses(online, len(online.hidden_ND)), losses(offline, len(online.hidden_ND)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tier", ["hidden", "sampled"])
def test_order_packing_and_batch_size_do_not_change_a_documents_targets(tmp_path, documents, tier):
    folder = cached(tmp_path, TableTeacher(), documents, cache_kind=tier)
    whole = {key_of(each): next(iter(folder.targets_for([build_batch([each])]))) for each in documents}
    for batches in packings(documents):
        for batch, teacher_targets in zip(batches, folder.targets_for(batches), strict=True):
            parts = [whole[key] for key, _ in cache_module.keys_of(batch)]
            for name in ("hidden_ND",) if tier == "hidden" else ("ids_NK", "probs_NK", "entropy_N"):
                assert torch.equal(getattr(teacher_targets, name), torch.cat([getattr(part, name) for part in parts]))


def test_cached_states_equal_those_of_any_batch_up_to_rounding(tmp_path, documents, teacher):
    folder = cached(tmp_path, teacher, documents, cache_kind="hidden")
    for batches in packings(documents):
        for online, offline in zip(teacher.targets_for(batches), folder.targets_for(batches), strict=True):
            torch.testing.assert_close(offline.hidden_ND, online.hidden_ND, rtol=LAST_BITS, atol=LAST_BITS)


def test_draws_depend_on_document_and_seed_alone(tmp_path, documents):
    def drawn(name: str, some: list[Document], **keys) -> dict[bytes | None, Tensor]:
        folder = cached(tmp_path / name, TableTeacher(), some, **keys)
        return {key_of(each): next(iter(folder.targets_for([build_batch([each])]))).ids_NK for each in some}

    usual = drawn("usual", documents)
    again = drawn("again", random.Random(0).sample(documents, len(documents)), group_tokens=1)
    other = drawn("other", documents, seed=1)
    assert all(torch.equal(ids_NK, again[key]) for key, ids_NK in usual.items())
    head = slice(0, 32)
    assert all(torch.equal(ids_NK[:, head], other[key][:, head]) for key, ids_NK in usual.items())
    assert not any(torch.equal(ids_NK, other[key]) for key, ids_NK in usual.items())
    rows = torch.cat(list(usual.values()))[:, 32:]
    assert len(rows.unique(dim=0)) > 0.95 * len(rows), "targets draw each for themselves"


@pytest.mark.parametrize("tier", ["hidden", "sampled"])
def test_a_batch_without_a_target_has_empty_targets(tmp_path, documents, teacher, tier):
    batch = dummy_batch(documents[0])
    [teacher_targets] = cached(tmp_path, teacher, documents[:3], cache_kind=tier).targets_for([batch])
    [online] = teacher.targets_for([batch])
    if tier == "hidden":
        assert teacher_targets.hidden_ND.shape == online.hidden_ND.shape == (0, WIDTH)
    else:
        assert teacher_targets.ids_NK.shape == teacher_targets.probs_NK.shape == (0, 48)


# Refusing


def test_missing_documents_are_counted_and_the_first_are_named(tmp_path, documents, teacher):
    folder = cached(tmp_path, teacher, documents[:30])
    folder.check_holds(documents[:30])
    silent = Document(np.arange(3, dtype=np.int32), np.full(3, IGNORE_INDEX, dtype=np.int32), "silent:1")
    lacking = documents[30:37]
    with pytest.raises(DataError) as failure:
        folder.check_holds([*documents[:30], silent, *lacking])
    assert "lacks 7 of 37 documents" in str(failure.value) and "finetune cache" in str(failure.value)
    named = ", ".join(each.location for each in lacking[:5])
    assert f"first {named}\n" in str(failure.value) and lacking[5].location not in str(failure.value)
    with pytest.raises(AssertionError, match="check_holds"):
        list(folder.targets_for([build_batch(documents[:37])]))


@pytest.mark.parametrize("tier", ["hidden", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_spot_check_accepts_the_right_teacher_and_no_other(tmp_path, documents, tier, dtype):
    right, other = resident(dtype), resident(dtype, seed=1)
    folder = cached(tmp_path / "right", right, documents, cache_kind=tier)
    # bf16 has 8 bits: states of about 1 are off by up to 1/256 in another batch, and log-probabilities by little more.
    assert folder.check_against(right, documents[:5], VOCABULARY) <= (0.02 if dtype == torch.bfloat16 else 1e-3)
    # Some documents come from another teacher, under the right fingerprint and checksums.
    write(tmp_path / "mixed", other, documents[:4], cache_kind=tier)
    mixed = cached(tmp_path / "mixed", right, documents, cache_kind=tier)
    mixed.check_against(right, documents[4:8], VOCABULARY)
    with pytest.raises(
        IntegrityError, match=rf"differs from the teacher by .* over {documents[3].location}, .*rounding"
    ):
        mixed.check_against(right, documents[3:5], VOCABULARY)


def test_the_spot_check_refuses_nan(tmp_path, documents, teacher):
    folder = cached(tmp_path, teacher, documents[:2], cache_kind="hidden")
    broken = replace_states(teacher, lambda hidden_ND: hidden_ND * float("nan"))
    with pytest.raises(IntegrityError, match="by nan nats"):
        folder.check_against(broken, documents[:2], VOCABULARY)


class Changed:
    def __init__(self, teacher: Teacher, change: Callable[[Tensor], Tensor]):
        self.teacher, self.change = teacher, change

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherTargets]:
        for teacher_targets in self.teacher.targets_for(batches):
            assert isinstance(teacher_targets, TeacherHidden)
            yield replace(teacher_targets, hidden_ND=self.change(teacher_targets.hidden_ND))


def replace_states(teacher: Teacher, change: Callable[[Tensor], Tensor]) -> Teacher:
    return Changed(teacher, change)


def test_a_vocabulary_above_18_bits_is_refused_for_sampled_caches_only(teacher):
    with pytest.raises(ConfigError, match=r"distill.cache_kind: .*262,144 .*262,145"):
        build_encoder(teacher, DistillConfig(objective="recover"), MOST_IDS + 1)
    build_encoder(teacher, DistillConfig(objective="recover", cache_kind="hidden"), MOST_IDS + 1)
    build_encoder(teacher, DistillConfig(objective="recover"), MOST_IDS)


# Placements of the teacher


def test_all_placements_write_the_same_and_a_complete_cache_loads_no_teacher(tmp_path, documents, monkeypatch):
    chat = SimpleNamespace(digest=lambda: "tokens", template="turns")
    logged: list[str] = []

    def write_through(placement: str, some: Sequence[Document], folder: str) -> int:
        words = ["distill.objective=recover", f"distill.cache={tmp_path / folder}", "distill.cache_kind=hidden"]
        cfg = load_config("quickstart.yaml", [*words, f"distill.teacher.placement={placement}"])
        return filling.write_cache(cfg, chat, 883, some, device=CPU, log=logged.append)

    for placement in ("resident", "streamed", "cached"):
        assert write_through(placement, documents[:6], placement) == 6
        assert "6 of 6 documents" in " ".join(logged)
        logged.clear()
    contents = {placement: (tmp_path / placement / COMPLETE).read_text() for placement in ("streamed", "cached")}
    assert set(contents.values()) == {(tmp_path / "resident" / COMPLETE).read_text()}

    monkeypatch.delattr(filling, "load_resident")
    assert write_through("resident", documents[:6], "resident") == 0 and not logged
    with pytest.raises(NameError):
        write_through("resident", documents[:7], "resident")


def test_a_teacher_that_does_not_fit_into_memory_is_streamed(monkeypatch):
    cfg = load_config("quickstart.yaml", ["distill.objective=recover", "distill.teacher.dtype=float32"])
    size_bytes = 2 * (packaged("data") / "tiny-qwen2.5" / "model.safetensors").stat().st_size
    for free, fits in ((size_bytes / 0.61, False), (size_bytes / 0.59, True)):
        monkeypatch.setattr(filling, "free_bytes_of", lambda _, free=free: free)
        assert filling._fits(cfg, CPU) == fits


class TableServer:
    """A served teacher whose table has rows beyond the vocabulary."""

    rows, requested = VOCABULARY + 7, 0

    def __init__(self, url: str, model: str, top: int, log: Callable[[str], None]):
        self.top = top
        self.table = np.log(np.random.default_rng(3).dirichlet(np.ones(self.rows), self.rows)).astype(np.float32)

    def check(self) -> None:
        pass

    def score_many(self, documents: Sequence[tuple[np.ndarray, np.ndarray]], workers: int) -> Iterator[TopTokens]:
        for ids, positions in documents:
            assert positions.max() + 1 == len(ids) - 1, "the last predicted token is the prompt's last"
            log_probs = self.table[ids[positions]]
            best = np.argsort(-log_probs, axis=1)[:, : self.top]
            yield TopTokens(best, np.take_along_axis(log_probs, best, 1))


def test_a_servers_answers_are_stored_without_ids_beyond_the_vocabulary(tmp_path, documents, monkeypatch):
    cfg = load_config(
        "quickstart.yaml",
        [
            "distill.objective=recover",
            "distill.cache=unused",
            "distill.teacher.placement=server",
            "distill.teacher.url=http://nowhere/v1",
            "distill.top_k=64",
        ],
    )
    monkeypatch.setattr(filling, "LogprobServer", TableServer)
    table = TableServer("", "", 64, print).table
    spared = 0
    origin = {"kept": {"cache_kind": "top"}}
    fill_cache(
        tmp_path,
        origin,
        documents,
        filling._server_encoder(cfg, VOCABULARY, print),
        group_tokens=50,
        progress=lambda done, total: None,
    )
    batches = [build_batch([each]) for each in documents]
    for each, teacher_targets in zip(documents, CachedTeacher(tmp_path, origin, CPU).targets_for(batches), strict=True):
        assert isinstance(teacher_targets, TeacherTopK)
        requested = each.ids[each.labels != IGNORE_INDEX]
        for ids, log_probs, true in zip(
            teacher_targets.ids_NK.numpy(), teacher_targets.log_probs_NK.numpy(), table[requested], strict=True
        ):
            assert len(set(ids.tolist())) == 64 and ids.max() < VOCABULARY
            best = np.argsort(-true)[:64]
            kept = log_probs > -24
            assert set(ids[kept]) == set(best[best < VOCABULARY])
            assert np.abs(log_probs[kept] - true[ids[kept]]).max() <= 24 / 65535
            spared += int((best >= VOCABULARY).sum())
    assert spared > 100, "the law had something to say"
