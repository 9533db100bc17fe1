"""A program in its own process prints nothing, and its failure becomes one error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune.export.onnx.builder import run_module, runtime
from finetune.system.errors import FinetuneError, MissingExtra, ResourceError


def tool(folder: Path, code: str) -> None:
    (folder / "a_tool.py").write_text(code)
    run_module(["a_tool"], folder, "the tool")


def test_its_output_is_hidden(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tool(tmp_path, "import sys; print('noise'); print('more', file=sys.stderr)")
    assert capfd.readouterr() == ("", "")


def test_it_runs_offline_without_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    tool(
        tmp_path, "import os; assert (os.environ['HF_HUB_OFFLINE'], os.environ['ORT_DISABLE_TELEMETRY']) == ('1', '1')"
    )


def test_a_failure_shows_its_last_lines(tmp_path: Path) -> None:
    code = "import sys\nfor i in range(99): print('step', i, end='\\r')\nsys.exit('the reason')"
    with pytest.raises(FinetuneError) as caught:
        tool(tmp_path, code)
    text = str(caught.value)
    assert text.startswith("the tool: failed with exit code 1") and text.endswith("the reason")
    assert "step 98" in text and "step 50" not in text and "\r" not in text


@pytest.mark.parametrize(
    "code",
    [
        "raise MemoryError",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')",
    ],
)
def test_out_of_memory_is_a_resource_error(tmp_path: Path, code: str) -> None:
    with pytest.raises(ResourceError, match="memory"):
        tool(tmp_path, code)


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk"):
        tool(tmp_path, "import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")


@pytest.mark.parametrize("module", ["onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"])
def test_a_missing_library_is_reported_with_the_install_command(module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[onnx\]"):
        runtime()
