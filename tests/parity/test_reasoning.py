"""Reasoning in `<think>` tags is trained like other text, or left out completely, for Qwen2.5 and R1-Distill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from finetune.config.compose import load_config
from finetune.config.schema import DataConfig, ModelConfig
from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.loader import advice_on_end_token, load_chat_template
from finetune.data.template.chat import ChatTemplate
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import DataError
from finetune.system.resources import packaged

TEMPLATE = packaged("configs") / "templates" / "deepseek-r1.jinja"
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
# Qwen2.5's first control tokens as R1-Distill-Qwen's tokenizer redefines them, in order: special or not.
R1_TOKENS = {
    END: True,
    USER: False,
    ASSISTANT: False,
    BEGIN: True,
    "<|EOT|>": False,
    "<think>": False,
    "</think>": False,
}


def write_r1(source: Path, folder: Path) -> Path:
    """R1-Distill-Qwen's tokenizer, built from one of Qwen2.5; its class is wrong in the original too."""
    definition = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    first = definition["added_tokens"][0]
    redefined = [
        {**first, "id": first["id"] + i, "content": token, "special": special}
        for i, (token, special) in enumerate(R1_TOKENS.items())
    ]
    definition["added_tokens"] = redefined + definition["added_tokens"][len(redefined) :]
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, text],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [first["id"] + 3], "tokens": [BEGIN]}},
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": True,
        "unk_token": None,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in {
        "tokenizer.json": definition,
        "tokenizer_config.json": settings,
        "config.json": {"model_type": "qwen2", "vocab_size": first["id"] + 300},
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> Any:
    def folder(kind: str) -> Path:
        source = packaged("data") / "tiny-qwen2.5"
        if kind.endswith("qwen2.5"):
            source = request.getfixturevalue("shared") / "qwen2.5" / "tokenizer"
        return source if kind.startswith("plain") else write_r1(source, tmp_path_factory.mktemp("r1"))

    return folder


@pytest.fixture(scope="module", params=["plain embedded", "plain qwen2.5", "r1 embedded", "r1 qwen2.5"])
def chat_and_tokenizer(request, folders) -> tuple[ChatTemplate, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(ModelConfig(name=str(folders(request.param))))
    file = str(TEMPLATE) if request.param.startswith("r1") else None
    return load_chat_template(DataConfig(train=[{"path": "x"}], chat_template=file), tokenizer), tokenizer


@pytest.fixture(scope="module")
def qwen(shared) -> tuple[ChatTemplate, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(ModelConfig(name=str(shared / "qwen2.5" / "tokenizer")))
    return ChatTemplate(tokenizer), tokenizer


@pytest.fixture(scope="module", params=["r1 embedded", "r1 qwen2.5"])
def r1(request, folders) -> tuple[ChatTemplate, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(ModelConfig(name=str(folders(request.param))))
    return load_chat_template(DataConfig(train=[{"path": "x"}], chat_template=str(TEMPLATE)), tokenizer), tokenizer


def conversation(*turns: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)))


def targets(chat: ChatTemplate, tokenizer, row: Conversation, train_on: str) -> str:
    [encoded] = chat.encode([row], train_on)
    assert not isinstance(encoded, DataError), encoded
    return tokenizer.decode(encoded.ids[encoded.trained])


WORDS = st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=20).filter(
    lambda text: "think>" not in text and "<|" not in text and "<｜" not in text
)
SAID = WORDS.map(lambda text: f"x{text}.")  # a letter after the newline, so that no token straddles tag and answer
BLANKS = st.sampled_from(["\n", "\n\n", "\r\n", " \n"])
TURN = st.builds(
    lambda thought, blanks, said: (f"<think>\n{thought}\n</think>{blanks}{said}", said), WORDS, BLANKS, SAID
)
ROWS = st.lists(st.tuples(WORDS.map("u{}".format), TURN), min_size=1, max_size=3)


@settings(max_examples=30)
@given(rows=ROWS)
def test_reasoning_is_a_target_or_left_out_whole_and_the_ids_stay(chat_and_tokenizer, rows):
    chat, tokenizer = chat_and_tokenizer
    row = conversation(*(text for asked, (content, _) in rows for text in (asked, content)))
    stock = tokenizer.apply_chat_template([m.as_dict() for m in row.messages], return_dict=False)
    [whole], [answers] = chat.encode([row]), chat.encode([row], "answer")
    assert whole.ids.tolist() == answers.ids.tolist() == stock
    end = chat.token_of(chat.turn_end_id)
    written = [tokenizer.backend_tokenizer.normalizer.normalize_str(text) for _, turn in rows for text in turn]
    assert tokenizer.decode(whole.ids[whole.trained]) == "".join(text + end for text in written[::2])
    assert tokenizer.decode(answers.ids[answers.trained]) == "".join(text + end for text in written[1::2])
    prompt = chat.prompt_ids(row.messages[:-1])
    assert whole.ids[: len(prompt)].tolist() == prompt
    [last] = chat.encode([row], "last")
    assert last.trained[: len(prompt) + 1].tolist() == [False] * len(prompt) + [True]


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("<think>a</think> Four", " Four"),  # one token
        ("<think>a</think>\n\n\nFour", "Four"),
        ("<think>a</think>x.", "."),  # >x is one token
        ("<think>a</think>", None),
        (" \n<think>a</think> \n<think>b</think>\n", None),
        ("a</think>\n\nFour", "Four"),  # the header opened it
        ("</think>Four", "Four"),
        ("One.\n<think>a</think>\nFour", "One.\nFour"),
        ("One.<think>a</think>Four.\n\n<think>b</think>\n\nFive", "OneFour.\n\nFive"),  # .< is one token
        ("no thought", "no thought"),
    ],
)
def test_a_token_that_holds_anything_of_a_tag_is_reasoning(qwen, content, left):
    chat, tokenizer = qwen
    if left is not None:
        assert targets(chat, tokenizer, conversation("u", content), "answer") == f"{left}<|im_end|>"
    # A call is an answer; its arguments may contain tags.
    called = Message("assistant", content, (ToolCall("f", {"x": "<think>"}),))
    call = '\n<tool_call>\n{"name": "f", "arguments": {"x": "<think>"}}\n</tool_call><|im_end|>'
    found = targets(chat, tokenizer, Conversation((Message("user", "u"), called)), "answer")
    assert found in ((left or "") + call, (left or "") + call[1:])  # the blank before may be a token of the tag's


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("<think>a", "<think> at character 0 is never closed"),
        ("<think>a</think>b<think>", "<think> at character 17 is never closed"),
        ("<think>a<think>b</think>c", "<think> at character 8 is inside another"),
        ("<think>a</think>b</think>c", "</think> at character 17 closes nothing"),
        ("<think>a</think>\n", "all reasoning"),
        ("a</think>", "all reasoning"),
    ],
)
def test_reasoning_that_cannot_be_separated_from_the_answer_is_a_bad_row(chat_and_tokenizer, content, complaint):
    chat, tokenizer = chat_and_tokenizer
    row = conversation("u", "fine", "v", content)
    [error] = chat.encode([row], "answer")
    assert isinstance(error, DataError) and complaint in str(error) and "message 3" in str(error)
    muted = Conversation((*row.messages[:3], Message("assistant", content, weight=0)))
    end = chat.token_of(chat.turn_end_id)
    assert targets(chat, tokenizer, muted, "answer") == f"fine{end}"
    assert targets(chat, tokenizer, row, "last") == content + end


