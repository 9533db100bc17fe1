"""Text of answers: the decoded tokens, cut at the first stop string, in pieces that never change later."""

from __future__ import annotations

from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from finetune.serving.text import AnswerText
from finetune.system.resources import packaged
from tests.families.tokenizers import build_tokenizer

REAL = Path(__file__).parents[4] / "shared" / "qwen2.5" / "tokenizer" / "tokenizer.json"
TINY = packaged("data") / "tiny-qwen2.5" / "tokenizer.json"
NAMES = ["qwen2.5", "llama", "mistral", "mistral-nemo", "qwen3"]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    if name == "qwen2.5":
        return Tokenizer.from_file(str(REAL if REAL.exists() else TINY))
    return build_tokenizer(name).backend_tokenizer


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the stop string that is complete first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [len(each) for each in stop if each and text[:end].endswith(each)]
        if found:
            return text[: end - max(found)]
    return text


def pieces_of(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), **options) -> list[str]:
    text = AnswerText(tokenizer, stop, **options)
    return [*map(text.push, ids), text.finish()]


def some_ids(tokenizer: Tokenizer):
    """Ids of the whole vocabulary and beyond, of single bytes and special tokens, and of real texts."""
    size = tokenizer.get_vocab_size()
    single = [i for token, i in tokenizer.get_vocab().items() if len(token) == 1 or token.startswith("<0x")]
    added = list(tokenizer.get_added_tokens_decoder())
    ids = st.one_of(st.integers(0, size + 5), st.sampled_from(single), st.sampled_from(added))
    texts = st.text(max_size=12).map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    return st.lists(st.one_of(ids.map(lambda i: [i]), texts), max_size=12).map(lambda parts: list(chain(*parts)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [True, False])
def test_all_pieces_together_are_the_decoded_answer_cut_at_the_first_stop_string(name, skip):
    tokenizer = tokenizer_of(name)

    @given(some_ids(tokenizer), st.data())
    @settings(max_examples=150, deadline=None)
    def holds(ids, data):
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        parts = [whole[i : i + n] for i in range(min(len(whole), 6)) for n in (1, 2, 5)]
        stop = tuple(data.draw(st.lists(st.sampled_from([*parts, "", "ab", "�"]), max_size=4)))
        for stops in ((), stop):
            text = AnswerText(tokenizer, stops, skip_special_tokens=skip)
            given_out = ""
            for token in ids:
                given_out += text.push(token)
                assert cut(whole, stops).startswith(given_out)
            given_out += text.finish()
            assert given_out == cut(whole, stops)
            assert text.stopped == (given_out != whole or any(map(whole.endswith, filter(None, stops))))
            assert text.push(ids[0] if ids else 0) == "" or not text.stopped

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_text_of_real_characters_comes_as_soon_as_their_last_byte(name):
    """Only a run of byte tokens of a SentencePiece tokenizer waits for its end: one wrong byte changes all of it."""
    tokenizer = tokenizer_of(name)
    text = "Größe 5 € – naïve 漢字 🎉 done."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    done = ""
    for number, piece in enumerate(pieces[:-1]):
        done += piece
        known = tokenizer.decode(ids[: number + 1]).rstrip("�")
        assert known.startswith(done)
        if not tokenizer.id_to_token(ids[number]).startswith("<0x"):
            assert done == known


def ascii_ids(text: str) -> tuple[Tokenizer, list[int]]:
    """A tokenizer whose tokens are printable characters, one each."""
    vocabulary = {chr(code): code for code in range(33, 127)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, [ord(character) for character in text]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("hello", ("ll",), "he"),
        ("hello", ("x", "lo", "llo"), "he"),  # they end together: the longest
        ("abcd", ("abcd", "bc"), "a"),  # `bc` is complete first
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abcabd", ("abd", "cabe"), "abc"),
        ("stop", ("stop",), ""),
        ("abc", ("",), "abc"),
        ("abc", ("", "b", "b"), "a"),
        ("abc", ("abcd",), "abc"),  # held back, and given back at the end
    ],
)
def test_stop_strings(text, stop, kept):
    tokenizer, ids = ascii_ids(text)
    assert "".join(pieces_of(tokenizer, ids, stop)) == kept == cut(text, stop)


def test_only_text_that_may_start_a_stop_string_is_held_back():
    tokenizer, ids = ascii_ids("xstsx")
    assert pieces_of(tokenizer, ids, ("stop",)) == ["x", "", "", "st", "sx", ""]


def test_a_stop_string_of_a_special_token_never_stops_but_the_same_characters_do():
    tokenizer = tokenizer_of("qwen3")
    end = tokenizer.token_to_id("<|im_end|>")
    spelled = [i for c in "a<|im_end|>b" for i in tokenizer.encode(c, add_special_tokens=False).ids]
    for ids, kept in (([*tokenizer.encode("ab").ids, end], "ab"), (spelled, "a")):
        assert "".join(pieces_of(tokenizer, ids, ("<|im_end|>",))) == kept
    with_special = [*tokenizer.encode("ab").ids, end]
    assert "".join(pieces_of(tokenizer, with_special, ("<|im_end|>",), skip_special_tokens=False)) == "ab"


class Counted(str):
    """A text that counts how often its characters are read."""

    reads = 0

    def __getitem__(self, key):
        Counted.reads += 1
        return super().__getitem__(key)


def test_long_stop_strings_take_linear_time():
    """The worst case of a simple search: text and stop string of one repeated character, the last one differs."""
    tokenizer, ids = ascii_ids("a" * 20_000 + "b" * 20_000)
    text = AnswerText(tokenizer, ["a" * 10_000 + "c", "a" * 9_999 + "d"])
    for stop in text._stops:
        stop.text = Counted(stop.text)
    Counted.reads = 0
    assert "".join([*map(text.push, ids), text.finish()]) == "a" * 20_000 + "b" * 20_000
    assert Counted.reads < 2 * 4 * 40_000


@given(st.text(alphabet="ab", max_size=40), st.lists(st.text(alphabet="ab", max_size=5), max_size=4))
@example("ab" * 20, ["aa", "bb"])
@settings(max_examples=300, deadline=None)
def test_stop_strings_that_overlap(text, stop):
    tokenizer, ids = ascii_ids(text)
    assert "".join(pieces_of(tokenizer, ids, tuple(stop))) == cut(text, tuple(stop))


def test_decoding_a_token_does_not_depend_on_the_length_of_the_answer():
    """The tokens decoded together are one part and the part before it."""
    tokenizer, longest = tokenizer_of("mistral"), 0

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer.encode("one two three " * 100, add_special_tokens=False).ids
    assert "".join(pieces_of(Watched(), ids)) == tokenizer.decode(ids)  # type: ignore[arg-type]
    assert longest == 2
    assert all(first or second for first, second in pairwise(pieces_of(tokenizer, ids)[:-1]))
