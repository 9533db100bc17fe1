"""Answers that obey a JSON schema, by a model of random logits."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.serving.engine import grammar as module
from finetune.serving.engine.grammar import GrammarCompiler, check_schema
from finetune.serving.engine.sampling import BatchSampler, RowState
from finetune.serving.request import Finished, Request, Sampling, Token
from finetune.system.errors import InputError, MissingExtra
from finetune.system.resources import packaged
from tests.families.tokenizers import build_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "</tag>"]}, "maxItems": 3},
        "size": {"type": ["number", "null"], "minimum": -5, "maximum": 5.5},
        "more": {"$ref": "#/$defs/pair"},
    },
    "required": ["name", "age", "tags", "size"],
    "additionalProperties": False,
    "$defs": {
        "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2}
    },
}
TEXT = {"type": "string"}
SCHEMAS = [
    PERSON,
    TEXT | {"pattern": "^[a-f]{3}-[0-9]+$", "maxLength": 9},
    {"anyOf": [{"type": "null"}, PERSON | {"properties": {"k": {"type": "boolean"}}, "required": ["k"]}]},
    {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": "object"},
]  # fmt: skip


def _tiny() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")


class Writer:
    """A model of random logits, with the tokenizer of a family."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.vocabulary = len(tokenizer) + 7
        self.compiler = GrammarCompiler(tokenizer, self.vocabulary)
        self.sampler = BatchSampler(self.vocabulary, self.compiler)
        # Free strings and objects would go on for long.
        ends = {tokenizer.eos_token, '"', "}", '"}'}
        self._ends = [i for token, i in tokenizer.get_vocab().items() if token in ends]

    def start(self, schema: str | dict, *, stop: bool = True, **of) -> RowState:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        stop_ids = frozenset([self.end] if stop else [])
        return self.sampler.start(Request((1, 2), 4096, stop_ids=stop_ids, sampling=Sampling(grammar=text, **of)))

    def text(self, row: RowState) -> str:
        return self.tokenizer.decode(row.ids, skip_special_tokens=True)

    def write(self, rows: list[RowState], *, most: int = 400) -> list[str | None]:
        """Write answers together, ever more eager to end; None: not ended within `most` tokens."""
        generator = torch.Generator().manual_seed(0)
        texts: dict[int, str] = {}
        for step in range(most):
            running = [n for n in range(len(rows)) if n not in texts]
            logits = torch.randn(len(running), self.vocabulary + 5, generator=generator) * 2
            logits[:, self._ends] += step / 10
            for n, token in zip(running, self.sampler.choose(logits, [rows[n] for n in running]), strict=True):
                if isinstance(token, Finished):
                    assert token.reason == "stop", token.error
                if isinstance(token, Finished) or token.id in rows[n].request.stop_ids:
                    texts[n] = self.text(rows[n])
        return [texts.get(n) for n in range(len(rows))]


@pytest.fixture(scope="module", params=["tiny", "mistral", "llama"])
def writer(request) -> Writer:
    return Writer(_tiny() if request.param == "tiny" else build_tokenizer(request.param))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_every_answer_that_ends_is_valid_under_its_schema(writer, schema):
    """Greedy and sampled rows, with and without a stop id, in one batch."""
    every = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 2.0, "top_p": 0.9}]
    rows = [
        writer.start(schema, stop=i % 2 == 0, seed=i, presence_penalty=i % 3 / 2, **every[i % 4]) for i in range(24)
    ]
    ended = [text for text in writer.write(rows) if text is not None]
    assert len(ended) >= 20
    for text in ended:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_any_json_object_is_an_object(writer):
    texts = writer.write([writer.start({"type": "object"}, temperature=1.0, seed=i) for i in range(8)])
    assert {type(json.loads(text)) for text in texts if text} == {dict}


def test_rows_with_and_without_a_grammar_do_not_change_each_other(writer):
    def rows() -> list[RowState]:
        free = [
            BatchSampler(writer.vocabulary).start(Request((1,), 9, sampling=Sampling(seed=1, temperature=t)))
            for t in (0, 1)
        ]
        return [*free, *(writer.start(schema, temperature=1.0, seed=3) for schema in SCHEMAS)]  # fmt: skip

    logits = torch.randn(6, len(rows()), writer.vocabulary, generator=torch.Generator().manual_seed(1))
    sampler, together = writer.sampler, rows()
    for step in logits[:2]:
        sampler.choose(step, together)
    for n, alone in enumerate(rows()):
        for step in logits[:2]:
            sampler.choose(step[n : n + 1], [alone])
        assert alone.ids == together[n].ids