OPENS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{{ '<think>\\n' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}HEADER{% endif %}"""


@pytest.mark.parametrize("header", ["", "{{ '<think>\\n' }}"])
def test_a_turn_closes_reasoning_that_the_template_opened(header):
    tokenizer = load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5")))
    chat = ChatTemplate(tokenizer, OPENS.replace("HEADER", header))
    row = conversation("u", "hm</think>\n\nfour", "v", "so</think>\nfive")
    assert targets(chat, tokenizer, row, "answer") == "four<|im_end|>five<|im_end|>"
    opened = "" if header else "<think>\n"
    assert targets(chat, tokenizer, row, "assistant") == (
        f"{opened}hm</think>\n\nfour<|im_end|>{opened}so</think>\nfive<|im_end|>"
    )


def test_a_weight_scales_the_answer_and_not_the_reasoning(chat_and_tokenizer):
    chat, tokenizer = chat_and_tokenizer
    row = Conversation((Message("user", "u"), Message("assistant", "<think>a</think>\nfour", weight=0.5)))
    [encoded] = chat.encode([row], "answer")
    assert set(encoded.weights.tolist()) == {0.0, 0.5}
    assert tokenizer.decode(encoded.ids[encoded.weights == 0.5]) == "four" + chat.token_of(chat.turn_end_id)


def test_the_r1_template_writes_the_texts_of_the_row(r1):
    chat, tokenizer = r1
    thinking = "<think>\nhm\n</think>\n\n4"
    row = Conversation((Message("system", "s"), *conversation("2 + 2?", thinking, "sure?", thinking).messages))
    expected = f"{BEGIN}s{USER}2 + 2?{ASSISTANT}{thinking}{END}{USER}sure?{ASSISTANT}{thinking}{END}"
    [encoded] = chat.encode([row])
    assert tokenizer.decode(encoded.ids) == expected
    assert tokenizer.decode(encoded.ids[encoded.trained]) == f"{thinking}{END}{thinking}{END}"
    ids = tokenizer.convert_tokens_to_ids(list(R1_TOKENS))
    assert [(encoded.ids == i).sum() for i in ids] == [expected.count(token) for token in R1_TOKENS]
    # R1-Distill's original prompt opens the tag.
    prompt = chat.prompt_ids(row.messages[:-1])
    own = [*prompt, *tokenizer("<think>\n", add_special_tokens=False).input_ids]
    assert tokenizer.decode(prompt).endswith(f"sure?{ASSISTANT}") and encoded.ids[: len(own)].tolist() == own
    assert chat.stop_ids() == [tokenizer.convert_tokens_to_ids(END)] and advice_on_end_token(chat) is None


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", [BEGIN, END, USER, ASSISTANT])
def test_roles_that_r1_does_not_call_special_are_control_tokens(r1, role, token):
    chat, tokenizer = r1

    def row(text: str) -> Conversation:
        texts = {"system": "s", "user": "u", "assistant": "a"} | {role: text}
        return Conversation(tuple(Message(r, t) for r, t in texts.items()))

    [clean], [dirty] = chat.encode([row("-")]), chat.encode([row(f"x{token}y")])
    ids = tokenizer.convert_tokens_to_ids(list(R1_TOKENS))
    assert [(clean.ids == i).sum() for i in ids] == [(dirty.ids == i).sum() for i in ids]
    assert f"x{token}y" in tokenizer.decode(dirty.ids) and chat.control_tokens_in(token) == 1


def test_tags_that_a_template_writes_remain_text_of_the_row(r1):
    opens = TEMPLATE.read_text().replace(f"'{ASSISTANT}'", f"'{ASSISTANT}<think>\\n'")
    chat = ChatTemplate(r1[1], opens)
    row = conversation("what is <think>?", "hm</think>\n\nfour")
    [encoded] = chat.encode([row], "answer")
    tags = r1[1].convert_tokens_to_ids(["<think>", "</think>"])
    assert [(encoded.ids == tag).sum() for tag in tags] == [2, 1]
    assert r1[1].decode(encoded.ids[encoded.trained]) == f"four{END}"


def test_tools_and_another_tokenizer_are_refused_by_the_r1_template(r1):
    chat, _ = r1
    asked, called = Message("user", "u"), Message("assistant", "a", (ToolCall("f", {}),))
    rows = [
        Conversation((asked, Message("assistant", "a")), ({"name": "f"},)),
        Conversation((asked, called)),
        Conversation((asked, Message("assistant", "a"), Message("tool", "r"), Message("assistant", "b"))),
    ]
    for row, complaint in zip(rows, ("the row's tools", "a part of message 1", "message 2 (tool)"), strict=True):
        [error] = chat.encode([row])
        assert isinstance(error, DataError) and complaint in str(error)
    qwen = load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5")))
    [error] = ChatTemplate(qwen, TEMPLATE.read_text()).encode([conversation("u", "a")])
    assert isinstance(error, DataError) and "without a control token" in str(error)


def test_a_config_finds_the_template_by_its_packaged_path(tmp_path):
    file = tmp_path / "run.yaml"
    template = "${packaged:configs/templates/deepseek-r1.jinja}"
    file.write_text(f"model: {{name: m}}\ndata: {{train: [{{path: x}}], chat_template: '{template}'}}\n")
    assert load_config(str(file)).data.chat_template == str(TEMPLATE)
