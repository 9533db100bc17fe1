"""Options of a command and keys of a run on one command line: each word goes to its owner."""

from __future__ import annotations

import pytest

from finetune.config.command_options import AllocateOptions, PlanOptions, SensitivityOptions
from finetune.config.keys import sections
from finetune.config.options import read_beside_config
from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError


def given(*words: str) -> Arguments:
    return Arguments("lora.yaml", words, frozenset())


def test_words_of_the_command_and_of_the_run_are_told_apart_and_the_last_counts():
    words = ("model=qwen2.5-7b", "gpu_gb=8", "lora.rank=16", "~distill", "gpu_gb=16", "auto=true")
    options, others = read_beside_config(PlanOptions, given(*words), "finetune plan")
    assert (options.gpu_gb, options.auto) == (16, True)
    assert others == ["model=qwen2.5-7b", "lora.rank=16", "~distill"]


@pytest.mark.parametrize("kind", [PlanOptions, SensitivityOptions])
def test_every_section_of_a_run_is_the_runs(kind):
    words = [f"{name}=anything" for name in sections() if name not in kind.model_fields]
    assert read_beside_config(kind, given(*words), "finetune")[1] == words


@pytest.mark.parametrize(
    ("kind", "word", "meant"),
    [
        (PlanOptions, "gpu=16", "gpu_gb"),
        (PlanOptions, "calibrat=true", "calibrate"),
        (SensitivityOptions, "row=3", "rows"),
        (AllocateOptions, "budget=6", "budget_gb"),
    ],
)
def test_a_slip_in_a_word_of_the_command_names_what_was_meant(kind, word, meant):
    with pytest.raises(ConfigError) as told:
        read_beside_config(kind, given(word), "finetune")
    assert f"{word.partition('=')[0]}: unknown key; did you mean {meant}?" in str(told.value)


@pytest.mark.parametrize("word", ["modl=qwen2.5-7b", "lora_r=16", "train.max_step=3", "nonsense=1"])
def test_what_is_no_word_of_the_command_is_left_to_the_config(word):
    assert read_beside_config(PlanOptions, given(word), "finetune plan")[1] == [word]
