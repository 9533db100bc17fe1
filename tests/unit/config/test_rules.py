"""Contradicting settings are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune.config.explain import problems_of
from finetune.config.problems import Problem
from finetune.config.schema import RunConfig

EVAL = "data.eval=[{path: held.jsonl}]"

CACHED = ["distill.objective=recover", "distill.teacher.placement=cached", "distill.cache=c"]
GUARDED = ["guard.max=0.1", "train.eval_every=5", "data.eval=[{path: rows.jsonl}]"]
REWARDS = ["reward.loss=grpo"]
ROLLOUTS = ["reward.engine=server", "reward.url=http://a"]
SERVER = [
    "distill.objective=distill",
    "distill.teacher.placement=server",
    "distill.cache=c",
    "distill.teacher.url=http://a",
]

# Settings that contradict each other, the key of the problem, and a stable word of its text.
BROKEN: list[tuple[list[str], str, str]] = [
    (["model.attention=flash_attention_2", "model.dtype=float32"], "model.attention", "float32"),
    (["model.embedding=host", "lora.new_tokens=[<a>]"], "model.embedding", "lora.new_tokens"),
    (["model.embedding=host", "lora.modules_to_save=[embed_tokens]"], "model.embedding", "lora.modules_to_save"),
    (["train.deterministic=true", "model.attention=sdpa"], "train.deterministic", "model.attention=auto"),
    (["quant.skip_modules=[a,a]"], "quant.skip_modules", "twice"),
    (["quant.skip_modules=['(a']"], "quant.skip_modules.0", "regular expression"),
    (["quant.int8=[a,a]"], "quant.int8", "twice"),
    (["quant.int8=['(a']"], "quant.int8.0", "regular expression"),
    (["quant.int8=[a]", "quant.skip_modules=[b,a]"], "quant.int8", "quant.skip_modules"),
    (["quant.int8=[a]", "quant.type=int8"], "quant.int8", "quant.type=nf4"),
    (["quant.int8=[a]", "quant.type=none"], "quant.int8", "quant.type=nf4"),
    (["quant.keep_dequantized=true", "quant.type=int8"], "quant.keep_dequantized", "quant.type=nf4"),
    (["quant.keep_dequantized=true", "quant.type=none"], "quant.keep_dequantized", "quant.type=nf4"),
    (["lora.target_modules=[q_proj,q_proj]"], "lora.target_modules", "twice"),
    (["lora.target_modules=[]"], "lora.target_modules", "all-linear"),
    (["lora.target_modules=q_proj"], "lora.target_modules", "[q_proj]"),
    (["lora.target_modules=q_proj,v_proj"], "lora.target_modules", "[q_proj, v_proj]"),
    (["lora.target_modules=(q|v_proj"], "lora.target_modules", "regular expression"),
    (["lora.target_modules=.*q_proj", "lora.layers_to_transform=[0]"], "lora.layers_to_transform", "list of names"),
    (["lora.layers_to_transform=[]"], "lora.layers_to_transform", "null"),
    (["lora.layers_to_transform=[1,1]"], "lora.layers_to_transform", "twice"),
    (["lora.modules_to_save=[q_proj]"], "lora.modules_to_save", "q_proj"),
    (["lora.modules_to_save=[a,a]"], "lora.modules_to_save", "twice"),
    (["lora.rank_pattern={'(': 2}"], "lora.rank_pattern.(", "regular expression"),
    (["lora.alpha_pattern={'[': 2}"], "lora.alpha_pattern.[", "regular expression"),
    (["lora.new_tokens=[<a>,<a>]"], "lora.new_tokens", "twice"),
    (["lora.new_tokens=[' ']"], "lora.new_tokens", "white space"),
    (["lora.new_tokens=[<a>]", "lora.modules_to_save=[embed_tokens]"], "lora.new_tokens", "embed_tokens"),
    (["lora.freeze_a=true", "lora.dora=true"], "lora.dora", "lora.freeze_a"),
    (["lora.freeze_a=true", "lora.init=pissa", "quant.type=none"], "lora.init", "lora.freeze_a"),
    (["lora.freeze_a=true", "lora.init=loftq"], "lora.init", "lora.freeze_a"),
    (["lora.freeze_a=true", "lora.init=orthogonal"], "lora.init", "lora.freeze_a"),
    (["lora.freeze_a=true", "train.lora_plus_ratio=4"], "train.lora_plus_ratio", "lora.freeze_a"),
    (["lora.init=pissa"], "lora.init", "quant.type=none"),
    (["lora.init=pissa_niter_16", "quant.type=int8"], "lora.init", "quant.type=none"),
    (["lora.init=olora", "quant.type=int8"], "lora.init", "quant.type=none"),
    (["lora.init=loftq", "quant.type=none"], "lora.init", "quant.type=nf4"),
    (["lora.init=loftq", "quant.type=int8"], "lora.init", "quant.type=nf4"),
    (["lora.init=orthogonal", "lora.rank=3"], "lora.rank", "even"),
    (["lora.init=orthogonal", "lora.rank_pattern={q_proj: 5}"], "lora.rank_pattern.q_proj", "even"),
    (["lora.init=gaussian", "lora.init_adapter=old"], "lora.init", "lora.init_adapter"),
    (["distill.divergence=jsd"], "distill.objective", "distill.divergence"),
    (["distill.divergence=jsd", *GUARDED], "distill.objective", "distill.divergence"),
    (["distill.teacher.placement=cached", *GUARDED], "distill.cache", "placement=cached"),
    (["guard.max=0.1", EVAL], "guard.max", "train.eval_every"),
    (["guard.max=0.1"], "guard.max", "data.eval"),
    (["guard.action=stop"], "guard.max", "guard.action"),
    (["guard.steps=5", *GUARDED], "guard.steps", "guard.action=recover"),
    (
        ["guard.action=recover", "data.stream_rows=10", "train.max_steps=9", *GUARDED],
        "guard.action",
        "data.stream_rows",
    ),
    (["distill.objective=recover", "distill.teacher.name=t"], "distill.teacher.name", "objective=distill"),
    (["distill.objective=recover", "distill.teacher.lora=t"], "distill.teacher.lora", "objective=distill"),
    (["distill.objective=recover", "distill.weight=2"], "distill.weight", "null"),
    (["distill.objective=distill"], "distill.teacher.name", "distill.teacher.lora"),
    (["distill.objective=recover", "distill.beta=0.1"], "distill.beta", "divergence=jsd"),
    (["distill.objective=recover", "distill.divergence=jsd", "distill.alpha=0.2"], "distill.alpha", "skew_kl"),
    (["distill.objective=recover", "distill.teacher.placement=cached"], "distill.cache", "placement=cached"),
    ([*CACHED, "distill.divergence=reverse_kl"], "distill.divergence", "cache_kind=hidden"),
    ([*CACHED, "distill.temperature=2"], "distill.temperature", "found 2"),
    ([*CACHED, "distill.hidden_weight=1"], "distill.hidden_weight", "cache_kind=hidden"),
    ([*CACHED, "distill.on_policy=0.5"], "distill.on_policy", "placement=cached"),
    ([*CACHED, "data.stream_rows=10", "train.max_steps=9"], "data.stream_rows", "placement=cached"),
    ([*SERVER, "distill.cache_kind=hidden", "distill.divergence=jsd"], "distill.divergence", "server"),
    (
        ["distill.objective=recover", "distill.cache=c", "distill.teacher.placement=server"],
        "distill.teacher.url",
        "http",
    ),
    (["distill.objective=recover", "distill.teacher.url=http://a"], "distill.teacher.url", "placement=server"),
    (["distill.objective=recover", "distill.teacher.steps_ahead=2"], "distill.teacher.steps_ahead", "streamed"),
    (["preference.beta=0.2"], "preference.objective", "preference.beta"),
    (["preference.objective=dpo", "preference.gamma=2"], "preference.gamma", "objective=simpo"),
    (["preference.objective=orpo", "preference.reference=base"], "preference.reference", "dpo or ipo or kto"),
    (["preference.objective=dpo", "preference.reference=cached"], "preference.cache", "finetune cache"),
    (["preference.objective=kto", "preference.reference=cached"], "preference.reference", "kto"),
    (["preference.objective=dpo", "preference.reference=init_adapter"], "preference.reference", "lora.init_adapter"),
    (["preference.objective=dpo", "lora.init=loftq"], "lora.init", "changes the base"),
    (["preference.objective=dpo", "data.train_on=all"], "data.train_on", "assistant"),
    (["preference.objective=dpo", "data.truncation=split"], "data.truncation", "drop or error"),
    (["preference.objective=kto", "train.batch_size=1", "data.packing=false"], "train.batch_size", "at least 2"),
    (["preference.objective=dpo", "distill.objective=recover"], "distill.objective", "preference.objective"),
    (["preference.objective=dpo", *GUARDED], "guard.max", "preference.objective"),
    (["reward.beta=0.1"], "reward.loss", "reward.beta"),
    ([*REWARDS, "reward.functions={regex: 1}"], "reward.pattern", "regex"),
    ([*REWARDS, "reward.functions={json_schema: 1}"], "reward.json_schema", "json_schema"),
    ([*REWARDS, "reward.functions={length: 1}"], "reward.length", "length"),
    ([*REWARDS, "reward.pattern=a"], "reward.pattern", "reward.functions.regex"),
    ([*REWARDS, "reward.format=a"], "reward.format", "reward.functions.format"),
    ([*REWARDS, "reward.functions={regex: 1}", "reward.pattern='(a'"], "reward.pattern", "regular expression"),
    ([*REWARDS, "reward.functions={format: 1}", "reward.format='(a'"], "reward.format", "regular expression"),
    ([*REWARDS, "reward.functions={number: 0}"], "reward.functions.number", "remove"),
    ([*REWARDS, "reward.functions={length: 1}", "reward.length=128"], "reward.length", "reward.max_new_tokens=128"),
    ([*REWARDS, "reward.clip_high=0.1"], "reward.clip_high", "reward.clip_low"),
    ([*REWARDS, "reward.reference=base"], "reward.reference", "reward.beta"),
    ([*REWARDS, "reward.engine=server"], "reward.url", "http://"),
    ([*REWARDS, "reward.url=http://a"], "reward.url", "engine=server"),
    ([*REWARDS, "lora.dropout=0.1"], "lora.dropout", "0"),
    ([*REWARDS, "reward.beta=0.1", "reward.reference=init_adapter"], "reward.reference", "lora.init_adapter"),
    ([*REWARDS, "reward.beta=0.1", "lora.init=loftq"], "lora.init", "changes the base"),
    ([*REWARDS, *ROLLOUTS, "lora.dora=true"], "lora.dora", "engine=process"),
    ([*REWARDS, *ROLLOUTS, "lora.rank_pattern={q_proj: 4}"], "lora.rank_pattern", "engine=process"),
    ([*REWARDS, "reward.max_new_tokens=2048"], "reward.max_new_tokens", "data.max_length=2048"),
    ([*REWARDS, "data.train_on=last"], "data.train_on", "sampled"),
    ([*REWARDS, "data.truncation=left"], "data.truncation", "drop or error"),
    ([*REWARDS, "data.stream_rows=10", "train.max_steps=10"], "data.stream_rows", "reward.loss"),
    ([*REWARDS, EVAL], "generation.num_examples", "100"),
    ([*REWARDS, "train.neftune_alpha=5"], "train.neftune_alpha", "reward.loss"),
    ([*REWARDS, "reward.updates=2", "train.max_steps=3"], "train.max_steps", "reward.updates=2"),
    ([*REWARDS, "reward.updates=2", "train.save_every=3"], "train.save_every", "reward.updates=2"),
    ([*REWARDS, "distill.objective=recover"], "distill.objective", "reward.loss"),
    ([*REWARDS, "preference.objective=dpo"], "preference.objective", "reward.loss"),
    ([*REWARDS, *GUARDED, "generation.num_examples=5"], "guard.max", "reward.beta"),
    (["data.eval=[{path: a/x.jsonl},{path: b/x.jsonl}]"], "data.eval", " x;"),
    (["data.eval=[{path: a/x.jsonl.gz},{path: b/x.csv}]"], "data.eval", " x;"),
    (["train.min_lr_ratio=0.1", "train.schedule=constant"], "train.min_lr_ratio", "constant"),
    (["train.decay_ratio=0.5"], "train.decay_ratio", "wsd"),
    (["train.schedule=wsd", "train.decay_ratio=0"], "train.decay_ratio", "> 0"),
    (["train.schedule=wsd", "train.decay_ratio=1.1"], "train.decay_ratio", "<= 1"),
    (["data.eval=[{path: a, weight: 2}]"], "data.eval.0.weight", "data.train"),
    (["data.eval=[{path: a, name: held_out}]", "data.held_out=0.1"], "data.eval", "held_out"),
    (["data.eval=[{path: a, split: held_out}]", "data.held_out=0.1"], "data.eval", "held_out"),
    (["data.train=[{path: a.jsonl, split: train}]"], "data.train.0.split", "a.jsonl"),
    (["data.train=[{path: a.jsonl.gz, split: train}]"], "data.train.0.split", "folder or hub dataset"),
    (["data.train=[{path: 'x/*.parquet', subset: main}]"], "data.train.0.subset", "hub dataset"),
    (["data.eval=[{path: x},{path: a.csv, revision: v1}]"], "data.eval.1.revision", "hub dataset"),
    (["data.train=[{path: a, columns: {prompt: q, completion: q}}]"], "data.train.0.columns", "prompt and completion"),
    (["data.train=[{path: a, roles: {user: x, assistant: [y, x]}}]"], "data.train.0.roles", "user and assistant"),
    (["data.train=[{path: a, roles: {user: [x, x]}}]"], "data.train.0.roles", "role x"),
    (["data.train=[{path: a, format: alpaca, roles: {user: x}}]"], "data.train.0.roles", "alpaca"),
    (["data.image.max_pixels=784"], "data.image.min_pixels", "data.image.max_pixels=784"),
    (["data.video.min_pixels=700000"], "data.video.min_pixels", "data.video.max_pixels=602112"),
    (["data.stream_rows=10"], "data.stream_rows", "train.max_steps"),
    (["data.stream_rows=10", "train.max_steps=5", "data.held_out=0.1"], "data.held_out", "data.eval"),
    (["train.max_steps=3", "train.epochs=2"], "train.epochs", "train.max_steps"),
    (["train.max_steps=3", "train.warmup_steps=3"], "train.warmup_steps", "train.max_steps=3"),
    (["train.batch_size=4", "train.micro_batch_size=5"], "train.micro_batch_size", "train.batch_size=4"),
    (["train.batch_size=4", "train.world_size=8"], "train.world_size", "train.batch_size=4"),
    (["train.eval_every=5"], "train.eval_every", "data.eval"),
    (["train.early_stopping=2", EVAL], "train.early_stopping", "train.eval_every"),
    (["train.early_stopping=2", "train.eval_every=2"], "train.early_stopping", "data.eval"),
    (["generation.num_examples=5"], "generation.num_examples", "data.eval"),
    (["generation.every=5"], "generation.every", "data.eval"),
    (["generation.every=5", "generation.samples=0", EVAL], "generation.every", "generation.samples"),
]

SOUND: list[list[str]] = [
    ["model.attention=flash_attention_2"],
    ["model.embedding=host", "lora.modules_to_save=[lm_head]"],
    ["quant.skip_modules=['*.mlp.*', 'model\\.layers\\.(0|1)\\..*', lm_head]"],
    ["lora.target_modules=all-linear", "lora.layers_to_transform=[0,1]"],
    ["lora.target_modules=.*\\.(q|v)_proj"],
    ["lora.init=pissa", "quant.type=none"],
    ["lora.init=loftq", "quant.double=false"],
    ["lora.init=orthogonal", "lora.rank=6"],
    ["lora.dora=true", "quant.type=int8"],
    ["lora.init_adapter=old"],
    ["lora.freeze_a=true", "lora.init=gaussian", "lora.rslora=true", "lora.new_tokens=[<a>]"],
    ["lora.new_tokens=[<a>,<b>]", "lora.modules_to_save=[norm]"],
    ["data.eval=[{path: a/x.jsonl},{path: b/x.jsonl, name: y}]"],
    ["data.eval=[{path: rows, split: a},{path: rows, split: b}]"],
    ["train.max_steps=1", "train.warmup_ratio=0.5"],
    ["train.max_steps=4", "train.warmup_steps=3"],
    ["train.batch_size=4", "train.micro_batch_size=4", "train.world_size=4"],
    ["train.early_stopping=2", "train.eval_every=2", EVAL],
    ["generation.num_examples=5", "generation.every=5", EVAL],
    ["generation.num_examples=5", "train.eval_every=2", "train.early_stopping=2", "data.held_out=0.1"],
    ["data.train=[{path: folder, split: train},{path: a/b, split: test, subset: main, revision: v1}]"],
    ["data.train=[{path: a, columns: {prompt: q, completion: a}, roles: {user: x, assistant: [y, z]}}]"],
    ["data.eval=[{path: a, name: held_out}]"],
    ["data.stream_rows=10", "train.max_steps=5", "train.eval_every=5", EVAL],
    ["distill.objective=recover", "distill.teacher.placement=streamed", "distill.teacher.steps_ahead=4"],
    ["distill.objective=sft+anchor", "distill.divergence=jsd", "distill.beta=0.9", "distill.weight=0.1"],
    ["distill.objective=distill", "distill.teacher.lora=tuned", "distill.on_policy=1"],
    [
        *CACHED,
        "distill.cache_kind=hidden",
        "distill.divergence=skew_kl",
        "distill.alpha=0.2",
        "distill.hidden_weight=1",
    ],
    SERVER,
    [*GUARDED, "guard.action=recover", "guard.steps=5", "distill.cache=c", "distill.teacher.placement=cached"],
    [*GUARDED, "distill.objective=sft+anchor", "guard.action=stop"],
]


def problems(settings: list[str]) -> list[Problem]:
    tree: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    for setting in settings:
        key, _, value = setting.partition("=")
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = yaml.safe_load(value)
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        return problems_of(tree, error)
    return []


@pytest.mark.parametrize(("settings", "key", "word"), BROKEN, ids=str)
def test_a_contradiction_names_its_key_and_the_help(settings: list[str], key: str, word: str):
    found = problems(settings)
    assert any(problem.key == key and word in problem.text for problem in found), found


@pytest.mark.parametrize("settings", SOUND, ids=str)
def test_compatible_settings_are_accepted(settings: list[str]):
    assert problems(settings) == []


def test_the_rules_hold_for_a_config_made_in_python():
    both = {"max_steps": 1, "epochs": 1}
    with pytest.raises(ValidationError, match=r"train\.max_steps"):
        RunConfig.model_validate({"model": {"name": "base"}, "data": {"train": [{"path": "x"}]}, "train": both})


def test_rules_are_checked_although_other_values_are_wrong():
    """A wrong seed does not hide a wrong warm-up, and a wrong eval_every is not reported as missing."""
    found = problems(
        ["train.seed=-1", "train.warmup_ratio=1.5", "train.early_stopping=2", "train.eval_every=often", EVAL]
    )
    assert {problem.key for problem in found} == {"train.seed", "train.eval_every", "train.warmup_ratio"}
