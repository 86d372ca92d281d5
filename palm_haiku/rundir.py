"""The directory of a run: whose it is, who trains in it, and what it keeps beside checkpoints."""

import json
import logging
import os
import pathlib
import socket
from collections.abc import Callable
from typing import Any

import jax

from palm_haiku import data, runlog, train_step
from palm_haiku.checkpoint import Checkpoints, is_litter, write_atomically
from palm_haiku.recipe import load_config

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

CONFIG = "config.json"  # the settings of a run, for the time when it has no checkpoint
TOKENIZER = "tokenizer.model"  # a copy of the run's SentencePiece model
_LOCK, _HOLDER = "lock", "process "  # the file, and how what is in it begins
# A directory with no more than this and litter is as good as empty: that of a file system, or of a
# run that died as it began.
_NOTHING = ("lost+found", _LOCK, CONFIG + ".draft")


class RunDirectory:
  """The directory of a run.

  One process at a time trains in it, in a job of several the leader for all of them. It holds a
  lock of the operating system, which ends with the process however that ends.

  As a context: the lock is released at the end.
  """

  def __init__(self, path: str | os.PathLike, warn: Callable[[str], None] = logging.warning):
    """Names a directory, which need not exist yet.

    Args:
      path: of the directory; `~` is the home directory.
      warn: receives a line for each checkpoint that is refused.
    """
    self.path = pathlib.Path(os.path.expanduser(path))
    self.checkpoints = Checkpoints(self.path / "checkpoints", warn=warn)
    self._warn = warn
    self._lock = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._lock is not None:
      self._lock.close()

  def settings(self) -> dict[str, Any] | None:
    """Metadata with the "config" that the run would go on with; None for no run.

    Raises:
      ValueError: another process trains here, or it is no run's directory.
      CheckpointError: no checkpoint is usable.
    """
    if (self.path / _LOCK).exists():
      with RunDirectory(self.path, self._warn) as other:
        other._acquire()
    if not self._is_run():
      return None
    # Refused checkpoints are reported when the run resumes.
    step = Checkpoints(self.checkpoints.directory, warn=lambda line: None).latest()
    return {"config": self._config()} if step is None else self.checkpoints.metadata(step)

  def open(self, resume: bool) -> dict[str, Any] | None:
    """Metadata of the checkpoint to go on from; None to begin.

    Locks the directory if it holds a run. Where it does not, nothing is written.

    Raises:
      ValueError, CheckpointError: as `settings`; or there is a run and `resume` is false.
    """
    if not self._is_run():
      return None
    self._acquire()
    if not resume:
      if self.checkpoints.exist() or (self.path / runlog.METRICS).exists():
        raise ValueError(f"{self.path} holds another run; continue it with --resume, or choose "
                         "another --out")
      return None
    step = self.checkpoints.latest(repair=True)
    if step is None:
      self._check_for_lost_work()
      return None
    self._set_damaged_settings_aside(step)
    metadata = self.checkpoints.metadata(step)
    if metadata["data_fingerprint"] is None:
      raise ValueError(f"{self.path} holds imported weights, without data and optimizer state to "
                       "go on with: sample from it with generate, or export it with convert --to")
    return metadata | {"step": step}

  def begin(self, config: dict[str, Any], tokenizer) -> None:
    """Locks the directory, if `open` has not, and writes settings and tokenizer."""
    if self._lock is None:
      self.path.mkdir(parents=True, exist_ok=True)
      self._acquire()
      if self._is_run():
        raise ValueError(f"another process has begun a run in {self.path} meanwhile")
    self.write_settings(config)
    self.keep(tokenizer)

  def write_settings(self, config: dict[str, Any]) -> None:
    """Replaces config.json."""
    write_atomically(self.path / CONFIG, json.dumps(config, indent=1).encode())

  def keep(self, tokenizer) -> None:
    """Copies a tokenizer that is a file."""
    if tokenizer.serialized:
      write_atomically(self.path / TOKENIZER, tokenizer.serialized)

  def tokenizer(self, name: str, metadata: dict[str, Any] | None = None):
    """The tokenizer of the run, wherever it is now.

    Args:
      name: see `data.load_tokenizer`. The name that the run was begun with stands for the copy that
        it keeps, and any other for a file that must be equal to that.
      metadata: of a checkpoint; None where there is none, and any tokenizer will do.

    Raises:
      ValueError: there is none, or only another one.
    """
    kept = str(self.path / TOKENIZER)
    fingerprint = metadata and metadata.get("tokenizer_fingerprint")
    if metadata is None or fingerprint is None:  # Runs did not always keep their tokenizer.
      there = name == "bytes" or os.path.exists(os.path.expanduser(name))
      names = [name] if there else [kept, name]
    else:
      names = [kept, name] if name == metadata["config"]["tokenizer"] else [name]
    problem = ""
    for name in names:
      if name != kept or os.path.exists(kept):
        try:
          tokenizer = data.load_tokenizer(name)
        except ValueError as error:
          problem = str(error)
          continue
        if fingerprint in (None, tokenizer.fingerprint):
          return tokenizer
        problem = f"{name} is not the tokenizer that {self.path} was trained with"
    raise ValueError(problem + ("; name its new place with --tokenizer" if metadata else ""))

  def load(self, like: Callable[[Any], Any] = lambda params: params) -> tuple[dict[str, Any], Any]:
    """Metadata and parameters of the newest checkpoint.

    Args:
      like: makes the types to restore, with shardings, of those without.

    Raises:
      ValueError, CheckpointError: there is none, or none is usable.
    """
    metadata = self.metadata()
    params = jax.eval_shape(lambda: train_step.init(load_config(metadata))).params
    return metadata, self.checkpoints.restore(
        metadata["step"], {"params": like(params)})["params"]

  def metadata(self) -> dict[str, Any]:
    """Metadata of the newest checkpoint; raises as `load`."""
    step = self.checkpoints.latest()
    if step is None:
      raise ValueError(f"{self.path} holds no checkpoint"
                       + (", nor the config.json of a model of the hub" if self.path.is_dir()
                          else ", for there is no such directory"))
    return self.checkpoints.metadata(step) | {"step": step}

  def _is_run(self) -> bool:
    """Whether it holds a run; raises ValueError if it holds something else."""
    if not os.path.lexists(self.path):
      parent = next(parent for parent in self.path.absolute().parents if os.path.lexists(parent))
      if not parent.is_dir():
        raise ValueError(f"{parent} is no directory; choose another --out")
      return False
    if not self.path.is_dir():
      raise ValueError(f"{self.path} is no directory; choose another --out")
    if self.checkpoints.exist():  # Each has the settings as well.
      return True
    if (self.path / CONFIG).exists():
      self._config()
      return True
    names = sorted(path.name for path in self.path.iterdir())
    if runlog.METRICS in names:
      raise ValueError(f"{self.path} holds the metrics of a run, but neither a checkpoint nor "
                       f"{CONFIG} to go on from; choose another --out")
    others = [name for name in names if name not in _NOTHING and not is_litter(name)
              or name == _LOCK and not self._is_own_lock()]
    if others:
      raise ValueError(f"{self.path} holds {others[0]} and is no run's directory; choose another "
                       "--out")
    return False

  def _config(self) -> dict[str, Any] | None:
    path = self.path / CONFIG
    if not path.exists():
      return None
    try:
      fields = json.loads(path.read_text())
      load_config({"config": fields})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      detail = f" ({error})" if isinstance(error, ValueError) else ""
      raise ValueError(f"{path} does not hold the settings of a run{detail}; choose another "
                       "--out") from error
    return fields

  def _set_damaged_settings_aside(self, step):
    try:
      self._config()
    except ValueError:
      path = self.path / CONFIG
      kept = path.rename(path.with_name(CONFIG + ".damaged"))
      self._warn(f"{path} is damaged; it is kept as {kept.name}, and the settings are those of "
                 f"checkpoint {step}")

  def _is_own_lock(self) -> bool:
    path = self.path / _LOCK
    return path.is_file() and path.read_bytes()[:len(_HOLDER)] in (b"", _HOLDER.encode())

  def _check_for_lost_work(self):
    """Raises if the metrics go beyond a checkpoint, of which there is none."""
    rows, config = runlog.read_metrics(self.path / runlog.METRICS), self._config()
    if rows and config and rows[-1]["step"] > load_config({"config": config}).checkpoint_every:
      raise ValueError(f"{self.path} was trained up to step {rows[-1]['step']}, but its "
                       "checkpoints are gone: restore them, or choose another --out for a new run")

  def _acquire(self):
    # Not to be deleted at the end: another process may have opened it by then.
    stream = open(self.path / _LOCK, "a+")
    try:
      if fcntl is not None:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # The latter on some network file systems.
      with stream:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
      raise ValueError(f"{self.path} is in use: {holder} trains there; wait for its end, or choose "
                       "another --out") from error
    except OSError as error:
      self._warn(f"{self.path} is on a file system without locks ({error.strerror}): see that "
                 "nothing else trains there")
    stream.truncate(0)
    stream.write(f"{_HOLDER}{os.getpid()} on {socket.gethostname()}")
    stream.flush()
    self._lock = stream
