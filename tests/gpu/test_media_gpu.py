"""Media on a GPU: a packed batch computes what transformers computes for each document, and towers run once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.data.batch import build_batch
from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.hidden_states import base_of
from finetune.towers.cache import EmbeddingCache
from finetune.towers.towers import Towers
from tests.media_models import MediaDocuments
from tests.parity.test_media_models import adapted, assert_near, gradients, stock_loss

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("qwen2_5_vl", [["image", "image"], [], ["video"]]), ("qwen2_5_omni", [["audio", "image"], ["video"], []])],
)
def test_a_packed_batch_equals_documents_alone_in_transformers(family: str, kinds: list[list[str]], tmp_path: Path):
    documents = MediaDocuments(family, tmp_path)
    rows = [documents.build(each, 10 * number) for number, each in enumerate(kinds)]
    stock, ours = adapted(family, segmented=False).cuda(), adapted(family).cuda()
    towers = Towers(base_of(ours), documents.processor, EmbeddingCache(tmp_path / "cache"))
    towers.fill([item for row in rows for item in row.media], print)
    towers.release()
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs = sum(stock_loss(stock, documents, row) for row in rows)
    loss = CrossEntropy(ours)(build_batch(rows))
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=0)
    assert_near(gradients(ours, loss), gradients(stock, theirs), 1e-3)
