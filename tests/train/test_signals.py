"""train/signals.py: each signal that asks to stop is heard, and the second one does what it always did."""

import signal

import pytest

from repvgg.train.signals import StopRequests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_remembered_and_the_second_does_what_it_always_did(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with StopRequests() as stop:
            assert stop.signal == 0
            signal.raise_signal(number)
            assert (stop.signal, heard) == (number, [])
            signal.raise_signal(number)
            assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def test_under_nohup_a_terminal_that_closes_is_no_request() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)
