"""Notebooks: those that are committed run from top to bottom, and a run in one can be seen, stopped and continued."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.runs import differing

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
STEPS = 8


def client_of(notebook: NotebookNode, folder: Path, **options) -> NotebookClient:
    """Cells run by this interpreter, in `folder`, with `finetune` on the path as in an activated environment."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": folder}}, **options
    )


def text_of(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_outputs_and_reads_as_a_lesson(file: Path):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    explained = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert explained >= len(code), "every piece of code comes after what it is for"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(file: Path, tmp_path: Path):
    notebook = nbformat.read(file, as_version=4)
    client_of(notebook, tmp_path).execute()  # raises with the cell and its error
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    # A command after `!` that fails does not stop a notebook.
    assert not [cell.source for cell in code if "error:" in text_of(cell)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[NotebookNode], Path]:
    """A run stopped with the button after its third step, continued in the next cell, and one that was left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    start = (
        "train(load_config('quickstart.yaml', ['generation.num_examples=0', 'train.compile=false', "
        "'data.train.0.limit=96', "
        f"'data.eval.0.limit=24', 'data.max_length=128', 'train.batch_size=4', 'train.max_steps={STEPS}', "
        "'output_dir={folder}'{more}]))"
    )
    # Each step waits for a moment, so that the button is pressed in time on any machine.
    slow = (
        "import time\nfrom finetune.training import loop\n"
        "step = loop.train_step\ndef waiting(*given): time.sleep(0.3); return step(*given)\nloop.train_step = waiting"
    )
    sources = [
        f"from finetune import load_config, train\n{slow}",
        start.replace("{folder}", "stopped").replace("{more}", ""),
        start.replace("{folder}", "stopped").replace("{more}", ", 'train.resume=auto'"),
        start.replace("{folder}", "alone").replace("{more}", ""),
        "train(load_config('quickstart.yaml', ['lora.rank=0', 'lora.alpha=x']))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = client_of(notebook, folder, allow_errors=True)
    pressing = press_when(client, lambda: lines_in(folder / "stopped" / "metrics.jsonl") >= 3)
    client.execute()
    pressing.join()
    return notebook.cells, folder


def lines_in(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def press_when(client: NotebookClient, due: Callable[[], bool]) -> threading.Thread:
    """The stop button, pressed once when it is due."""

    def press() -> None:
        while not due():
            time.sleep(0.02)
        asyncio.run(client.km.interrupt_kernel())

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_the_stop_button_saves_a_checkpoint_and_says_how_to_go_on(stopped):
    (_, interrupted, *_), folder = stopped
    (error,) = [output for output in interrupted.outputs if output.output_type == "error"]
    assert error.ename == "Interrupted"
    step = int(re.search(r"stopped by a signal after step (\d+)", error.traceback[0])[1])
    assert 3 <= step < STEPS
    assert json.loads((folder / "stopped" / "result.json").read_text())["steps"] == STEPS, "the next cell went on"


def test_a_run_continued_in_the_next_cell_ends_as_one_that_was_left_alone(stopped):
    (_, _, continued, alone, _), folder = stopped
    assert "continuing from stopped/checkpoint-" in text_of(continued)
    assert "continuing" not in text_of(alone)
    assert differing(folder / "stopped", folder / "alone") == []


def test_a_run_shows_its_progress_and_its_loss_as_a_curve_over_all_steps(stopped):
    (_, _, continued, *_), _ = stopped
    (picture,) = [output.data["text/html"] for output in continued.outputs if output.output_type == "display_data"]
    assert f'<progress value="{STEPS}" max="{STEPS}"' in picture
    assert f"step {STEPS} of {STEPS}" in picture and "tokens/s" in picture
    curve = re.search(r'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*stroke: var\(--line-1', picture)[1]
    assert len(re.findall("[ML]", curve)) == STEPS, "also the steps before the stop"
    assert "held-out loss" in picture and "training loss" in picture


def test_messages_are_not_shown_as_errors(stopped):
    cells, _ = stopped
    red = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert red == []


def test_a_mistake_in_a_config_is_its_message_without_a_traceback(stopped):
    (*_, wrong), _ = stopped
    (error,) = [output for output in wrong.outputs if output.output_type == "error"]
    (message,) = error.traceback
    assert "lora.rank" in message and "lora.alpha" in message


def test_the_curve_of_a_long_run_keeps_its_ends():
    from finetune.training.track import _thinned

    steps, values = _thinned({step: step * 0.5 for step in range(1, 100_001)})
    assert len(steps) <= 501
    assert (steps[-1], values[-1]) == (100_000, 50_000)


def test_outside_of_a_kernel_nothing_is_a_notebook():
    import IPython  # noqa: F401 - imported is not enough

    from finetune.system.console import in_notebook

    assert not in_notebook()
