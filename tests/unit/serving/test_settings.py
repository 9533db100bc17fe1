"""The settings of an answer: their limits, and the request that they become."""

from __future__ import annotations

import pytest

from finetune.serving.request import Sampling
from finetune.serving.settings import AnswerSettings
from finetune.system.errors import InputError


def test_settings_become_the_request_of_an_answer():
    settings = AnswerSettings.read({"max_tokens": 3, "temperature": 0.5, "top_k": -1, "seed": 4, "stop": None})
    request = settings.request([5, 6], stop_ids=[9], context_tokens=8, adapter="a")
    assert (request.ids, request.max_tokens, request.adapter, request.stop_ids) == ((5, 6), 3, "a", frozenset({9}))
    assert request.sampling == Sampling(temperature=0.5, seed=4)


def test_without_max_tokens_an_answer_fills_the_context():
    assert AnswerSettings().request([1, 2], stop_ids=[], context_tokens=8).max_tokens == 6
    assert AnswerSettings(ignore_eos=True).request([1], stop_ids=[3], context_tokens=8).stop_ids == frozenset()


def test_one_stop_text_stands_without_a_list():
    assert AnswerSettings.read({"stop": "\n"}) == AnswerSettings.read({"stop": ["\n"]})


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": float("nan"), "top_p": 0}, ["temperature", "top_p"]),
        ({"max_tokens": True}, ["max_tokens"]),
        ({"seed": 2**63}, ["seed"]),
        ({"stop": [""]}, ["stop.0"]),
        ({"stop": 3}, ["stop"]),
        ({"temprature": 1}, ["temprature"]),
    ],
)
def test_an_error_names_every_wrong_key(values, keys):
    with pytest.raises(InputError) as error:
        AnswerSettings.read(values)
    assert [problem.partition(":")[0] for problem in str(error.value).split("; ")] == keys


@pytest.mark.parametrize(("ids", "max_tokens"), [([], 1), ([1] * 8, None), ([1] * 5, 4)])
def test_a_prompt_that_leaves_no_room_is_refused(ids, max_tokens):
    with pytest.raises(InputError):
        AnswerSettings(max_tokens=max_tokens).request(ids, stop_ids=[], context_tokens=8)


def test_a_full_context_can_still_be_scored():
    assert AnswerSettings(max_tokens=0).request([1] * 8, stop_ids=[], context_tokens=8).max_tokens == 0
