from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.export.gguf.ollama import go_template
from finetune.export.gguf.ollama import write as to_ollama
from finetune.system.errors import ConfigError
from tests.unit.export.gguf.go_template import render
from tests.unit.export.gguf.models import TOKENIZER_FILES, request, save_model

pytest.importorskip("gguf", reason="needs the export extra")

CONVERSATIONS = {
    "one": [("user", "Hi")],
    "system": [("system", "Be brief."), ("user", "Hi")],
    "empty system": [("system", ""), ("user", "Hi")],
    "long": [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", ""), ("user", "D")],
    "late system": [("user", "A"), ("system", "S"), ("user", "B")],
    "spaces and signs": [("system", " {{ .Content }} \n"), ("user", "\n\n  <b>&'\"\\ {%x%} \t"), ("assistant", "\n")],
    "to go on with": [("system", "S"), ("user", "Count."), ("assistant", "1, 2,")],
}
GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    source, _ := os.ReadFile(os.Args[1])
    var messages []*Message
    if err := json.Unmarshal([]byte(os.Args[2]), &messages); err != nil { panic(err) }
    parsed := template.Must(template.New("").Parse(string(source)))
    if err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
}
"""


@pytest.fixture
def tiny(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


def turns(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


def wanted(tokenizer: AutoTokenizer, name: str) -> str:
    """Render by the model's own template; Ollama lets the model continue a last turn of the assistant."""
    conversation, open_turn = turns(name), CONVERSATIONS[name][-1][0] == "assistant"
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=not open_turn)
    return text.removesuffix("<|im_end|>\n") if open_turn else text


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("model", ["tiny", "real"])
def test_the_go_template_renders_as_the_models_own_template(model: str, name: str, tiny: Path, request):
    folder = tiny if model == "tiny" else request.getfixturevalue("shared") / "qwen2.5" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns(name)]
    assert render(go_template(tokenizer), Messages=messages) == wanted(tokenizer, name)


def test_go_renders_the_same(tiny: Path, tmp_path: Path):
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go for its text/template; the test above uses a small reimplementation")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = tokenizer.chat_template.replace("You are a helpful assistant.", "Braces {{ }} and }}.")
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "template").write_text(go_template(tokenizer))
    subprocess.run([go, "build", "-o", "render", "main.go"], cwd=tmp_path, check=True)
    for name in CONVERSATIONS:
        command = [str(tmp_path / "render"), "template", json.dumps(turns(name))]
        found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout.decode()
        assert found == wanted(tokenizer, name)


def test_a_template_without_a_default_system_prompt(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = go_template(tokenizer)
    messages = [{"Role": "user", "Content": "Hi"}]
    assert render(template, Messages=messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("message.content", "message.content | trim"),  # spaces
        ("message.content", "message.content.split('</think>')[-1]"),  # reasoning
        ("<|im_start|>assistant", "<|im_start|>assistant\\n<think>"),  # the prompt
        ("(message.role == 'system' and not loop.first)", "false"),  # later system turns
        ("'<|im_start|>' + message.role", "'<|start|>' + message.role"),  # no ChatML
        ("{%- if add", "{%- if messages|length > 3 %}{{- raise_exception('no') }}{%- endif %}{%- if add"),  # refusals
    ],
)
def test_a_template_that_is_not_chatml_is_refused(old: str, new: str, tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ConfigError, match=r"(?s)format=ollama: .*use format=gguf"):
        go_template(tokenizer)


def test_a_model_without_a_template_is_refused(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        go_template(tokenizer)


def test_the_modelfile(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    (source / "generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": [882, 880]}))
    exported = to_ollama(request(source, tmp_path / "My Model", format="ollama", verify=False))
    text = (tmp_path / "My Model" / "Modelfile").read_text()
    template = go_template(AutoTokenizer.from_pretrained(tiny))
    assert text.startswith(f'FROM ./My-Model-q8_0.gguf\nTEMPLATE """{template}"""\n')
    assert (tmp_path / "My Model" / "My-Model-q8_0.gguf").is_file()
    assert re.findall("^PARAMETER (.*)$", text, re.MULTILINE) == [
        'stop "<|im_end|>"',
        'stop "<|endoftext|>"',
        "temperature 0.7",
        "top_k 20",
        "top_p 0.8",
        "repeat_penalty 1.05",
    ]
    assert exported.serve[0] == f"ollama create my-model -f '{tmp_path}/My Model/Modelfile'"


def test_greedy_models_stay_greedy(tiny: Path, tmp_path: Path):
    exported = to_ollama(request(tiny, tmp_path / "out", format="ollama", type="f32"))
    assert exported.checks[0].same == 1
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "PARAMETER temperature 0\n" in text and "PARAMETER repeat_penalty 1.0\n" in text and "top_" not in text


def test_a_refused_template_writes_nothing(tiny: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    assert all((source / name).is_file() for name in TOKENIZER_FILES)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ConfigError, match="ChatML"):
        to_ollama(request(source, tmp_path / "out", format="ollama"))
    assert not list((tmp_path / "out").iterdir())
