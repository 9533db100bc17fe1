"""`finetune migrate`: configs of other frameworks become configs of the same training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune import load_config, train
from finetune.cli import main
from finetune.config.keys import schema_fields
from finetune.config.schema import SourceConfig
from finetune.data.formats.detection import with_formats
from finetune.data.formats.messages import RawText
from finetune.data.formats.parser import RowParser
from finetune.data.sources.paths import resolve_source
from finetune.migration.files import PEERS, read_peer_config
from finetune.migration.migrate import as_yaml, migrate
from finetune.migration.settings import DEFAULTS, OF_ONE_FRAMEWORK, RULES, UNNEEDED

CONFIGS = Path(__file__).resolve().parents[2] / "peer_configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.name != "dataset_info.json")

# Some of the settings that each file must become, and the names that have no counterpart.
EXPECTED = {
    "axolotl-qlora-packed.yml": (
        {
            "model.name": "Qwen/Qwen2-7B",
            "quant.type": "nf4",
            "lora.rank": 32,
            "lora.alpha": 64,
            "lora.dropout": 0.05,
            "lora.target_modules": "all-linear",
            "data.train": [{"path": "tatsu-lab/alpaca", "format": "alpaca", "split": "train"}],
            "data.held_out": 0.05,
            "data.packing": True,
            "data.max_length": 2048,
            "train.epochs": 4,
            "train.batch_size": 4,
            "train.micro_batch_size": 1,
            "train.warmup_steps": 10,
            "train.gradient_checkpointing": "all",
            "output_dir": "outputs/out",
            "parallel.shard": "full",
            "parallel.offload": True,
        },
        ["evals_per_epoch"],
    ),
    "axolotl-chat-8bit.yml": (
        {
            "quant.type": "int8",
            "lora.alpha": 16,
            "data.train": [{"path": "support.jsonl", "roles": {"assistant": ["agent", "assistant"]}}],
            "data.eval": [{"path": "support-heldout.jsonl"}],
            "data.packing": False,
            "train.learning_rate": 2e-4,
            "train.batch_size": 8,
            "train.eval_every": 50,
            "train.early_stopping": 3,
            "track.wandb": True,
            "track.project": "support",
            "track.run_name": "support-r32",
            "train.optimizer": "adamw_8bit",
        },
        [],
    ),
    "axolotl-sharegpt-kernels.yml": (
        {
            "data.train": [{"path": "mlabonne/FineTome-100k", "split": "train"}],
            "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"],
            "train.gradient_checkpointing": "offload",
            "train.warmup_ratio": 0.1,
        },
        ["optimizer", "datasets"],
    ),
    "llama-factory-lora.yaml": (
        {
            "quant.type": "none",
            "lora.rank": 8,
            "lora.alpha": 16,
            "lora.target_modules": "all-linear",
            "data.train": [
                {"path": f"{CONFIGS}/identity.json", "format": "alpaca", "limit": 1000},
                {"path": f"{CONFIGS}/alpaca_en_demo.json", "format": "alpaca", "limit": 1000},
            ],
            "data.max_length": 2048,
            "data.packing": False,
            "train.batch_size": 8,
            "train.learning_rate": 1e-4,
            "train.save_every": 500,
            "model.dtype": "bfloat16",
        },
        [],
    ),
    "llama-factory-qlora-loraplus.yaml": (
        {
            "quant.type": "nf4",
            "lora.target_modules": ["q_proj", "v_proj"],
            "data.train": [{"path": f"{CONFIGS}/glaive_toolcall_en_demo.json", "format": "sharegpt"}],
            "data.held_out": 0.1,
            "train.eval_every": 500,
            "train.lora_plus_ratio": 16.0,
        },
        [],
    ),
    "llama-factory-pissa.yaml": (
        {
            "lora.init": "pissa_niter_16",
            "data.packing": True,
            "train.max_steps": 200,
            "train.neftune_alpha": 5,
            "track.wandb": True,
        },
        ["template", "lr_scheduler_type", "report_to"],
    ),
    "swift-sft.yaml": (
        {
            "model.name": "Qwen/Qwen2.5-7B-Instruct",
            "quant.type": "none",
            "lora.alpha": 32,
            "lora.target_modules": "all-linear",
            "data.train": [{"path": "swift/self-cognition", "split": "train", "limit": 1000}],
            "train.epochs": 5,
            "train.learning_rate": 1e-4,
            "train.weight_decay": 0.1,
            "train.batch_size": 8,
            "train.keep_checkpoints": 5,
            "parallel.shard": "full",
        },
        ["model_name"],
    ),
    "swift-qlora.sh": (
        {
            "quant.type": "nf4",
            "quant.double": True,
            "data.train": [
                {"path": "AI-ModelScope/alpaca-gpt4-data-zh", "split": "train", "limit": 500},
                {"path": "AI-ModelScope/alpaca-gpt4-data-en", "split": "train", "limit": 500},
                {"path": "swift/self-cognition", "split": "train", "limit": 500},
            ],
            "data.system": "You are a helpful assistant.",
            "data.max_length": 2048,
            "train.batch_size": 16,
            "train.save_every": 50,
        },
        ["model_name"],
    ),
    "swift-ddp.sh": (
        {
            "data.train": [{"path": "rows.jsonl"}],
            "data.eval": [{"path": "heldout.jsonl", "limit": 200}],
            "data.packing": True,
            "train.micro_batch_size": 4,
            "train.batch_size": 8,
            "train.eval_every": 50,
            "train.early_stopping": 3,
        },
        ["gradient_accumulation_steps"],
    ),
    "trl-sft.yaml": (
        {
            "model.name": "Qwen/Qwen2.5-0.5B",
            "quant.type": "nf4",
            "lora.rank": 32,
            "lora.dropout": 0.05,
            "data.train": [{"path": "trl-lib/Capybara", "split": "train"}],
            "data.eval": [{"path": "trl-lib/Capybara", "split": "test"}],
            "data.max_length": 2048,
            "train.batch_size": 8,
            "train.eval_every": 100,
            "train.schedule": "cosine",
        },
        [],
    ),
    "trl-sft.sh": (
        {"model.name": "Qwen/Qwen2-0.5B", "quant.type": "none", "data.packing": True, "train.batch_size": 16},
        ["eos_token", "push_to_hub"],
    ),
    "unsloth-notebook.json": (
        {
            "model.name": "unsloth/Qwen2.5-7B",
            "quant.type": "nf4",
            "lora.rank": 16,
            "data.train": [{"path": "rows.jsonl", "format": "text"}],
            "train.max_steps": 60,
            "train.gradient_checkpointing": "offload",
            "train.seed": 3407,
        },
        ["data.train"],
    ),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_becomes_the_same_training(file):
    expected, lost = EXPECTED[file.name]
    migration = migrate(read_peer_config(file))
    assert {key: migration.settings.get(key) for key in expected} == expected
    assert [line.partition(":")[0] for line in migration.lost] == lost


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_written_config_trains_a_step(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", str(file)]) == 0
    printed = capsys.readouterr().err
    assert [name for name in EXPECTED[file.name][1] if f"lost: {name}" not in printed] == []
    quickstart = load_config("quickstart.yaml")
    rows = f"[{{path: {quickstart.data.train[0].path}, limit: 24}}]"
    config = load_config(
        "migrated.yaml",
        [
            f"model.name={quickstart.model.name}",
            f"data.train={rows}",
            f"data.eval={rows}",
            "data.held_out=0",
            "data.max_length=128",
            "data.workers=1",
            "train.epochs=null",
            "train.max_steps=1",
            "train.warmup_steps=null",
            "train.batch_size=2",
            "train.micro_batch_size=2",
            "train.early_stopping=null",
            "train.save_every=null",
            "track.wandb=false",
            "output_dir=run",
        ],
    )
    assert train(config).steps == 1


def test_the_twelve_configs_are_of_all_frameworks():
    assert len(FILES) == len(EXPECTED) == 12
    assert {read_peer_config(file).peer for file in FILES} == set(PEERS)


def test_every_key_of_the_tables_exists():
    keys = [rule.key for rule in RULES.values() if rule.key]
    keys += [rule.key for rules in OF_ONE_FRAMEWORK.values() for rule in rules.values() if rule.key]
    keys += [key for defaults in DEFAULTS.values() for key in defaults]
    assert set(keys) <= set(schema_fields())
    assert not UNNEEDED & set(RULES)


def test_the_defaults_of_trl_are_those_of_the_library(tmp_path):
    from trl import ModelConfig, SFTConfig

    training, model = SFTConfig(output_dir=str(tmp_path), bf16=False), ModelConfig()
    ours = DEFAULTS["trl"]
    assert ours == {
        "lora.rank": model.lora_r,
        "lora.alpha": model.lora_alpha,
        "lora.dropout": model.lora_dropout,
        "data.packing": training.packing,
        "data.max_length": training.max_length,
        "train.epochs": training.num_train_epochs,
        "train.learning_rate": training.learning_rate,
        "train.schedule": training.lr_scheduler_type.value,
        "train.warmup_ratio": training.warmup_steps,
        "train.seed": training.seed,
    }


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("none.yaml", None, "none.yaml"),
        ("empty.yaml", "", "empty.yaml"),
        ("list.yaml", "- a\n- b\n", "list.yaml"),
        ("broken.yaml", "a: [1\n", "broken.yaml"),
        ("broken.json", "{", "broken.json"),
        ("binary.yaml", b"\xff\xfe\x00", "binary.yaml"),
        ("other.yaml", "apiVersion: v1\nkind: Pod\n", "framework="),
        ("no-model.yaml", "sequence_len: 512\ndatasets: [{path: a.jsonl}]\n", "base model"),
        ("no-data.yaml", "base_model: Qwen/Qwen2.5-7B\nadapter: qlora\n", "dataset"),
        ("ppo.yaml", "model_name_or_path: q\nstage: ppo\ndataset: a\n", "stage"),
        ("rl.yaml", "base_model: q\nrl: grpo\ndatasets: [{path: a.jsonl}]\n", "rl"),
        ("no-command.sh", "echo hello\n", "no-command.sh"),
        ("quotes.sh", "swift sft --model 'q\n", "quotes.sh"),
        ("elsewhere.sh", "llamafactory-cli train sft.yaml\n", "finetune migrate sft.yaml"),
    ],
)
def test_a_file_that_is_no_config_is_refused(name, text, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["migrate", name]) == 2
    error = capsys.readouterr().err
    assert key in error and "Traceback" not in error
    assert not Path("migrated.yaml").exists()


@pytest.mark.parametrize("words", [[], ["a.yaml", "b.yaml"], ["a.yaml", "framework=hf"], ["a.yaml", "out=a.json"]])
def test_a_wrong_command_line_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_existing_file_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("migrated.yaml").write_text("mine")
    assert main(["migrate", str(CONFIGS / "trl-sft.yaml")]) == 2
    assert Path("migrated.yaml").read_text() == "mine"


def test_a_value_that_the_schema_refuses_is_left_out_with_its_reason(tmp_path):
    file = tmp_path / "a.yaml"
    settings = {
        "base_model": "q",
        "adapter": "qlora",
        "lora_r": 0,
        "lora_alpha": 16,
        "lora_dropout": 3,
        "datasets": [{"path": "a.jsonl"}],
    }
    file.write_text(yaml.safe_dump(settings))
    migration = migrate(read_peer_config(file))
    assert {"lora.rank", "lora.dropout"}.isdisjoint(migration.settings)
    assert {line.partition(":")[0] for line in migration.lost} == {"lora.rank", "lora.dropout"}


def test_interpolations_of_the_file_stay_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("base_model: q\nadapter: qlora\ndatasets: [{path: 'a${oc.env:HOME}.jsonl'}]\n")
    assert main(["migrate", "a.yaml"]) == 0
    assert load_config("migrated.yaml").data.train[0].path == "a${oc.env:HOME}.jsonl"


def test_half_precision_without_bfloat16_also_computes_in_half_precision(tmp_path):
    file = tmp_path / "a.yaml"
    settings = {"base_model": "q", "adapter": "qlora", "fp16": True, "datasets": [{"path": "a.jsonl"}]}
    file.write_text(yaml.safe_dump(settings))
    found = migrate(read_peer_config(file)).settings
    assert (found["model.dtype"], found["quant.compute_dtype"]) == ("float16", "float16")


@pytest.mark.parametrize("name", ["full_finetuning", "load_best_model_at_end"])
def test_what_would_give_another_adapter_is_never_called_unneeded(name, tmp_path):
    file = tmp_path / "a.yaml"
    settings = {"base_model": "q", "adapter": "qlora", "datasets": [{"path": "a.jsonl"}]}
    for value, lost in ((True, [name]), (False, [])):
        file.write_text(yaml.safe_dump(settings | {name: value}))
        migration = migrate(read_peer_config(file))
        assert [line.partition(":")[0] for line in migration.lost] == lost and name not in migration.unneeded


def test_a_list_of_datasets_becomes_sources_that_read_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"speaker": "client", "said": "a"}, {"speaker": "agent", "said": "b"}]
    rows = {"ask": {"q": "a", "ctx": "", "r": "b"}, "chats": {"dialog": turns}, "docs": {"body": "a"}}
    rows["shapes"] = {"instruction": "<image>a", "output": "b", "pictures": ["a.png"]}
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    tags = {"role_tag": "speaker", "content_tag": "said", "user_tag": "client", "assistant_tag": "agent"}
    registry = {
        "ask": {"file_name": "ask.json", "columns": {"prompt": "q", "query": "ctx", "response": "r"}},
        "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "dialog"}, "tags": tags},
        "docs": {"file_name": "docs.json", "columns": {"prompt": "body"}, "num_samples": 5},
        "shapes": {"file_name": "shapes.json", "columns": {"images": "pictures"}},
        "hub": {"hf_hub_url": "someone/rows", "split": "test"},
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "code": {"script_url": "code.py", "file_name": "code.py", "columns": {"prompt": 7}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    assert main(["migrate", "dataset_info.json", "out=datasets.yaml"]) == 0
    cfg = load_config("datasets.yaml", ["model=tiny"])
    assert [source.name for source in cfg.data.train] == ["ask", "chats", "docs", "shapes", "hub"]
    assert cfg.data.train[2].limit == 5 and cfg.data.train[4].split == "test"
    pair = ("a", "b")
    assert [_texts(source) for source in cfg.data.train[:4]] == [pair, pair, ("a",), pair]
    lost = [line for line in Path("datasets.yaml").read_text().splitlines() if line.startswith("#   ")]
    assert [name for name in ("pairs", "code") if not any(f" {name}: " in line for line in lost)] == []


def _texts(source: SourceConfig) -> tuple[str, ...]:
    [batch] = with_formats(source, resolve_source(source).batches())
    [(_, example)] = RowParser(source).rows(batch)
    return (example.text,) if isinstance(example, RawText) else tuple(m.content for m in example.messages)  # type: ignore[union-attr]


def test_a_list_without_a_dataset_that_can_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text('{"pairs": {"file_name": "a.json", "ranking": true}}')
    assert main(["migrate", "dataset_info.json"]) == 2 and not Path("migrated.yaml").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model_name_or_path: q\npref_loss: orpo\nstage: dpo\npref_beta: 0.2\ncutoff_len: 1024\ndataset: a\n",
            {"preference.objective": "orpo", "preference.beta": 0.2, "data.max_length": 2048},
        ),
        ("model_name_or_path: q\nstage: dpo\ndataset: a\n", {"preference.objective": "dpo"}),
        (
            "base_model: q\nrl: kto\nkto_desirable_weight: 0.2\nsequence_len: 512\ndatasets: [{path: a.jsonl}]\n",
            {"preference.objective": "kto", "preference.desirable_weight": 0.2, "data.max_length": 1024},
        ),
    ],
)
def test_preferences_keep_their_loss_and_count_both_sides_of_a_pair(text, expected, tmp_path):
    file = tmp_path / "peer.yaml"
    file.write_text(text)
    settings = migrate(read_peer_config(file)).settings
    assert {key: settings[key] for key in expected} == expected


ODD_VALUES = {
    "max_steps": [1],
    "learning_rate": {"a": 1},
    "lora_rank": "\ud800",
    "per_device_train_batch_size": [2],
    "gradient_accumulation_steps": "\x1b[31m",
    "max_samples": "many",
    "model": {"a": 1},
    "train": 7,
    "plugins": 7,
    "dataset_dir": "x" * 5_000,
    "num_train_epochs": float("inf"),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_a_value_of_no_meaning_is_lost_with_a_line_or_refused(tmp_path: Path, name: str):
    settings = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "rows.jsonl", "lora_rank": 4}
    (tmp_path / "run.json").write_text(json.dumps(settings | {name: ODD_VALUES[name]}))
    config = read_peer_config(tmp_path / "run.json")
    migration = migrate(config)
    assert any(not line.startswith("dataset:") for line in migration.lost) or name in ("dataset_dir", "train")
    (tmp_path / "mine.yaml").write_text(as_yaml(migration, config, "mine.yaml"), errors="backslashreplace")
    load_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": 7},
        {"file_name": "a.jsonl", "columns": "x"},
        {"file_name": "a.jsonl", "tags": [1], "formatting": "sharegpt"},
        {"columns": {}},
    ],
)
def test_an_odd_entry_of_a_list_of_datasets_is_left_out_or_read(tmp_path: Path, entry: dict):
    listed = {"good": {"file_name": "rows.jsonl"}, "odd": {"file_name": "x"} | entry}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    sources = migrate(read_peer_config(tmp_path / "dataset_info.json")).settings["data.train"]
    assert sources[0]["name"] == "good"
    (tmp_path / "run.yaml").write_text("model_name_or_path: a/b\nfinetuning_type: lora\ndataset: odd\n")
    assert migrate(read_peer_config(tmp_path / "run.yaml")).settings["data.train"]
