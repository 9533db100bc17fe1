"""Our packs against TRL's best-fit-decreasing packer."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from trl.data_utils import pack_dataset

from finetune.data.packing import pack_best_fit


def test_as_full_as_trls_packs():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 2000).clip(1, 1024).astype(int)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths.tolist()]}), 1024, strategy="bfd")
    ours = pack_best_fit(lengths, 1024, np.arange(len(lengths)))
    assert len(ours) <= len(theirs)
    assert lengths.sum() / (len(ours) * 1024) > 0.97
