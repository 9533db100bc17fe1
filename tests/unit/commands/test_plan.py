"""`finetune plan`: exit codes, JSON and tables; nothing heavy is imported, nothing is downloaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from finetune.cli import main
from finetune.planning import gpus, timing
from finetune.system.resources import packaged
from tests.unit.planning.test_timing import RATES


@pytest.fixture(autouse=True)
def without_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))


def plan(capsys, *words: str) -> tuple[int, dict]:
    code = main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_that_fits_ends_with_0_and_one_that_does_not_with_3(capsys):
    code, content = plan(capsys, "config=lora.yaml", "gpu_gb=16")
    assert code == 0 and content["fits"] and content["changes"] == []
    assert content["peak_bytes"] < content["needed_bytes"] <= content["free_bytes"] == 16e9
    assert sum(content["parts"].values()) == pytest.approx(content["peak_bytes"])
    code, content = plan(
        capsys, "config=lora.yaml", "gpu_gb=12", "train.gradient_checkpointing=none", "data.max_length=8192"
    )
    assert code == 3 and not content["fits"]
    assert any(change["fits"] for change in content["changes"])


def test_too_little_main_memory_for_offloading_does_not_fit_on_this_machine(capsys, monkeypatch):
    here = gpus.PlannedDevice("cuda", 80e9, "this GPU", None)
    monkeypatch.setattr(gpus, "planned_device", lambda *_: here)
    monkeypatch.setattr("finetune.planning.auto_batch.available_memory", lambda: 1e6)
    words = ("config=lora.yaml", "train.gradient_checkpointing=offload")
    code, content = plan(capsys, *words)
    assert code == 3 and not content["fits"] and content["host_bytes"] > 1e6
    assert main(["plan", *words]) == 3 and "WARNING" in capsys.readouterr().out
    code, content = plan(capsys, *words, "gpu_gb=80")
    assert code == 0 and content["fits"]


def test_every_packaged_config_can_be_planned(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("traces", "train", "heldout"):  # Two configs name rows that the user makes first.
        row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for file in sorted(packaged("configs").glob("*.yaml")):
        code, content = plan(capsys, f"config={file.name}", "gpu_gb=80")
        assert code == 0 and sum(content["parts"].values()) == pytest.approx(content["peak_bytes"]), file


def test_the_overrides_of_auto_give_a_run_that_fits(capsys):
    words = ("config=lora.yaml", "gpu_gb=10", "data.max_length=16384", "train.gradient_checkpointing=none")
    code, content = plan(capsys, *words, "auto=true")
    assert code == 3
    code, again = plan(capsys, *words, *content["auto"]["overrides"])
    assert code == 0 and again["needed_bytes"] == pytest.approx(content["auto"]["needed_bytes"])
    assert again["tokens_per_second"] == pytest.approx(content["auto"]["tokens_per_second"])


def test_the_table_has_every_size_and_budget(capsys):
    code, lengths = plan(capsys, "table=true")
    assert code == 0 and list(lengths) == ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
    assert list(lengths["7B"]) == ["8", "12", "16", "24", "48", "80", "141"]
    assert main(["plan", "table=true"]) == 0
    text = capsys.readouterr().out
    assert f"{lengths['7B']['24']:,}" in text and "\x1b" not in text and "base=nf4" in text


def test_the_text_lists_the_memory_the_verdict_and_the_changes(capsys):
    code = main(
        [
            "plan",
            "config=lora.yaml",
            "gpu_gb=12",
            "train.gradient_checkpointing=none",
            "data.max_length=8192",
            "auto=true",
        ]
    )
    text = capsys.readouterr().out
    assert code == 3
    for words in (
        "activations kept",
        "linears in nf4",
        "predicted peak",
        "DOES NOT FIT",
        "saves",
        "fastest that fits",
        "assumed",
        "TFLOP per step",
    ):
        assert words in text


def test_the_first_line_is_the_verdict_in_color_on_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for gb, verdict, color in ((16, "fits: 13.0 of 16.0 GB, 15.0 with margin", "32"), (4, "DOES NOT FIT: ", "31")):
        words = ["plan", "model=qwen2.5-7b", f"gpu_gb={gb}"]
        main(words)
        plain = capsys.readouterr().out
        assert plain.startswith(verdict) and "\x1b" not in plain
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout.isatty", lambda: True)
            main(words)
        first, *others = capsys.readouterr().out.splitlines()
        assert re.search(rf"\x1b\[[\d;]*{color}m", first) and "\x1b" not in "".join(others)


def test_a_known_gpu_gives_memory_and_speed(capsys):
    plans = {word: plan(capsys, "config=lora.yaml", f"gpu={word}")[1] for word in ("4090", "t4", "RTX 3090", "a100-40")}
    assert [content["free_bytes"] for content in plans.values()] == [24e9, 16e9, 24e9, 40e9]
    speed = {word: content["step_flops"] / content["step_seconds"] for word, content in plans.items()}
    assert speed["a100-40"] > speed["4090"] > speed["RTX 3090"] > speed["t4"]
    main(["plan", "config=lora.yaml", "gpu=t4", "train.max_steps=9"])
    times = [line for line in capsys.readouterr().out.splitlines() if " s per step" in line or "in total" in line]
    assert len(times) == 2 and all("assumed" in line for line in times)
    main(["plan", "config=lora.yaml", "gpu=t4", "train.max_steps=9", "tflops=30"])
    assert "assumed" not in capsys.readouterr().out


def test_the_time_names_its_source_measured_given_or_assumed(capsys):
    words = ("config=quickstart.yaml", "train.max_steps=10")
    assert "assumed" in plan(capsys, *words)[1]["rates"]
    timing.write_rates("cpu", RATES)
    content = plan(capsys, *words)[1]
    if content["device"] == "this machine's memory":
        assert content["rates"] == "measured on a machine"
    assert content["total_seconds"] == pytest.approx(10 * content["step_seconds"])
    given = plan(capsys, *words, "tflops=1")[1]
    assert given["rates"] == "given: 1 TFLOP/s" and sum(given["seconds_shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "config=X.yaml"),
        (("config=lora.yaml", "gpu_gb=0"), "gpu_gb"),
        (("config=lora.yaml", "gpu_bg=16"), "gpu_bg"),
        (("config=lora.yaml", "tokens=-1"), "tokens"),
        (("config=lora.yaml", "document_tokens=4096"), "data.max_length=2048"),
        (("table=true", "gpu_gb=16"), "drop gpu_gb"),
        (("config=lora.yaml", "gpu_gb=16", "gpu=t4"), "gpu_gb=16"),
        (("config=lora.yaml", "gpu=a100"), "help: gpu=a100-80"),
        (("config=lora.yaml", "gpu=a100-24"), "help: gpu=a100-80"),
        (("config=lora.yaml", "gpu=16"), "help: gpu_gb=16"),
        (("config=lora.yaml", "gpu=voodoo"), "gpu=voodoo"),
        (("config=lora.yaml", "model.name=somebody/model"), "model.name=somebody/model"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 777,
    "tie_word_embeddings": False,
}


def test_the_plan_of_a_local_model_uses_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    code, content = plan(capsys, "config=lora.yaml", f"model.name={tmp_path}", "gpu_gb=1", "auto=true")
    assert code == 0 and content["layers"] == 1 and content["auto"]["overrides"]
    assert content["parts"]["embedding"] == 2 * 777 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"model_type": "gemma"}, "supported: qwen2"),
        (None, "config.json"),
    ],
)
def test_an_invalid_local_model_is_refused(change, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{" if change is None else json.dumps({**SHAPE, **change}))
    assert main(["plan", "config=lora.yaml", f"model.name={tmp_path}", "gpu_gb=1"]) == 2
    assert message in capsys.readouterr().err


def test_ranks_share_a_step_and_each_holds_the_whole_model(capsys, monkeypatch):
    words = ("config=lora.yaml", "gpu_gb=80")
    alone = plan(capsys, *words)[1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = plan(capsys, *words)[1]
    computing = 1 - shared["seconds_shares"]["exchanging gradients"]
    assert computing * shared["step_seconds"] == pytest.approx(alone["step_seconds"] / 4)
    assert shared["peak_bytes"] >= alone["peak_bytes"]
    main(["plan", *words])
    assert "on each of 4 " in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["plan", *words]) == 2 and "WORLD_SIZE=many" in capsys.readouterr().err


def test_unknown_free_memory_gives_no_verdict(capsys, monkeypatch):
    monkeypatch.setattr(gpus, "free_memory", lambda kind: None)
    code, content = plan(capsys, "config=lora.yaml")
    assert code == 0 and content["fits"] is None and content["changes"] == []
    main(["plan", "config=lora.yaml"])
    assert "may fit" in capsys.readouterr().out


def test_the_heading_of_the_table_names_its_settings(capsys):
    main(["plan", "table=true", "train.gradient_checkpointing=none", "distill=recover"])
    heading = capsys.readouterr().out.splitlines()[0]
    assert "train.gradient_checkpointing=none" in heading and "teacher=resident" in heading


def test_no_torch_is_needed():
    code = (
        "import sys; from finetune.cli import main; main(['plan', 'config=lora.yaml', 'gpu_gb=8', 'auto=true']); "
        "main(['plan', 'table=true']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_plan_of_two_nodes_says_what_ranks_send_and_are_worth(capsys):
    words = ("model=qwen2.5-72b-instruct", "gpus=8", "nodes=2", "gpu_gb=24", "link_gbps=100")
    code, content = plan(capsys, *words)
    assert code == 0 and (content["ranks"], content["nodes"], content["shard_ranks"]) == (16, 2, 16)
    assert set(content["sent_bytes"]) == {"layers", "embedding and head", "gradients"}
    assert 0 < content["efficiency"] < 1 and "given: 100 Gbit/s between nodes" in content["link"]
    _, hybrid = plan(capsys, *words, "parallel.shard=hybrid")
    assert hybrid["shard_ranks"] == 8 and hybrid["efficiency"] > content["efficiency"]
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert "ranks: 16 on 2 nodes; the base is split over 16" in text and "sent per rank and step" in text


def test_a_run_that_does_not_fit_names_the_fewest_gpus_that_share_the_base(capsys):
    words = ("model=qwen2.5-72b-instruct", "gpu=4090")
    code, content = plan(capsys, *words)
    fewest = content["fewest_gpus"]
    assert code == 3 and fewest > 2
    assert plan(capsys, *words, f"gpus={fewest}", "parallel.shard=full")[0] == 0
    assert plan(capsys, *words, f"gpus={fewest - 1}", "parallel.shard=full")[0] == 3
    assert plan(capsys, *words, "parallel.shard=none")[1]["fewest_gpus"] is None


def test_processes_of_a_cpu_share_its_memory(capsys, monkeypatch):
    here = gpus.PlannedDevice("cpu", 8e9, "this machine's memory", None)
    monkeypatch.setattr(gpus, "planned_device", lambda *_: here)
    assert plan(capsys, "config=quickstart.yaml", "gpus=2")[1]["free_bytes"] == 4e9


@pytest.mark.parametrize(
    "words",
    [
        ("config=lora.yaml", "link_gbps=100"),
        ("config=lora.yaml", "gpus=4", "train.world_size=2"),
        ("table=true", "gpus=2", "nodes=2"),
        ("table=true", "gpus=2", "link_gbps=100"),
    ],
    ids=" ".join,
)
def test_options_of_ranks_that_contradict_are_refused(words, capsys):
    assert main(["plan", *words]) == 2
    assert "help: " in capsys.readouterr().err


def test_the_table_of_cards_grows_with_them(capsys, monkeypatch):
    monkeypatch.setattr("finetune.planning.cards.SIZES", ("7B", "72B"))
    one, four = (plan(capsys, "table=true", f"gpus={count}")[1] for count in (1, 4))
    assert list(one) == ["7B", "72B"] and list(one["7B"]) == ["24", "48", "80"]
    assert one["72B"]["24"] is None and four["72B"]["24"]["longest"] > 0
    for card, cell in one["7B"].items():
        assert four["7B"][card]["longest"] >= cell["longest"]
        assert four["7B"][card]["tokens_per_second"] > cell["tokens_per_second"]
    assert main(["plan", "table=true", "gpus=4"]) == 0
    assert "24 GB (4090)" in capsys.readouterr().out
