"""Our packs against TRL's best-fit-decreasing packer."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer
from trl.data_utils import pack_dataset

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.loader import load_data
from finetune.data.packing import SequenceOrder, pack_best_fit
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation


def test_as_full_as_trls_packs():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 2000).clip(1, 1024).astype(int)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths.tolist()]}), 1024, strategy="bfd")
    ours = pack_best_fit(lengths, 1024, np.arange(len(lengths)))
    assert len(ours) <= len(theirs)
    assert lengths.sum() / (len(ours) * 1024) > 0.97


def test_gsm8k_fills_its_packs(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen2.5" / "tokenizer")
    columns = {"prompt": "question", "completion": "answer"}
    cfg = DataConfig(train=[SourceConfig(path=str(shared / "datasets" / "gsm8k" / "test.jsonl"), columns=columns)])
    lengths = load_data(Preparation(cfg, ChatTemplate(tokenizer))).documents.lengths
    packs = SequenceOrder(lengths, np.ones(len(lengths)), 2048, 16, seed=0).epoch(0)
    assert lengths.sum() / (len(packs) * 2048) > 0.97
