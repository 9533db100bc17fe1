"""Placeholders: ids equal the template's own, expanded as the official processors do; media tokens are no targets."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.encoded import Encoded
from finetune.data.formats.messages import Conversation, MediaPart, Message
from finetune.data.media.media import Media
from finetune.data.template.chat import ChatTemplate
from finetune.models.families import FAMILIES
from finetune.system.errors import DataError
from tests.media_rows import OMNI_TEMPLATE, TEMPLATES, VL_TEMPLATE, media_tokenizer

# Without control tokens, which transformers reads in texts and we keep as text.
TEXTS = st.text("aB1 \n<|>é", max_size=6) | st.just("<image>")


class Sizes:
    """A processor whose references are numbers of tokens."""

    def __init__(self, family: str):
        record = FAMILIES[family]
        self.placeholders, self.positions = record.placeholders, record.positions
        self.kinds = tuple(record.placeholders)

    def measure(self, kind: str, reference: str) -> Media:
        if not reference.isdigit():
            raise DataError(f"{kind} {reference} does not exist")
        return Media(kind, reference.encode().rjust(16), reference, int(reference), (1, 2, 2 * int(reference)))


def placed(role: str, *parts: str | tuple[str, int]) -> Message:
    """A turn of texts and of (kind, tokens)."""
    content, media = "", []
    for part in parts:
        if isinstance(part, str):
            content += part
        else:
            media.append(MediaPart(part[0], str(part[1]), len(content)))
    return Message(role, content, media=tuple(media))


def turns(kinds: tuple[str, ...]) -> st.SearchStrategy:
    part = TEXTS | st.tuples(st.sampled_from(kinds), st.integers(1, 5))
    asked = st.builds(lambda parts: placed("user", *parts), st.lists(part, max_size=4))
    answered = st.builds(lambda text: Message("assistant", "x" + text), TEXTS)
    pairs = st.lists(st.tuples(asked, answered), min_size=1, max_size=3)
    system = st.builds(lambda text: [Message("system", text)], TEXTS) | st.just([])
    return st.builds(lambda first, rest: (*first, *(turn for pair in rest for turn in pair)), system, pairs)


@pytest.fixture(scope="module")
def tokenizers(repo_root):
    return {name: media_tokenizer(name, repo_root) for name in TEMPLATES}


def official(tokenizer, family: str, messages: tuple[Message, ...], **flags: bool) -> list[int]:
    """The ids of `apply_chat_template`, with the placeholders of the template repeated in the text."""
    sizes = iter([int(part.reference) for message in messages for part in message.media])
    text = tokenizer.apply_chat_template([message.as_dict() for message in messages], tokenize=False, **flags)
    tokens = "|".join(map(re.escape, FAMILIES[family].placeholders.values()))
    text = re.sub(tokens, lambda found: found[0] * next(sizes), text)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("flags", [{}, {"add_vision_id": True}], ids=["plain", "counted"])
@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_equal_the_template_with_repeated_placeholders(tokenizers, family: str, flags: dict, data):
    messages = data.draw(turns(tuple(FAMILIES[family].placeholders)))
    tokenizer, processor = tokenizers[family], Sizes(family)
    template = "{%- set add_vision_id = true -%}" * bool(flags) + tokenizer.chat_template
    chat = ChatTemplate(tokenizer, template)
    [encoded] = chat.encode([Conversation(messages)], processor=processor)
    assert isinstance(encoded, Encoded), encoded
    assert encoded.ids.tolist() == official(tokenizer, family, messages, **flags)
    media = [(part.kind, int(part.reference)) for message in messages for part in message.media]
    assert [(item.kind, item.tokens) for item in encoded.media] == media
    pads = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].placeholders.values()]
    tokens = encoded.placed.tokens() if encoded.placed else []
    assert np.flatnonzero(np.isin(encoded.ids, pads)).tolist() == list(tokens)
    prompt = chat.prompt(messages[:-1], (), processor)
    assert prompt.ids.tolist() == official(tokenizer, family, messages[:-1], add_generation_prompt=True, **flags)
    assert encoded.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert prompt.media == encoded.media


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("train_on", ["all", "assistant", "last"])
def test_media_tokens_are_never_targets_and_typed_placeholders_are_text(tokenizers, family: str, train_on: str):
    [pad, *_] = FAMILIES[family].placeholders.values()
    messages = (placed("user", f"See {pad}: ", ("image", 3), "?"), Message("assistant", f"It is {pad}."))
    chat = ChatTemplate(tokenizers[family])
    [encoded] = chat.encode([Conversation(messages)], train_on, Sizes(family))
    assert isinstance(encoded, Encoded) and encoded.placed is not None
    tokens = encoded.placed.tokens()
    assert len(tokens) == 3 and set(encoded.weights[tokens]) == {0.0}
    others = np.setdiff1d(np.arange(len(encoded.ids)), tokens)
    if train_on == "all":
        assert set(encoded.weights[others]) == {1.0}
    text = chat.decode(encoded.ids)
    assert text.count(pad) == 2  # those that were typed; `decode` leaves out control tokens
    assert chat.decode(encoded.ids[encoded.trained]).endswith(f"It is {pad}." + "\n" * (train_on == "all"))


def test_a_template_may_write_kinds_in_another_order(tokenizers):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content if p.type == 'audio' %}<|AUDIO|>{% endfor %}"
        "{% for p in m.content if p.type == 'image' %}<|IMAGE|>{% endfor %}"
        "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    asked = placed("user", ("image", 1), "a", ("audio", 2), ("image", 3), "b", ("audio", 4))
    encoded = ChatTemplate(tokenizers["qwen2_5_omni"], template).prompt([asked], (), Sizes("qwen2_5_omni"))
    assert [(item.kind, item.tokens) for item in encoded.media] == [
        ("audio", 2),
        ("audio", 4),
        ("image", 1),
        ("image", 3),
    ]


CHAT = (placed("user", "a", ("image", 2), "b"), Message("assistant", "c"))
BAD = {
    "no placeholder": (VL_TEMPLATE.replace("<|image_pad|>", ""), CHAT, "writes 0 placeholders for the 1 image"),
    "two placeholders": (VL_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2), CHAT, "writes 2 placeholders"),
    "one text of two": (
        VL_TEMPLATE.replace("'text' in part", "'text' in part and loop.first"),
        CHAT,
        "leaves out a text of message 0 (user): 'b'",
    ),
    "text only": ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", CHAT, "chat template"),
    "another family": (OMNI_TEMPLATE, CHAT, "writes 0 placeholders"),
    "a missing file": (
        VL_TEMPLATE,
        (Message("user", "", media=(MediaPart("image", "x.png", 0),)), CHAT[1]),
        "message 0",
    ),
}


@pytest.mark.parametrize(("template", "messages", "words"), BAD.values(), ids=BAD)
def test_a_template_that_does_not_write_the_media_is_refused(tokenizers, template: str, messages: tuple, words: str):
    chat = ChatTemplate(tokenizers["qwen2_5_vl"], template)
    [error] = chat.encode([Conversation(messages)], processor=Sizes("qwen2_5_vl"))
    assert isinstance(error, DataError) and words in str(error)


def test_a_model_without_towers_and_a_tokenizer_without_placeholders_refuse_media(tokenizers, repo_root):
    [error] = ChatTemplate(tokenizers["qwen2_5_vl"]).encode([Conversation(CHAT)])
    assert "message 0 (user) holds image, and the model reads text only" in str(error)
    with pytest.raises(DataError, match=r"lacks the control token <\|IMAGE\|>"):
        ChatTemplate(tokenizers["qwen2_5_vl"]).prompt(CHAT[:1], (), Sizes("qwen2_5_omni"))
