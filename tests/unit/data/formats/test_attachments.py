"""Media of rows: every form is read as the same turns; what is ambiguous, missing or left over is named by its turn."""

from __future__ import annotations

import pytest

from finetune.config.schema import SourceConfig
from finetune.data.formats.detection import resolve_format
from finetune.data.formats.messages import Conversation, MediaPart, Message, Preference
from finetune.data.formats.parser import RowParser, messages_row
from finetune.data.formats.rules import RowRules
from finetune.system.errors import DataError

IMAGE = MediaPart("image", "/data/a.png", 0)
ASKED = (Message("user", "What?", media=(IMAGE,)), Message("assistant", "A square."))
SAID = {"role": "assistant", "content": "A square."}
URI = "data:image/png;base64,iVBORw=="


def parse(row: dict, file: str = "/data/rows.jsonl", rules: RowRules | None = None, **source):
    cfg = SourceConfig(path=file, **source)
    return RowParser(cfg, resolve_format(cfg, row, file), rules=rules or RowRules(), file=file).parse(row)


def chat(*parts: object, **columns: object) -> dict:
    """A row whose user says parts: a text, or a list of parts."""
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"messages": [{"role": "user", "content": content}, SAID], **columns}


TEXT = {"type": "text", "text": "What?"}
FORMS = {
    "a column and a tag": chat("<image>What?", images=["a.png"]),
    "one value": chat("<image>What?", images="a.png"),
    "a singular name": chat("<image>What?", image=["a.png"]),
    "one file without a tag": chat("What?", image="a.png"),
    "an absolute path": chat("<image>What?", images=["/data/a.png"]),
    "a path through another folder": chat("<image>What?", images=["../data/x/../a.png"]),
    "an address of a file": chat("<image>What?", images=["file:///data/a.png"]),
    "an object with a path": chat("<image>What?", images=[{"path": "a.png", "bytes": None}]),
    "a list in a CSV file": chat("<image>What?", images='["a.png"]'),
    "image_url": chat({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, TEXT),
    "image_url as text": chat({"type": "image_url", "image_url": "a.png"}, TEXT),
    "input_image": chat({"type": "input_image", "image_url": "a.png"}, TEXT),
    "Qwen's part": chat({"type": "image", "image": "file:///data/a.png"}, TEXT),
    "transformers' part": chat({"type": "image", "url": "a.png"}, TEXT),
    "a part without a file": chat({"type": "image", "index": 0, "text": None}, TEXT, images=["a.png"]),
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A square."}],
        "image": "a.png",
    },
    "alpaca": {"instruction": "<image>What?", "output": "A square.", "images": ["a.png"]},
    "prompt and completion": {"prompt": "<image>What?", "completion": "A square.", "images": ["a.png"]},
    "a dataset of questions": {"image": {"path": "a.png"}, "question": "What?", "answer": "A square."},
    "messages as JSON text": {
        "messages": '[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A square."}]',
        "images": ["a.png"],
    },
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rules", [RowRules(), RowRules(on_object="json")], ids=["error", "json"])
def test_every_form_is_the_same_conversation(row: dict, rules: RowRules):
    assert parse(row, rules=rules).messages == ASKED


def test_columns_can_have_other_names_and_a_metadata_row_is_of_its_file():
    asked = {"question": "What?", "answer": "A square."}
    for row in (chat("<image>What?", pictures=["a.png"]), {**asked, "pictures": "a.png"}):
        assert parse(row, columns={"images": "pictures"}).messages == ASKED
    row = {"file_name": "a.png", "prompt": "What?", "completion": "A square."}
    assert parse(row, "/data/metadata.jsonl").messages == ASKED
    assert parse({**row, "prompt": "<image>What?"}, "/data/metadata.csv").messages == ASKED
    assert parse(row).messages[0] == Message("user", "What?")  # elsewhere it is metadata
    for name, kind in {"s.wav": "audio", "t.MP3": "audio", "v.mp4": "video", "p.JPEG": "image"}.items():
        found = parse({**row, "file_name": name}, "/data/metadata.jsonl").messages[0].media
        assert found == (MediaPart(kind, f"/data/{name}", 0),)


def test_content_that_is_no_path_is_kept():
    for value in (URI, "http://host/a.png", b"\x89PNG", {"bytes": b"\x89PNG", "path": "a.png"}):
        [part] = parse(chat("<image>What?", images=[value])).messages[0].media
        assert part.reference == (value["bytes"] if isinstance(value, dict) else value)
    audio = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    assert parse(chat(audio)).messages[0].media == (MediaPart("audio", "data:audio/wav;base64,UklGRg==", 0),)


def test_tags_are_numbered_by_kind_over_all_turns_and_leave_the_texts_around_them():
    row = {
        "messages": [
            {"role": "system", "content": "Like <image>."},
            {"role": "user", "content": "<image>\nand <audio> or\n<image> <video>"},
            {"role": "assistant", "content": "Let me see."},
            {"role": "tool", "content": "<image>"},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "<audio>So?"}]},
            SAID,
        ],
        "images": ["1", "2", "3", "4"],
        "audios": ["5", "6"],
        "videos": ["7", "8"],
    }
    turns = parse(row).messages
    assert [turn.content for turn in turns[:2]] == ["Like .", "\nand  or\n "]
    found = [[(part.kind, part.reference[-1], part.offset) for part in turn.media] for turn in turns]
    assert found == [
        [("image", "1", 5)],
        [("image", "2", 0), ("audio", "5", 5), ("image", "3", 9), ("video", "7", 10)],
        [],
        [("image", "4", 0)],
        [("video", "8", 0), ("audio", "6", 0)],
        [],
    ]
    assert parse(messages_row(Conversation(turns))).messages == turns


