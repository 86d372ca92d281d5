"""Checkpoints that are whole or refused: Orbax arrays and metadata under a manifest of hashes.

In a job of several processes all of them save and restore together, each the parts of arrays that
its devices hold; the first one alone looks after the directory, which they share.
"""

import asyncio
import contextlib
import fnmatch
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from palm_haiku import distributed, sharding

_MANIFEST = "manifest.json"
_DRAFT = ".unfinished"  # behind the step, until all of a checkpoint is written
_REFUSED = ".refused"
# Files that systems, editors and synchronisers leave in any directory, and take away again.
_LITTER = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "ehthumbs.db", "desktop.ini",
           "Icon\r", ".localized", ".directory", ".Spotlight-*", ".Trash*", ".fseventsd", "@eaDir",
           ".gitkeep", ".keep", ".*.sw?", ".#*", "#*#", "*~", "~$*", ".stfolder", ".dropbox*")


class CheckpointError(Exception):
  """A checkpoint that could not be written or read; the message is one line."""


class Checkpoints:
  """The checkpoints of one run, a directory per step.

  A checkpoint holds named items, each a tree of arrays that can be restored alone, and
  metadata for JSON. It appears under its final name only when all of it is written, together with a
  manifest of every file's hash: a file that was lost, cut short or changed is noticed before
  anything is read from it. Files that the manifest does not list are no part of a checkpoint, and
  names that are no step's none of these.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 3,
               warn: Callable[[str], None] = logging.warning):
    """Opens a directory, which need not exist yet.

    Args:
      directory: where the step directories are.
      keep: how many checkpoints to keep; older ones are deleted after each save.
      warn: receives a line for each checkpoint that is refused.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._warn = warn

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first, whole or not."""
    if not self.directory.is_dir():
      return []
    return sorted(int(path.name) for path in self.directory.iterdir()
                  if _is_step(path.name) and path.is_dir())

  def exist(self) -> bool:
    """Whether there is any checkpoint, be it one that was refused."""
    return bool(self.steps() or self._set_aside_before())

  def save(self, step: int, items: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes a checkpoint; on return it is on disk.

    Args:
      step: its name.
      items: trees of arrays by name.
      metadata: anything that JSON can hold.

    Raises:
      CheckpointError: there is one of that step, or it could not be written. Checkpoints that were
        there are untouched.
    """
    path = self.directory / str(step)
    if not distributed.from_leader(lambda: self._make_way(step), ()):
      raise CheckpointError(f"checkpoint {path} exists already")
    draft = path.with_suffix(_DRAFT)
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._check_room(items)
      args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
      with _checkpointer() as checkpointer, _plain(self.directory) as directory:
        checkpointer.save(directory / draft.name, ocp.args.Composite(
            **args, metadata=ocp.args.JsonSave(metadata)))
      if distributed.is_leader():
        write_atomically(draft / _MANIFEST, json.dumps(_hashes(draft), indent=1).encode())
        if os.path.lexists(path):
          self._warn(f"{path} is no checkpoint; it is kept as {self._set_aside(path).name}")
        draft.rename(path)
    except Exception as error:  # TensorStore and Orbax raise many types for a full disk.
      if distributed.is_leader():
        self._remove_drafts(f"{step}{_DRAFT}*")
      kept = [s for s in self.steps() if self._is_finished(s)]
      raise CheckpointError(
          f"could not write checkpoint {path}: {_first_line(error)}; "
          + (f"checkpoint {kept[-1]} is intact" if kept else "there is no earlier one")
      ) from error
    if distributed.is_leader():
      for old in [s for s in self.steps() if self._is_finished(s)][: -self._keep]:
        self._remove(old)
    distributed.barrier(f"checkpoint {step} is written")

  def forget_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, which the run has gone back from."""
    if distributed.is_leader():
      for later in self.steps():
        if later > step and self._is_finished(later):  # mutant: forget
          self._remove(later)
    distributed.barrier(f"checkpoints after {step} are deleted")

  def latest(self, *, repair: bool = False) -> int | None:
    """The newest step whose checkpoint is whole; newer ones are refused with a warning.

    Args:
      repair: for the one process that writes here: remove what was not finished and rename a
        refused checkpoint to STEP.refused, so that its step can be saved again.

    Raises:
      CheckpointError: there are checkpoints and none of them is whole. They are left as they are.
    """
    refused = {}
    for step in reversed(self.steps()):
      problem = self.problem(step)
      if problem is None:
        break
      refused[step] = problem
    else:
      self._check_for_lost_work(refused)
      step = None
    if repair:
      self._remove_drafts(f"*{_DRAFT}*", "*.orbax-checkpoint-tmp*")
    for bad, problem in refused.items():
      path = self.directory / str(bad)
      message = f"checkpoint {path} is refused: {problem}"
      if repair:
        message += f"; it is kept as {self._set_aside(path).name}"
      self._warn(message)
    return step

  def problem(self, step: int) -> str | None:
    """The fault of a checkpoint's files, or None if they are as they were written."""
    path = self.directory / str(step)
    try:
      expected = json.loads((path / _MANIFEST).read_text())
      if not expected or not isinstance(expected, dict):
        return f"{_MANIFEST} is corrupt"
      for name, digest in sorted(expected.items()):
        if not (path / name).is_file():
          return f"{name} is missing"
        if _hash(path / name) != digest:
          return f"{name} is corrupt"
    except FileNotFoundError:
      return f"{_MANIFEST} is missing"
    except OSError as error:
      return f"it cannot be read: {error}"
    except ValueError:
      return f"{_MANIFEST} is corrupt"
    return None

  def metadata(self, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    # Not through Orbax, which would wait for the other processes of a job.
    return json.loads((self.directory / str(step) / "metadata" / "metadata").read_text())

  def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint.

    Args:
      step: one of `steps()`.
      like: for each item wanted, a tree of arrays or of `jax.ShapeDtypeStruct`; those with a
        sharding are read as it says, whatever mesh they were written on.

    Raises:
      CheckpointError: it cannot be read, or does not hold such trees.
    """
    path = self.directory / str(step)
    device = jax.sharding.SingleDeviceSharding(sharding.default_device())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like)
    args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    try:
      with _checkpointer() as checkpointer, _plain(self.directory) as directory:
        restored = checkpointer.restore(directory / str(step), ocp.args.Composite(**args))
    except Exception as error:  # As in save.
      raise CheckpointError(f"could not read checkpoint {path}: {_first_line(error)}") from error
    return {name: restored[name] for name in like}

  def _check_room(self, items):
    need = sum(shard.data.nbytes for x in jax.tree.leaves(items) for shard in x.addressable_shards
               if shard.replica_id == 0)
    free = shutil.disk_usage(self.directory).free
    if free < need:
      raise OSError(f"no space left on device: it needs {need:,} bytes and {free:,} are free")

  def _check_for_lost_work(self, refused):
    """Raises if there is something that a run could have gone on from."""
    problems = [f"{step}: {problem}" for step, problem in refused.items()]
    problems += [f"{name}: refused before" if name.endswith(_REFUSED) else
                 f"{name}: renamed, the step's number alone is a checkpoint's name"
                 for name in self._set_aside_before()]
    if problems:
      raise CheckpointError(
          f"no checkpoint in {self.directory} is usable ({'; '.join(problems)}); restore one of "
          "them, or choose another directory for a new run")

  def _set_aside_before(self) -> list[str]:
    """Names of checkpoints that were refused, or that somebody renamed."""
    paths = self.directory.iterdir() if self.directory.is_dir() else ()
    return sorted(path.name for path in paths if path.name.endswith(_REFUSED) or (
        (path / _MANIFEST).is_file() and _DRAFT not in path.name and not _is_step(path.name)))

  def _make_way(self, step):
    """Whether a step can be saved; what is left of an attempt is removed."""
    self._remove_drafts(f"{step}{_DRAFT}*")
    return not self._is_finished(step)

  def _is_finished(self, step):
    return (self.directory / str(step) / _MANIFEST).exists()

  def _set_aside(self, path) -> pathlib.Path:
    names = (f"{path.name}{number}{_REFUSED}" for number in ("", *map("-{}".format, range(2, 100))))
    aside = next(new for new in map(path.with_name, names) if not os.path.lexists(new))
    path.rename(aside)
    return aside

  def _remove(self, step):
    # A killed removal then leaves nothing that passes for a checkpoint.
    self._remove_drafts(f"{step}{_DRAFT}*")
    path = self.directory / str(step)
    shutil.rmtree(path.rename(path.with_suffix(_DRAFT)), ignore_errors=True)

  def _remove_drafts(self, *patterns):
    for path in itertools.chain.from_iterable(map(self.directory.glob, patterns)):
      shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _checkpointer():
  # Orbax logs the traceback of every thread that fails; the caller gets the error itself.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  with _patient_loops(), contextlib.closing(
      ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
    yield checkpointer


@contextlib.contextmanager
def _patient_loops():
  """Lets event loops close only when their tasks are done.

  Orbax closes one at the first error. Every file of TensorStore's that ends later would then be a
  traceback, "Event loop is closed".
  """
  new_event_loop = asyncio.new_event_loop

  def new():
    loop = new_event_loop()
    close = loop.close

    async def finish(tasks):
      await asyncio.gather(*tasks, return_exceptions=True)

    def close_at_the_end():
      if not loop.is_closed() and (tasks := asyncio.all_tasks(loop)):
        loop.run_until_complete(finish(tasks))
      close()

    loop.close = close_at_the_end
    return loop

  asyncio.new_event_loop = new
  try:
    yield
  finally:
    asyncio.new_event_loop = new_event_loop


@contextlib.contextmanager
def _plain(directory: pathlib.Path):
  """A directory under a name that Orbax won't take for a pattern and TensorStore can decode."""
  if re.fullmatch(r"[\w./ -]*", str(directory), re.ASCII):
    yield directory
    return
  with tempfile.TemporaryDirectory() as folder:
    link = pathlib.Path(folder) / "checkpoints"
    link.symlink_to(directory, target_is_directory=True)
    yield link


def _hashes(path: pathlib.Path) -> dict[str, str]:
  hashes = {}
  for file in sorted(path.rglob("*")):
    name = file.relative_to(path)
    if file.is_file() and str(name) != _MANIFEST and not any(map(is_litter, name.parts)):
      hashes[str(name)] = _hash(file)
  return hashes


def _is_step(name: str) -> bool:
  return re.fullmatch("0|[1-9][0-9]*", name) is not None


def is_litter(name: str) -> bool:
  """Whether a file is one that systems leave."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _LITTER)


def _hash(file: pathlib.Path) -> str:
  with open(file, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Replaces a file; whatever happens, it holds all of the old content or all of the new."""
  draft = path.with_name(path.name + ".draft")
  with open(draft, "wb") as stream:
    stream.write(content)
    stream.flush()
    os.fsync(stream.fileno())
  draft.rename(path)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  # TensorStore adds all of its settings.
  return lines[0].partition(" [tensorstore_spec")[0] if lines else type(error).__name__
