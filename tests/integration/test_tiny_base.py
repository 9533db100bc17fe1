"""The embedded base: what it is, and that it knows what it was taught and nothing of the sample's skill."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

DATA = Path(__file__).resolve().parents[2] / "data"
BASE = DATA / "tiny-qwen2.5"


def script(name: str) -> ModuleType:
    """A file of data/, which are scripts and no part of the package."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # they import one another by these names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    script("generate")
    script("card")
    return script("pretrain")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def bf16() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture(scope="module")
def nf4(pretrain: ModuleType) -> PreTrainedModel:
    return pretrain.load_nf4(BASE)


def test_it_is_a_small_qwen2_with_grouped_heads_biases_and_tied_embeddings(bf16: PreTrainedModel) -> None:
    assert type(bf16) is Qwen2ForCausalLM
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    assert 2e6 <= bf16.num_parameters() <= 4e6
    assert (BASE / "model.safetensors").stat().st_size <= 10_000_000
    assert bf16.lm_head.weight is bf16.model.embed_tokens.weight
    assert bf16.config.num_key_value_heads < bf16.config.num_attention_heads
    attention = bf16.model.layers[0].self_attn
    assert all(layer.bias.abs().sum() > 0 for layer in (attention.q_proj, attention.k_proj, attention.v_proj))


def test_every_linear_fills_whole_nf4_blocks(bf16: PreTrainedModel) -> None:
    linears = [m for m in bf16.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * bf16.config.num_hidden_layers
    assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)
    assert bf16.config.vocab_size % 64 == 0


def test_spare_rows_are_left_for_new_tokens(bf16: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) + 8 <= bf16.config.vocab_size


def test_it_tokenizes_by_the_rules_of_qwen2(shared: Path) -> None:
    theirs = json.loads((shared / "qwen2.5" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    for part in ("normalizer", "pre_tokenizer"):
        assert ours[part] == theirs[part]


@pytest.mark.parametrize(
    "text", ["2025 = 2 + 0", "It's we'LL  \n\n\tx\r\n", "naïve “日本” 🙂 e\u0301", '{"a": "b", "c": 12}']
)
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert all(tokenizer.decode([i]).strip() in set("0123456789") for i in tokenizer("1234567890")["input_ids"])


def test_the_chat_template_is_chatml_with_a_default_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    default = tokenizer.apply_chat_template([user], tokenize=False)
    assert default.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    own = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_pretraining_rows_are_what_the_chat_template_writes(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = Random(3)
    conversations = [pretrain.conversation(rng) for _ in range(100)]
    for conversation, row in zip(conversations, pretrain.encode(tokenizer, conversations), strict=True):
        assert row.ids == tokenizer.apply_chat_template(conversation)["input_ids"]


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_it_knows_what_its_card_says(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, weights: str, request: pytest.FixtureRequest
) -> None:
    """Over 20 prompts a task: a share of 0.655 over 520 prompts has a standard error of 2.1 points."""
    scores = pretrain.accuracies(request.getfixturevalue(weights), tokenizer, 11, 20)
    column = {"bf16": 2, "nf4": 3}[weights]
    lines = (line.split("|") for line in (BASE / "README.md").read_text(encoding="utf-8").splitlines())
    claimed = {
        line[1].strip(): float(line[column].strip().rstrip("%")) / 100
        for line in lines
        if len(line) == 5 and "%" in line[2]
    }
    assert claimed.keys() - {"task", "mean"} >= scores.keys()
    assert abs(sum(scores.values()) / len(scores) - claimed["mean"]) <= 3 * 0.021, scores
    for task in ("order/keyed", "order/all", "order/question", "record/convert"):
        assert scores[task] >= 0.85, "what the sample's skill is built from"


def heldout() -> list[list[dict[str, str]]]:
    lines = (DATA / "sample" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_it_lacks_the_skill_of_the_sample_data(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, nf4: PreTrainedModel
) -> None:
    assert pretrain.exact_match(nf4, tokenizer, pretrain.encode(tokenizer, heldout())) <= 0.10


def test_every_token_of_the_sample_answers_was_an_answer_in_pretraining(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An adapter of attention can't emit a token that the tied head never learned to emit."""
    rng = Random(0)
    learned = answer_tokens(pretrain, tokenizer, [pretrain.conversation(rng) for _ in range(3000)])
    assert answer_tokens(pretrain, tokenizer, heldout()) <= learned


def answer_tokens(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> set[int]:
    rows = pretrain.encode(tokenizer, conversations)
    return {token for row in rows for token, answer in zip(row.ids, row.answer, strict=True) if answer}
