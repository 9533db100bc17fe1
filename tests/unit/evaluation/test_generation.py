"""Every row is asked what its own turns ask, and its answer stands at its own place."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import AutoTokenizer

from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation import generation
from finetune.evaluation.generation import answer_rows, decode, exact_match
from finetune.system.resources import packaged
from tests.models import prompts_of, random_qwen2

TOOLS_TEMPLATE = """{%- for tool in tools or [] %}
    {{- '<|im_start|>system\\n' + tool | tojson + '<|im_end|>' }}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n[' + call.function.name + call.function.arguments | tojson + ']' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Echo:
    """Answers a prompt with the prompt itself."""

    batches: ClassVar[list[list[int]]] = []

    def __call__(self, model, prompts, limits, **_):
        assert not model.training and limits == [4] * len(prompts)
        self.batches.append([len(prompt) for prompt in prompts])
        return [prompt.ids.tolist() for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")


@pytest.fixture
def ask(tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "decode", Echo())
    monkeypatch.setattr(Echo, "batches", [])

    def ask(rows: list[Conversation], batch_size: int = 2):
        model = random_qwen2().train()
        chat = ChatTemplate(tokenizer, TOOLS_TEMPLATE)
        answers = answer_rows(model, tokenizer, chat, rows, max_new_tokens=4, batch_size=batch_size)
        assert model.training
        return answers

    return ask


def test_each_row_is_asked_up_to_its_last_answer_in_batches_of_like_length(ask):
    rows = [
        Conversation(
            (Message("user", text), Message("assistant", "a"), Message("user", f"{text}?"), Message("assistant", "b"))
        )
        for text in ("x" * 40, "y", "z" * 41, "w w")
    ]
    rows[1] = Conversation((*rows[1].messages, Message("user", "never asked")))
    answers = ask(rows)
    for row, answer in zip(rows, answers, strict=True):
        asked = "".join(f"{m.role}\n{m.content}\n" for m in row.messages[:3]) + "assistant\n"
        assert answer.given == asked
        assert (answer.prompt, answer.expected) == (row.messages[2].content, "b")
    assert [len(batch) for batch in Echo.batches] == [2, 2] and max(Echo.batches[0]) < min(Echo.batches[1])


def test_the_answer_of_a_turn_with_tool_calls_is_what_the_template_writes_for_it(ask):
    call = Message("assistant", "look", (ToolCall("f", {"q": "<|im_end|>"}), ToolCall("g", {})))
    [answer] = ask([Conversation((Message("user", "u"), call), ({"name": "f"},))])
    assert answer.expected == 'look\n[f{"q": "<|im_end|>"}]\n[g{}]'
    assert answer.given.startswith('system\n{"name": "f"}user\nu')


def test_the_share_of_exact_answers_ignores_outer_blanks(ask):
    prompt = "user\nu\nassistant"
    rows = [Conversation((Message("user", "u"), Message("assistant", text))) for text in (f" {prompt}\n", "else")]
    answers = ask(rows)
    assert exact_match(answers) == 0.5


PROMPTS = [[7, 8, 9], [11] * 9, [3, 60, 2, 41, 5], [90, 1]]


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers_own_generate_row_by_row():
    model = random_qwen2().eval()
    ends = [13, 60]
    written = decode(model, prompts_of(PROMPTS), [12] * 4, stop_ids=frozenset(ends), vocabulary=97)
    for prompt, answer in zip(PROMPTS, written, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=ends,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_row_that_has_ended_is_computed_no_further():
    model, rows = random_qwen2().eval(), []
    model.model.register_forward_pre_hook(lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    answers = decode(model, prompts_of(PROMPTS), [1, 5, 3, 5], stop_ids=frozenset(), vocabulary=97)
    assert [len(answer) for answer in answers] == [1, 5, 3, 5]
    assert rows == [4, 3, 3, 2, 2]
