"""Manners of the processes that load images."""

import signal


def leave_signals_to_the_main_process(_: int) -> None:
    """Ignore what reaches all processes of a terminal: the main one still wants the batches that are under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