@pytest.mark.parametrize("columns", [{}, {"images": None}, {"audios": ["a.wav"]}])
def test_a_tag_is_text_in_a_row_without_its_column(columns: dict):
    text = "Write <image> and <audio>" if "audios" in columns else "Write <image>"
    [asked, _] = parse(chat(text, **columns)).messages
    assert asked.content == "Write <image>" + " and " * bool(columns.get("audios"))
    assert [part.kind for part in asked.media] == ["audio"] * bool(columns.get("audios"))


def test_a_pair_has_media_in_its_prompt():
    pair = parse({"prompt": "<image>What?", "chosen": "A square.", "rejected": "A dot.", "images": ["a.png"]})
    assert isinstance(pair, Preference)
    assert [side.messages[0].media for side in (pair.chosen, pair.rejected)] == [(IMAGE,)] * 2
    asked = {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]}
    whole = parse({"chosen": [asked, SAID], "rejected": [asked, {**SAID, "content": "A dot."}]})
    assert whole == pair
    for bad, word in [
        ({"prompt": "What?", "chosen": "<image>", "rejected": "b", "images": ["a.png"]}, "chosen"),
        ({"chosen": [asked, SAID], "rejected": [{**asked, "content": "What?"}, SAID]}, "chosen[0] differs"),
    ]:
        with pytest.raises(DataError, match=word.replace("[", r"\[")):
            parse(bad)


PART = {"type": "image", "image": "a.png"}
HOSTILE = [
    (chat("<image><image>", images=["a.png"]), "messages[0]", "image 2", "images has 1"),
    (chat("<image>", images=[]), "messages[0]", "image 1", "images has 0"),
    (chat("<image>", images=""), "messages[0]", "image 1"),
    (chat("What?", images=["a.png"]), "images: file 1 of 1", "tag <image>"),
    (chat("<image>", images=["a.png", "b.png"]), "images: file 2 of 2"),
    (chat("What?", image="a.png", audio="a.wav"), "image: file 1 of 1", "<image>"),
    (chat("<image>", images=[None]), "images[0] must be text, found null"),
    (chat("<image>", images=[""]), "images[0] is empty"),
    (chat("<image>", images=["  "]), "images[0] is empty"),
    (chat("<image>", images=[7]), "images[0] must be text, found a number"),
    (chat("<image>", images=True), "images must be text, found true or false"),
    (chat("<image>", images=[["a.png"]]), "images[0] must be text, found a list"),
    (chat("<image>", images=["a\0.png"]), "images[0]", "NUL"),
    (chat("<image>", images=["\ud800"]), "images[0]", "surrogate"),
    (chat("<image>", images=[{}]), "images[0] must have a path", "none"),
    (chat("<image>", images=[{"array": [0.1], "sampling_rate": 8000}]), "images[0]", "array, sampling_rate"),
    (chat("<image>", images=[{"bytes": "iVBO"}]), "images[0].bytes must be bytes", "data URI"),
    (chat("<image>", images=[b""]), "images[0] holds no byte"),
    (chat("<image>", images="[1"), "images", "JSON"),
    (chat("<image>", image="a.png", images=["a.png"]), "both image and images"),
    (chat(PART, TEXT, images=["a.png"]), "images: file 1 of 1"),
    (chat({"type": "image"}, TEXT), "messages[0]", "image 1 of the row has no file", "no column"),
    (chat({"type": "image_url"}, TEXT), "messages[0].content[0]", "image_url", "has no file"),
    (chat({"type": "image_url", "image_url": {"file_id": "7"}}), "messages[0].content[0].image_url", "file_id"),
    (chat({**PART, "max_pixels": 99}), "messages[0].content[0] has max_pixels", "data.image"),
    (chat({**PART, "url": "b.png"}), "messages[0].content[0] has both", "image and url"),
    (chat({"type": "video", "video": ["1.png", "2.png"]}), "messages[0].content[0].video", "found a list"),
    (chat({"type": "picture"}), "messages[0].content[0].type is 'picture'"),
    (chat({"type": ["image"]}), "messages[0].content[0].type is a list"),
    (chat("What?", "<image>"), "messages[0].content[0] must be an object"),
    (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [PART]}]},
        "messages[1]",
        "writes none",
    ),
    ({"prompt": "Draw", "completion": "<image>", "images": ["a.png"]}, "completion", "assistant"),
    ({"messages": [{"role": "system", "content": "Be"}, SAID], "image": "a.png"}, "image", "no turn of the user"),
    ({"messages": [{"role": "user", "content": "Hi", "images": ["a.png"]}, SAID]}, "messages[0].images", "lost"),
]


@pytest.mark.parametrize(("row", "words"), [(row, words) for row, *words in HOSTILE])
def test_the_error_names_the_turn_or_the_column(row: dict, words: list[str]):
    with pytest.raises(DataError) as error:
        parse(row)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_metadata_row_needs_a_known_kind_and_a_conversation():
    for row, word in [
        ({"file_name": "a.txt", "prompt": "What?", "completion": "b"}, "found '.txt'"),
        ({"file_name": 7, "prompt": "What?", "completion": "b"}, "file_name must be text"),
        ({"file_name": "a.png", "text": "A caption"}, "rows hold no file"),
    ]:
        with pytest.raises(DataError) as error:
            parse(row, "/data/metadata.jsonl")
        assert word in str(error.value)
