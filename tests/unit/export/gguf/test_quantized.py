"""Types that llama.cpp's quantizer writes. A stand-in for it shows the exporter's part; the real one is optional."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.config.command_options import ExportOptions
from finetune.export.export import export_model
from finetune.export.exporter import check_export
from finetune.export.gguf.quantizer import read_imatrix
from finetune.system.errors import ConfigError, FinetuneError, IntegrityError, MissingExtra

gguf = pytest.importorskip("gguf", reason="needs the export extra")

from tests.unit.export.gguf import fake_quantizer  # noqa: E402  (imports gguf)


@pytest.fixture
def tiny_base(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in on PATH; return the file of its arguments, one call a line."""
    script = tmp_path / "bin" / "llama-quantize"
    script.parent.mkdir()
    script.write_text(fake_quantizer.SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def options(tiny_base: Path, out: Path, **changes: Any) -> ExportOptions:
    chosen = {"format": "gguf", "model": str(tiny_base), "out": str(out), "type": "q4_k_m", "prompts": 1, "tokens": 8}
    return ExportOptions(**{**chosen, **changes})


def rows(file: Path, start: int, count: int) -> str:
    texts = [{"prompt": f"What is {i} plus {i}?", "completion": f"{i + i}."} for i in range(start, start + count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(file)


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "export_report.json").read_text())


def test_the_quantizer_gets_the_model_in_f32_and_its_file_alone_is_kept(tiny_base, calls, tmp_path):
    out = tmp_path / "run"
    export_model(options(tiny_base, out, type="Q4_K"), log=lambda text: None)
    ((source, target, kind, threads),) = map(json.loads, calls.read_text().splitlines())
    assert kind == "Q4_K_M" and int(threads) >= 1
    assert Path(source).name == "run-f32.gguf" and Path(target).name == "run-q4_k_m.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["export_report.json", "run-q4_k_m.gguf"]
    report = report_of(out)
    assert report["type"] == "q4_k_m" and report["tensors"] == {"q5_0": 29} and report["checks"][0]["kl"] < 0.1
    field = gguf.GGUFReader(out / "run-q4_k_m.gguf").get_field("general.file_type")
    assert field.contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_ollama_takes_the_same_types(tiny_base, calls, tmp_path):
    export_model(
        options(tiny_base, tmp_path / "run", format="ollama", type="q5_k_m", verify=False), log=lambda text: None
    )
    assert (tmp_path / "run" / "Modelfile").read_text().startswith("FROM ./run-q5_k_m.gguf\n")


def test_a_failed_quantizer_leaves_nothing(tiny_base, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "fail")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FinetuneError, match=r"(?s)exit code 3.*not enough memory") as caught:
        export_model(options(tiny_base, tmp_path / "run"), log=lambda text: None)
    assert caught.value.exit_code == 1
    assert {path.name for path in tmp_path.iterdir()} == before | {"calls"}


def test_other_values_than_the_models_are_found(tiny_base, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "swap")
    with pytest.raises(IntegrityError, match=r"blk\.0\.ffn_gate\.weight.*blk\.0\.ffn_up\.weight"):
        export_model(options(tiny_base, tmp_path / "run"), log=lambda text: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"format": "ollama"}])
def test_a_missing_quantizer_is_reported_first(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for run in (check_export, export_model):
        with pytest.raises(MissingExtra, match=r"(?s)q4_k_m.*llama-quantize.*pip install llama-cpp-python"):
            run(options(tmp_path / "nothing there", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_importance_matrix_and_its_effect_are_reported(tiny_base, calls, tmp_path):
    imatrix, held_out = rows(tmp_path / "rows.jsonl", 0, 6), rows(tmp_path / "heldout.jsonl", 3, 7)
    out, logged = tmp_path / "run", []
    chosen = options(tiny_base, out, imatrix=imatrix, kl_check={"data": held_out, "num_examples": 3})
    export_model(chosen, log=logged.append)
    plain, weighted = map(json.loads, calls.read_text().splitlines())
    assert plain[0] != "--imatrix" and weighted[0] == "--imatrix" and Path(weighted[1]).name == "imatrix.gguf"
    one, two = report_of(out)["imatrix_kl"]
    assert (one["imatrix"], two["imatrix"], one["source"], one["rows"]) == (False, True, "heldout", 3)
    assert one["kl"] == two["kl"] > 0  # The stand-in does not use the matrix.
    assert sum(line.startswith("kl_check:") for line in logged) == 2
    assert sorted(path.name for path in out.iterdir()) == ["export_report.json", "imatrix.gguf", "run-q4_k_m.gguf"]
    assert len(read_imatrix(out / "imatrix.gguf")) == 28


def test_rows_of_the_importance_matrix_are_not_held_out(tiny_base, calls, tmp_path):
    imatrix, logged = rows(tmp_path / "rows.jsonl", 0, 3), []
    export_model(options(tiny_base, tmp_path / "run", imatrix=imatrix, kl_check={"data": imatrix}), log=logged.append)
    assert report_of(tmp_path / "run")["imatrix_kl"] == []
    assert any(line.startswith("kl_check: skipped") for line in logged)


def test_unreadable_rows_are_reported_first(tiny_base, calls, tmp_path):
    with pytest.raises(ConfigError, match=r"^imatrix\[0\]: .*gone\.jsonl"):
        check_export(options(tiny_base, tmp_path / "run", imatrix=str(tmp_path / "gone.jsonl")))
