"""One error lists every problem of a config: the key, the place, the value found, and what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.explain import unknown_key
from finetune.config.keys import find, schema_fields
from finetune.config.peers import PEERS, REFUSED, RENAMED
from finetune.system.errors import ConfigError

EVERYTHING = """\
name: no
model: Qwen/Qwen2.5-7B
quant: {type: nf5, skip_modules: ["(("], double: 1}
lora:
  lora_r: 8
  rank: 1.5
  alpha: '16x'
  dropout: .nan
  target_modules: q_proj
  layers_to_transform: [0, -1]
  rank_pattern: {q_proj: x}
data:
  train: [rows.jsonl, 5]
  eval: [rows.jsonl, {path: a.jsonl, weigth: 2}]
train:
  max_steps: ten
  schedule: cosin
  resume: true
  per_device_train_batch_size: 2
  early_stopping: 3
  save_every: ${nothing}
  keep_checkpoints: ???
learning_rate: 1e-4
_target_: os.system
foo: {bar: 1}
generation:
"""

EXPECTED = [
    "name (run.yaml:1): found false; allowed: text; in quotes it is text",
    'model (run.yaml:2): found "Qwen/Qwen2.5-7B"; allowed: mapping of keys to values; write {name: Qwen/Qwen2.5-7B}',
    'quant.type (run.yaml:3): found "nf5"; allowed: nf4 | int8 | none; did you mean nf4?',
    "quant.double (run.yaml:3): found 1; allowed: true | false",
    "lora.lora_r (run.yaml:5): unknown key; here it is lora.rank",
    "lora.rank (run.yaml:6): found 1.5; allowed: whole number >= 1",
    'lora.alpha (run.yaml:7): found "16x"; allowed: number > 0',
    "lora.dropout (run.yaml:8): found NaN; allowed: number >= 0 and < 1",
    "lora.target_modules (run.yaml:9): text is a regex",
    "lora.layers_to_transform.1 (run.yaml:10): found -1; allowed: whole number >= 0",
    'lora.rank_pattern.q_proj (run.yaml:11): found "x"; allowed: whole number >= 1',
    "data.train.1 (run.yaml:13): found 5; allowed: mapping of keys to values",
    "data.eval.1.weigth (run.yaml:14): unknown key; did you mean data.eval.1.weight?",
    'train.max_steps (run.yaml:16): found "ten"; allowed: whole number >= 1 or null',
    'train.schedule (run.yaml:17): found "cosin"; allowed: cosine | linear | constant | inverse_sqrt | wsd; '
    "did you mean cosine?",
    "train.resume (run.yaml:18): found true; allowed: text; in quotes it is text",
    "train.per_device_train_batch_size (run.yaml:19): unknown key; here it is train.micro_batch_size",
    "train.early_stopping (run.yaml:20): needs evaluations; set train.eval_every",
    "train.save_every (run.yaml:21): Interpolation key 'nothing' not found",
    "train.keep_checkpoints (run.yaml:22): is missing",
    "learning_rate (run.yaml:23): unknown key; did you mean train.learning_rate?",
    "_target_ (run.yaml:24): unknown key; a config names no code to run",
    "foo (run.yaml:25): unknown key",
    "generation (run.yaml:26): found null; allowed: mapping of keys to values",
]


def test_all_errors_are_reported_at_once_each_with_its_line(complaint: Callable):
    text = complaint(EVERYTHING, "train.seed=-1", "train.max_stesp=2", "lora=wide")
    lines = text.splitlines()
    for expected in EXPECTED:
        assert any(line.strip().startswith(expected) for line in lines), expected
    for key in ("train.seed", "train.max_stesp", "lora"):
        assert any(line.strip().startswith(f"{key} (command line): ") for line in lines), key
    assert "quant.skip_modules.0" in text  # The rules are checked as well.
    assert len(lines) == len(set(lines)) == len(EXPECTED) + 4 + 1
    assert lines[0] == f"{len(lines) - 1} problems in run.yaml"


def test_a_missing_key_is_named(tmp_path: Path, complaint: Callable):
    (tmp_path / "empty.yaml").write_text("")
    text = complaint("model: {}\ndata: {}\n")
    assert "model.name (run.yaml:1): is missing: Hub id or local folder" in text
    assert "data.train (run.yaml:2): is missing" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  seed: 1\n   keep: 2\n", "run.yaml:3:8: not YAML"),
        ("train: {seed: 1\n", "not YAML"),
        ("train: {seed: 1, seed: 2}\n", "train (run.yaml:1:8): seed is given twice"),
        ("train: {seed: 1}\nx: !!python/object/apply:os.system [id]\n", "x (run.yaml:2:4): the tag"),
        ("x: !!binary aGk=\n", "the tag"),
        ("train: {seed: '${x'}\n", "train.seed (run.yaml:1:15): not an interpolation"),
        ("hydra: {run: {dir: x}}\n", "hydra (run.yaml:1): unknown key"),
        (
            "defaults: [{model: qwen2.5-7b-instuct}]\n",
            "model (run.yaml:1): no option qwen2.5-7b-instuct; there is qwen2.5-7b",
        ),
        ("defaults: [{optim: adam}]\n", "optim (run.yaml:1): no option adam; there is none"),
        ("defaults: [lroa]\n", "defaults (run.yaml:1): no option lroa; there is lora"),
        ("defaults:\n  - {model: x-7b}\n  - {optim: adam}\n", "optim (run.yaml:3): no option adam"),
        ("defaults:\n  - {model: x-7b}\n  - {optim: adam}\n", "model (run.yaml:2): no option x-7b"),
        ("name: lost\ndefaults: [{model: '${oc.env:UNSET,x-7b}'}]\n", "no option x-7b"),
        ("defaults: {model: x}\n", "defaults (run.yaml:1): the defaults must be a list"),
        ("defaults: [{lora: dora, quant: nf4}]\n", "Too many keys"),
        ("data: {train: '${data}'}\n", "data.train (run.yaml:1): Interpolation to parent node"),
        ("name: ${output_dir}\noutput_dir: ${name}\n", "Recursive interpolation"),
        ("1: 2\n", "1 (run.yaml:1): a key must be text"),
        ("name: '\\e[31mred'\n".replace("'", '"'), "name"),
    ],
)
def test_an_invalid_file_is_refused_with_its_place(complaint: Callable, text: str, expected: str):
    found = complaint(text)
    assert expected in found
    assert "\x1b" not in found


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"- a list\n",
        b"text",
        b"a: " + b"[" * 5000,
        b"a: &a [*a]\n",
        b"a0: &a0 [x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 15)),
        b"a: b\n--- \nc: d\n",
        b"\x00",
    ],
    ids=["not UTF-8", "list", "scalar", "deep", "alias of itself", "alias bomb", "two documents", "NUL"],
)
def test_hostile_files_end_in_one_clean_error(tmp_path: Path, load: Callable, content: bytes):
    from finetune.config.compose import load_config

    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.max_step", "train.max_steps"),
        ("max_steps", "train.max_steps"),
        ("lora.learning_rate", "train.learning_rate"),
        ("trian", "train"),
        ("model.nmae", "model.name"),
        ("lora_rnk", "lora.rank"),
        ("lora.Rank", "lora.rank"),
        ("load-in-4bit", "quant.type=nf4"),
        ("data.train.3.formt", "data.train.3.format"),
        ("quant.load_in_8bit", "quant.type=int8"),
        ("track.wandb_project", "track.project"),
        ("a.b.micro_batch_size", "train.micro_batch_size"),
        ("outputdir", "output_dir"),
        ("data.train.0.type", "format"),
        ("data.train.0.field_messages", "columns={messages: THEIRS}"),
        ("val_set_size", "data.held_out"),
        ("dataset_num_proc", "data.workers"),
        ("data.streaming", "data.stream_rows"),
    ],
)
def test_an_unknown_key_is_answered_with_the_probable_one(key: str, meant: str):
    assert meant in unknown_key(key).text


def test_an_unknown_role_is_one_problem_that_lists_the_four_roles(complaint: Callable):
    text = complaint("data: {train: [{path: x, roles: {bot: assistant, user: 5}}]}\n")
    assert text.startswith("2 problems")
    assert "data.train.0.roles.bot (run.yaml:1): unknown key; allowed: mapping as {system | user | assistant" in text
    assert "data.train.0.roles.user (run.yaml:1): found 5; allowed: text or list of text" in text


def test_the_fp4_of_peers_is_answered_with_nf4(complaint: Callable):
    assert "did you mean nf4?" in complaint("quant: {type: fp4}\n")


def test_a_key_without_a_near_match_gets_no_guess():
    assert unknown_key("zzzz").text == "unknown key; see finetune train --help-all"


FAMILIAR = """lora_r lora_alpha lora_dropout lora_target lora_target_modules use_dora use_rslora adapter
per_device_train_batch_size micro_batch_size gradient_accumulation_steps gradient_checkpointing neftune_noise_alpha
load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype bf16 fp16
model_name_or_path base_model cutoff_len sequence_len max_seq_length sample_packing packing pad_to_sequence_len
num_epochs num_train_epochs learning_rate lr_scheduler_type warmup_ratio warmup_steps optim seed train_on_inputs
val_set_size datasets dataset dataset_dir save_steps eval_steps resume_from_checkpoint
wandb_project report_to resize_token_embeddings_to_32x""".split()


@pytest.mark.parametrize("name", FAMILIAR)
def test_a_peers_name_is_answered_with_our_key(name: str):
    text = unknown_key(name).text
    assert any(field in text for field in schema_fields() if "." in field), text


@pytest.mark.parametrize("name", PEERS)
def test_every_answer_to_a_peers_name_contains_a_key_of_ours(name: str):
    answer = PEERS[name].replace("an item of ", "").replace("[{path:", " ").split("=")[0].split(",")[0].split(" ")[0]
    item_keys = {field.split(".")[-1] for field in schema_fields() if field.startswith("data.train.*.")}
    assert find(answer) is not None or answer in item_keys


def test_no_key_of_ours_is_in_the_table_of_peers():
    own = {field.split(".")[-1] for field in schema_fields()}
    assert own & (PEERS.keys() | REFUSED.keys()) == set()
    assert PEERS.keys() & REFUSED.keys() == set()


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name_in_a_file_and_as_an_override(complaint: Callable, old: str):
    new = RENAMED[old].split()[0]
    assert find(old) is None and find(new) is not None
    section, _, key = old.partition(".")
    for found in (complaint(f"{section}: {{{key}: 1}}\n"), complaint("", f"{old}=1")):
        assert found.splitlines()[1].strip().startswith(f"{old} (") and RENAMED[old] in found
