"""TensorBoard's event files, written at once and in the caller's thread.

TensorBoard's own writer has a thread, which prints a traceback where a disk is full, and takes a second to load.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any


class Events:
    """One event file in a folder, to which points of curves are added.

    Raises ImportError where TensorBoard is not installed, other errors where its installation is broken, `OSError` where the
    file cannot be written.
    """

    def __init__(self, folder: Path, forget_from: int) -> None:
        """Open a new file in `folder`.

        forget_from: the step from which on TensorBoard leaves out what earlier files in the folder say.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)  # a record is whole or not there
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=forget_from, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to the curve of that name."""
        self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **what: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **what).SerializeToString())
