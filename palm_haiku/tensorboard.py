"""TensorBoard's event files, written where they are asked for.

tensorboardX's `SummaryWriter` writes in a thread of its own. What fails there is a traceback, and
once that thread's queue is full, the next number waits for ever.
"""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

# Made by protobuf as the module is imported, where no type checker sees them.
_Event = getattr(event_pb2, "Event")  # noqa: B009
_START = getattr(event_pb2, "SessionLog")(status="START")  # noqa: B009


class EventFile:
  """Scalars of one process, in a file that TensorBoard reads while it grows."""

  def __init__(self, directory: pathlib.Path, purge_step: int | None):
    """Creates a file.

    Args:
      directory: of all event files of a run; made where it does not exist.
      purge_step: step from which on TensorBoard hides what older files have.
    """
    directory.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(directory / "events"))
    if purge_step is not None:
      self._write(purge_step, session_log=_START)
    self._writer.flush()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends scalars of one step."""
    for name, value in scalars.items():
      self._write(step, summary=summary.scalar(name, value))
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _write(self, step, **content):
    self._writer.write_event(_Event(wall_time=time.time(), step=step, **content))
