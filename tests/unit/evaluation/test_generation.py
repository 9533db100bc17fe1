"""Every row is asked what its own turns ask, and its answer stands at its own place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.generation import answer_rows, exact_match
from finetune.resources import packaged

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


class Echo(nn.Module):
    """Answers a prompt with the prompt itself."""

    def __init__(self, end: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.end, self.batches = end, []

    def generate(self, input_ids, attention_mask, generation_config):
        assert not self.training and self.end in generation_config.eos_token_id
        self.batches.append(input_ids.shape)
        lengths = attention_mask.sum(1)
        prompts = [row[-n:].tolist() for row, n in zip(input_ids, lengths, strict=True)]
        echo = [prompt + [self.end] * (input_ids.shape[1] + 1 - len(prompt)) for prompt in prompts]
        return torch.cat([input_ids, torch.tensor(echo)], dim=1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")


def ask(tokenizer, rows: list[Conversation], batch_size: int = 2):
    chat = ChatTemplate(tokenizer, TOOLS_TEMPLATE)
    model = Echo(tokenizer.eos_token_id).train()
    answers = answer_rows(model, tokenizer, chat, rows, max_new_tokens=4, batch_size=batch_size)
    assert model.training
    return answers, model


def test_each_row_is_asked_up_to_its_last_answer_in_batches_of_like_length(tokenizer):
    rows = [
        Conversation(
            (Message("user", text), Message("assistant", "a"), Message("user", f"{text}?"), Message("assistant", "b"))
        )
        for text in ("x" * 40, "y", "z" * 41, "w w")
    ]
    rows[1] = Conversation((*rows[1].messages, Message("user", "never asked")))
    answers, model = ask(tokenizer, rows)
    for row, answer in zip(rows, answers, strict=True):
        asked = "".join(f"{m.role}\n{m.content}\n" for m in row.messages[:3]) + "assistant\n"
        assert answer.given == asked
        assert (answer.prompt, answer.expected) == (row.messages[2].content, "b")
    assert len(model.batches) == 2 and model.batches[0][1] < model.batches[1][1]


def test_the_answer_of_a_turn_with_tool_calls_is_what_the_template_writes_for_it(tokenizer):
    call = Message("assistant", "look", (ToolCall("f", {"q": "<|im_end|>"}), ToolCall("g", {})))
    [answer], _ = ask(tokenizer, [Conversation((Message("user", "u"), call), ({"name": "f"},))])
    assert answer.expected == 'look\n[f{"q": "<|im_end|>"}]\n[g{}]'
    assert answer.given.startswith('system\n{"name": "f"}user\nu')


def test_the_share_of_exact_answers_ignores_outer_blanks(tokenizer):
    prompt = "user\nu\nassistant"
    rows = [Conversation((Message("user", "u"), Message("assistant", text))) for text in (f" {prompt}\n", "else")]
    answers, _ = ask(tokenizer, rows)
    assert exact_match(answers) == 0.5
