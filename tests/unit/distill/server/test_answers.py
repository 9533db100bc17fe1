"""Valid answers of a served teacher are read exactly, and invalid ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.system.errors import ConfigError, FinetuneError
from tests import logprob_server as faults
from tests.logprob_server import MODEL, LogprobTeacher
from tests.unit.distill.server.conftest import KEY, TOP, assert_right, client, document, positions_of


@pytest.mark.parametrize("top", [1, TOP, 20])
def test_log_probabilities_are_those_of_the_token_after_each_position(teacher, top):
    ids, positions = document()
    assert_right(client(teacher, top=top).score(ids, positions), teacher, ids, positions, top)


def test_a_request_holds_ids_and_no_text(teacher):
    ids, positions = document()
    client(teacher).score(ids, positions)
    [(path, headers, question)] = teacher.seen
    assert path == "/v1/completions"
    assert question == {
        "model": MODEL,
        "prompt": ids.tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": TOP,
    }
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_no_authorization_is_sent(teacher, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    client(teacher).score(*document())
    assert "Authorization" not in teacher.seen[0][1]


def test_a_document_without_positions_sends_no_request(teacher):
    found = client(teacher).score(document()[0], np.array([], dtype=np.int64))
    assert found.ids.shape == found.log_probs.shape == (0, TOP)
    assert teacher.seen == []


@pytest.mark.parametrize("positions", [[11], [-1]])
def test_a_position_without_a_token_after_it_is_refused(teacher, positions):
    with pytest.raises(ValueError, match="of a document of 12 tokens"):
        client(teacher).score(document()[0], np.array(positions))


# The document of the wrong answers: token 7, the least probable one after it, follows token 1 at position 4.
IDS = np.array([3, 4, 5, 6, 1, 7, 8, 9, 2, 3, 4, 5], dtype=np.int32)


def entry(answer: dict) -> dict:
    """The entry of the token after position 4: that token first, then the others from the most probable on."""
    return positions_of(answer)[5]


def first(answer: dict) -> dict:
    return list(entry(answer).values())[1]


def set_all(answer: dict, log_prob: float | None) -> None:
    for values in entry(answer).values():
        values["logprob"] = log_prob


def to_logits(answer: dict) -> None:
    for values in entry(answer).values():
        values["logprob"] += 5


def repeat_first(answer: dict) -> None:
    _, most, second, *_ = entry(answer)
    entry(answer)["0" + most] = entry(answer).pop(second)


def shift(answer: dict) -> None:
    positions_of(answer).append(positions_of(answer).pop(5))


WRONG = {
    "too short": (lambda a: positions_of(a).pop(), "11 positions for a prompt of 12 tokens"),
    "too long": (lambda a: positions_of(a).append({}), "13 positions for a prompt of 12 tokens"),
    "other tokens": (shift, "nothing about token 7 at position 5"),
    "own token missing": (lambda a: entry(a).pop("7"), "nothing about token 7 at position 5"),
    "nothing at a position": (lambda a: positions_of(a).__setitem__(5, None), "nothing about token 7 at position 5"),
    "nan": (lambda a: first(a).update(logprob=float("nan")), "not a number: nan"),
    "nan beyond the top": (lambda a: entry(a)["7"].update(logprob=float("nan")), "not a number: nan"),
    "text": (lambda a: first(a).update(logprob="-0.5"), "not a number: '-0.5'"),
    "true": (lambda a: first(a).update(logprob=True), "not a number: True"),
    "null in the top": (lambda a: set_all(a, None), "not finite"),
    "infinite": (lambda a: first(a).update(logprob=float("inf")), "not finite"),
    "beyond float64": (lambda a: first(a).update(logprob=10**400), "not finite"),
    "beyond float32": (lambda a: set_all(a, -1e39), "not finite"),
    "logits": (to_logits, "sum to"),
    "too few": (lambda a: [entry(a).pop(token) for token in list(entry(a))[1:3]], "7 tokens at a position, expected 8"),
    "text for an id": (lambda a: entry(a).update({"Hello": entry(a)["7"]}), "not an id: 'Hello'"),
    "negative id": (lambda a: entry(a).update({"-3": entry(a)["7"]}), "not an id: '-3'"),
    "digits of another script": (lambda a: entry(a).update({"٣": entry(a)["7"]}), "not an id"),
    "beyond every vocabulary": (lambda a: entry(a).update({"4294967296": entry(a)["7"]}), "not an id"),
    "an id twice": (repeat_first, "a token twice"),
}


def make_least_probable(teacher: LogprobTeacher) -> None:
    row_V = teacher.table_VV[1]
    least = int(row_V.argmin())
    row_V[[7, least]] = row_V[[least, 7]]


@pytest.mark.parametrize(("edit", "reason"), WRONG.values(), ids=WRONG)
def test_an_invalid_answer_is_refused_without_a_retry(teacher, edit, reason):
    make_least_probable(teacher)
    teacher.faults.append(faults.edited(edit))
    with pytest.raises(FinetuneError, match=reason) as caught:
        client(teacher).score(IDS, np.array([2, 4]))
    assert not isinstance(caught.value, ConfigError)
    assert teacher.url in str(caught.value)
    assert len(teacher.seen) == 1


@pytest.mark.parametrize("log_prob", [None, -9999.0, float("-inf")])
def test_a_token_of_probability_zero_beyond_the_top_is_valid(teacher, log_prob):
    """Versions of vLLM write -inf as null, as -9999, or as Python does."""
    make_least_probable(teacher)
    teacher.faults.append(faults.edited(lambda answer: entry(answer)["7"].update(logprob=log_prob)))
    positions = np.array([2, 4])
    assert_right(client(teacher).score(IDS, positions), teacher, IDS, positions)


def test_an_answer_over_the_size_limit_is_refused(teacher):
    teacher.faults.append(faults.raw(b" " * 10_000_000))
    with pytest.raises(FinetuneError, match="4,304,896 bytes"):
        client(teacher).score(*document())
