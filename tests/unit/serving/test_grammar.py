"""Answers that obey a JSON schema, by a model of random logits."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.serving.engine import grammar as module
from finetune.serving.engine.grammar import JSON_OBJECT, GrammarCompiler, check_schema
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


@pytest.fixture(scope="module", params=["tiny", "mistral", "llama"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return _tiny() if request.param == "tiny" else build_tokenizer(request.param)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer) + 7)


def start(compiler: GrammarCompiler, schema: str | dict, *, stop: bool = True, **of) -> RowState:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    stop_ids = frozenset([compiler.tokenizer.eos_token_id] if stop else [])
    sampler = BatchSampler(compiler.vocabulary, compiler)
    return sampler.start(Request((1, 2), 4096, stop_ids=stop_ids, sampling=Sampling(grammar=text, **of)))


def write(compiler: GrammarCompiler, rows: list[RowState], *, most: int = 400, seed: int = 0) -> list[str | None]:
    """Write answers with random logits that grow for the end token; None: not ended within `most` tokens."""
    sampler, generator = BatchSampler(compiler.vocabulary, compiler), torch.Generator().manual_seed(seed)
    texts: dict[int, str] = {}
    for step in range(most):
        running = [n for n in range(len(rows)) if n not in texts]
        if not running:
            break
        logits = torch.randn(len(running), compiler.vocabulary + 5, generator=generator) * 2
        logits[:, _closing(compiler)] += step / 10
        for n, token in zip(running, sampler.choose(logits, [rows[n] for n in running]), strict=True):
            if isinstance(token, Finished):
                assert token.reason == "stop", token.error
            if isinstance(token, Finished) or token.id in rows[n].request.stop_ids:
                texts[n] = compiler.tokenizer.decode(rows[n].ids, skip_special_tokens=True)
    return [texts.get(n) for n in range(len(rows))]


def _closing(compiler: GrammarCompiler) -> list[int]:
    """Tokens that end what is open: free strings and objects would go on for long."""
    pieces = {compiler.tokenizer.eos_token, '"', "}", '"}'}
    return [i for token, i in compiler.tokenizer.get_vocab().items() if token in pieces]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_every_answer_that_ends_is_valid_under_its_schema(compiler, schema):
    """Greedy and sampled rows, with and without a stop id, in one batch."""
    every = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 2.0, "top_p": 0.9}]
    rows = [
        start(compiler, schema, stop=i % 2 == 0, seed=i, presence_penalty=i % 3 / 2, **every[i % 4]) for i in range(24)
    ]
    ended = [text for text in write(compiler, rows) if text is not None]
    assert len(ended) >= 20
    for text in ended:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_any_json_object_is_an_object(compiler):
    texts = write(compiler, [start(compiler, JSON_OBJECT, temperature=1.0, seed=i) for i in range(8)])
    assert {type(json.loads(text)) for text in texts if text} == {dict}


def test_rows_with_and_without_a_grammar_do_not_change_each_other(compiler):
    def rows() -> list[RowState]:
        free = [
            BatchSampler(compiler.vocabulary).start(Request((1,), 9, sampling=Sampling(seed=1, temperature=t)))
            for t in (0, 1)
        ]
        return [*free, *(start(compiler, schema, temperature=1.0, seed=3) for schema in SCHEMAS)]  # fmt: skip

    logits = torch.randn(6, len(rows()), compiler.vocabulary, generator=torch.Generator().manual_seed(1))
    sampler, together = BatchSampler(compiler.vocabulary, compiler), rows()
    for step in logits[:2]:
        sampler.choose(step, together)
    for n, alone in enumerate(rows()):
        for step in logits[:2]:
            sampler.choose(step[n : n + 1], [alone])
        assert alone.ids == together[n].ids


def test_the_end_token_comes_only_where_the_answer_is_complete(compiler):
    """However probable it is: `true` is three more letters away."""
    end = compiler.tokenizer.eos_token_id
    row, sampler = start(compiler, {"const": True}), BatchSampler(compiler.vocabulary, compiler)
    logits = torch.zeros(1, compiler.vocabulary)
    logits[0, end] = 100.0
    while end not in row.ids:
        assert isinstance(sampler.choose(logits, [row])[0], Token)
    assert compiler.tokenizer.decode(row.ids, skip_special_tokens=True).strip() == "true"


def test_without_stop_ids_an_answer_ends_by_itself_and_never_by_the_end_token(compiler):
    end = compiler.tokenizer.eos_token_id
    row, sampler = start(compiler, {"enum": ["ab", "cd"]}, stop=False), BatchSampler(compiler.vocabulary, compiler)
    logits = torch.zeros(1, compiler.vocabulary)
    logits[0, end] = 100.0
    for _ in range(10):
        [token] = sampler.choose(logits, [row])
        if isinstance(token, Finished):
            break
    assert token == Finished("stop")
    assert end not in row.ids and json.loads(compiler.tokenizer.decode(row.ids)) in ("ab", "cd")


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
def test_schemas_that_cannot_be_obeyed_are_refused(compiler, schema):
    with pytest.raises(InputError):
        check_schema(schema)
    with pytest.raises(InputError):
        start(compiler, schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 1_000_000_007},
        {"$ref": "#"},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_with_a_grammar_that_is_too_complex_are_refused_before_the_answer_starts(compiler, schema):
    with pytest.raises(InputError):
        start(compiler, schema)


def test_a_grammar_that_fails_later_ends_its_row_only(compiler):
    """The library counts the states of a regular expression as they are reached."""
    wide = {"anyOf": [{"type": "object", "properties": {f"a{i}": {"type": "string"}}} for i in range(1000)]}
    rows = [start(compiler, schema) for schema in ({"pattern": "^((a{1000}){1000}){1000}$"} | TEXT, PERSON, wide)]
    sampler, ends = BatchSampler(compiler.vocabulary, compiler), []
    for _ in range(5):
        found = sampler.choose(torch.zeros(len(rows), compiler.vocabulary), rows)
        ends += [each for each in found if isinstance(each, Finished)]
        rows = [row for row, each in zip(rows, found, strict=True) if isinstance(each, Token)]
    assert [end.reason for end in ends] == ["error", "error"]
    assert [row.request.sampling.grammar for row in rows] == [json.dumps(PERSON)]


def test_a_schema_is_compiled_once_and_its_answers_do_not_share_a_place(compiler, monkeypatch):
    compiled = []
    compile_ = GrammarCompiler._compile
    monkeypatch.setattr(
        GrammarCompiler, "_compile", lambda self, schema: compiled.append(schema) or compile_(self, schema)
    )
    monkeypatch.setattr(module, "_KEPT_GRAMMARS", 2)
    fresh = GrammarCompiler(compiler.tokenizer, compiler.vocabulary)
    first, second = (start(fresh, '{"const": "abc"}', stop=False) for _ in range(2))
    write(fresh, [first])
    assert write(fresh, [second]) == ['"abc"']
    start(fresh, '{"const": 1}')
    start(fresh, '{"const": "abc"}')
    start(fresh, '{"const": 2}')  # the least recently used one leaves
    start(fresh, '{"const": "abc"}')
    start(fresh, '{"const": 1}')
    assert [json.loads(schema)["const"] for schema in compiled] == ["abc", 1, 2, 1]


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[serve\]"):
        check_schema("{}")
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[serve\]"):
        start(GrammarCompiler(_tiny(), 600), "{}")