def test_the_end_token_comes_only_where_the_answer_is_complete(writer):
    """However probable it is: `true` is three more letters away."""
    end = writer.end
    row, sampler = writer.start({"const": True}), writer.sampler
    logits = torch.zeros(1, writer.vocabulary)
    logits[0, end] = 100.0
    while end not in row.ids:
        assert isinstance(sampler.choose(logits, [row])[0], Token)
    assert writer.text(row).strip() == "true"


def test_without_stop_ids_an_answer_ends_by_itself_and_never_by_the_end_token(writer):
    end = writer.end
    row, sampler = writer.start({"enum": ["ab", "cd"]}, stop=False), writer.sampler
    logits = torch.zeros(1, writer.vocabulary)
    logits[0, end] = 100.0
    for _ in range(10):
        [token] = sampler.choose(logits, [row])
        if isinstance(token, Finished):
            break
    assert token == Finished("stop")
    assert end not in row.ids and json.loads(writer.text(row)) in ("ab", "cd")


@pytest.mark.parametrize(
    "schema",
    [
        "",
        "{",
        "[]",
        "3",
        "false",
        '{"type": "sequence"}',
        '{"type": "string", "pattern": "(a"}',
        '{"not": {"type": "string"}}',
        '{"enum": []}',
        '{"$ref": "http://127.0.0.1/schema.json"}',
        '{"$ref": "file:///etc/passwd"}',
        '{"x-guidance": {"lenient": true}, "not": {"type": "string"}}',
        "[" * 100_000,
        '{"items":' * 5000 + "{}" + "}" * 5000,
        json.dumps({"enum": [f"value {i}" for i in range(100_000)]}),
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for i in range(8)]} for j in range(20)]}),
    ],
    ids=lambda schema: schema[:40],
)
def test_schemas_that_cannot_be_obeyed_are_refused(writer, schema):
    with pytest.raises(InputError):
        check_schema(schema)
    with pytest.raises(InputError):
        writer.compiler.prepare(schema)
    with pytest.raises(InputError):
        writer.start(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 1_000_000_007},
        {"$ref": "#"},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_with_a_grammar_that_is_too_complex_are_refused_before_the_answer_starts(writer, schema):
    with pytest.raises(InputError):
        writer.start(schema)


def test_a_grammar_that_fails_later_ends_its_row_only(writer):
    """The library counts the states of a regular expression as they are reached."""
    wide = {"anyOf": [{"type": "object", "properties": {f"a{i}": {"type": "string"}}} for i in range(1000)]}
    rows = [writer.start(schema) for schema in ({"pattern": "^((a{1000}){1000}){1000}$"} | TEXT, PERSON, wide)]
    sampler, ends = writer.sampler, []
    for _ in range(5):
        found = sampler.choose(torch.zeros(len(rows), writer.vocabulary), rows)
        ends += [each for each in found if isinstance(each, Finished)]
        rows = [row for row, each in zip(rows, found, strict=True) if isinstance(each, Token)]
    assert [end.reason for end in ends] == ["error", "error"]
    assert [row.request.sampling.grammar for row in rows] == [json.dumps(PERSON)]


def test_a_schema_is_compiled_once_and_its_answers_do_not_share_a_place(monkeypatch):
    writer, compiled = Writer(_tiny()), []
    compile_ = GrammarCompiler._compile
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda self, each: compiled.append(each) or compile_(self, each))
    monkeypatch.setattr(module, "_KEPT_GRAMMARS", 2)
    writer.compiler.prepare('{"const": "abc"}')
    first, second = (writer.start('{"const": "abc"}', stop=False) for _ in range(2))
    assert writer.write([first]) == writer.write([second]) == ['"abc"']
    writer.start('{"const": 1}')
    writer.start('{"const": "abc"}')
    writer.start('{"const": 2}')  # the least recently used one leaves
    writer.start('{"const": "abc"}')
    writer.start('{"const": 1}')
    assert [json.loads(schema)["const"] for schema in compiled] == ["abc", 1, 2, 1]


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[serve\]"):
        GrammarCompiler(_tiny(), 600)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[serve\]"):
        check_schema("{}")


def test_stop_ids_beyond_the_vocabulary_do_no_harm(writer):
    ids = frozenset([-1, 2**40, writer.end])
    row = writer.sampler.start(Request((1,), 9, stop_ids=ids, sampling=Sampling(grammar='{"const": 1}')))
    assert writer.write([row]) == ["1"]
