"""Types that llama.cpp's quantizer writes. A stand-in for it shows the exporter's part; the real one is optional."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.command_options import ExportOptions
from finetune.export.export import export_model
from finetune.export.exporter import check_export
from finetune.export.gguf.quantizer import read_imatrix
from finetune.system.errors import DataError, FinetuneError, IntegrityError, MissingExtra

gguf = pytest.importorskip("gguf", reason="needs the export extra")

from tests.unit.export.gguf import fake_quantizer  # noqa: E402  (imports gguf)
from tests.unit.export.gguf.models import save_model  # noqa: E402


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
    assert (source, target) == ("run-f32.gguf", "run-q4_k_m.gguf")
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
    assert plain[0] != "--imatrix" and weighted[:2] == ["--imatrix", "imatrix.gguf"]
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
    with pytest.raises(DataError, match=r"^imatrix\[0\]: .*gone\.jsonl"):
        check_export(options(tiny_base, tmp_path / "run", imatrix=str(tmp_path / "gone.jsonl")))


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use the quantizer of llama-cpp-python; return the package."""
    package = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    monkeypatch.setattr(shutil, "which", lambda command: None)
    return package


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_llama_cpp_answers_as_the_model(kind, tiny_base, real, tmp_path):
    export_model(options(tiny_base, tmp_path / "run", type=kind), log=lambda text: None)
    report = report_of(tmp_path / "run")
    assert [check["reader"] for check in report["checks"]] == ["transformers", "llama.cpp"]
    assert all(check["kl"] < 0.1 for check in report["checks"]) and kind.removesuffix("_m") in report["tensors"]


def test_the_gguf_package_reads_the_values_that_llama_cpp_reads(tiny_base, real, tmp_path):
    export_model(options(tiny_base, tmp_path / "run", verify=False), log=lambda text: None)
    library = ctypes.CDLL(str(next(Path(real.__file__).parent.rglob("libggml-base.so"))))
    seen = set()
    for tensor in gguf.GGUFReader(tmp_path / "run" / "run-q4_k_m.gguf").tensors:
        if (name := tensor.tensor_type.name) not in ("Q4_K", "Q6_K"):
            continue
        data, values = np.ascontiguousarray(tensor.data), np.empty(tensor.n_elements, np.float32)
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        read = getattr(library, f"dequantize_row_{name.replace('Q', 'q', 1)}")
        read(data.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.c_int64(values.size))
        assert np.array_equal(gguf.quants.dequantize(data, tensor.tensor_type).ravel(), values), tensor.name
        seen.add(name)
    assert seen == {"Q4_K", "Q6_K"}


def test_importance_lowers_the_weighted_error(tiny_base, real, tmp_path):
    imatrix = rows(tmp_path / "rows.jsonl", 0, 6)
    for name, changes in {"plain": {}, "weighted": {"imatrix": imatrix}, "full": {"type": "f32"}}.items():
        export_model(options(tiny_base, tmp_path / name, **{"type": "q3_k_m", "verify": False, **changes}), log=print)
    plain, weighted, full = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(next((tmp_path / name).glob(f"{name}-*.gguf"))).tensors}
        for name in ("plain", "weighted", "full")
    )
    for name, importance in read_imatrix(tmp_path / "weighted" / "imatrix.gguf").items():
        errors = []
        for tensor in (plain[name], weighted[name]):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            errors.append(float(((values - full[name].data) ** 2 * importance).sum()))
        assert errors[1] < errors[0], name


def test_rows_that_blocks_of_256_do_not_fill_are_reported(tiny_base, real, tmp_path):
    source, logged = save_model(tmp_path / "source", tiny_base), []
    export_model(options(source, tmp_path / "run", verify=False), log=logged.append)
    wider = report_of(tmp_path / "run")["wider"]
    assert len(wider) == 15 and any("15 of 15 matrices" in line and "64, 96" in line for line in logged), logged
    export_model(options(source, tmp_path / "iq4", type="iq4_nl", verify=False), log=lambda text: None)
    assert report_of(tmp_path / "iq4")["wider"] == ["token_embd.weight"]
