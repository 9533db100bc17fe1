"""The benchmark of federated learning: parties with different rows, compared with all rows at one place."""

from __future__ import annotations

import pytest

from benchmarks.federated import LOCAL, PARTIES, split, summarize


def test_parties_and_held_out_rows_share_no_prompt():
    parties, held_out = split(20)
    assert [*parties] == [*PARTIES] and len(held_out) == 20 * len(PARTIES)
    prompts = [{row["prompt"] for row in rows} for rows in (*parties.values(), held_out)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))


def test_the_bars_need_the_federation_near_and_each_party_alone_below():
    good = {"central": {"exact": 0.9}, "ffa": {"exact": 0.86, "rounds": 8}} | {name: {"exact": 0.5} for name in LOCAL}
    summary = summarize(good)
    assert summary["variants"]["ffa"]["of_central"] == pytest.approx(0.86 / 0.9)
    assert [bar["met"] for bar in summary["bars"]] == [True] * 5
    bad = good | {"ffa": {"exact": 0.8, "rounds": 12}, LOCAL[0]: {"exact": 0.88}}
    assert [bar["met"] for bar in summarize(bad)["bars"]] == [False, False, False, True, True]
