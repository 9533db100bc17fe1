"""Signals are held back within the block, and handled as before after it."""

from __future__ import annotations

import signal

from finetune.system.signals import StopSignals


def test_signals_are_held_back_and_repeats_are_marked():
    calls: list[tuple[int, bool]] = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(lambda number, again: calls.append((number, again))) as stop:
        assert stop.received == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert calls == [(signal.SIGTERM, False), (signal.SIGINT, True)]
    assert stop.received == signal.SIGINT and signal.getsignal(signal.SIGTERM) == before
