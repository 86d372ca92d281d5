"""Text to shards, in many processes: resumable, and the same bytes however it went.

Each unit of the sources becomes a shard of every part, written under another name and then renamed;
a note of it, written last, is what counts as done. The index is written when all are.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from palm_haiku import data
from palm_haiku.checkpoint import is_litter, write_atomically
from palm_haiku.corpus import arrange, shards, sources
from palm_haiku.corpus.shards import SPLITS, UNFINISHED, DataError
from palm_haiku.corpus.workers import Job, Progress

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides the bytes of a corpus, beside its sources' content and tokenizer.

  Raises:
    ValueError: a value out of range.
  """

  sources: tuple[str, ...]
  field: str | None = None  # of JSON lines and Parquet; None for "text"
  held_out: float = 0.01  # share of the documents, chosen by their hash
  shuffle: int | None = None  # seed; None leaves documents in their order
  dedupe: bool = False  # keep the first of equal documents
  unit_bytes: int = 2**26  # of the sources, about, in a shard

  def __post_init__(self):
    if not 0 <= self.held_out < 1:
      raise ValueError(f"held_out must be in [0, 1); got {self.held_out}")
    if self.unit_bytes < 1:
      raise ValueError(f"unit_bytes must be at least 1; got {self.unit_bytes}")
    if self.shuffle is not None and not 0 <= self.shuffle < 2**32:
      raise ValueError(f"shuffle must be from 0 to 2^32 - 1; got {self.shuffle}")

  @property
  def arranges(self) -> bool:
    """Whether documents move after they are tokenised."""
    return self.dedupe or self.shuffle is not None


def build(settings: Settings, tokenizer_name: str, out: str | os.PathLike, *, workers: int = 1,
          show: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
  """Tokenises a corpus; goes on where an earlier attempt with the same settings ended.

  Args:
    settings: of the corpus.
    tokenizer_name: see `data.load_tokenizer`.
    out: a new directory, or that of an earlier attempt.
    workers: processes; 1 for this one alone.
    show: called now and then.

  Returns:
    The index.

  Raises:
    ValueError: sources that can't be read, or a directory that holds something else.
    OSError: no room, or no permission.
  """
  out = pathlib.Path(os.path.expanduser(out))
  tokenizer = data.load_tokenizer(tokenizer_name)
  # A source may be a directory that `out` is in.
  files = [path for path in sources.find(settings.sources)
           if path == sources.PYDOC
           or not pathlib.Path(path).resolve().is_relative_to(out.resolve())]
  units = sources.units(files, settings.field, settings.unit_bytes)
  states = [[path, *_state(path)] for path in files]
  plan = {"settings": dataclasses.asdict(settings), "tokenizer": tokenizer.fingerprint,
          "files": states}
  plan = json.loads(json.dumps(plan))  # as it is read again: lists for tuples
  named = hashlib.sha256(json.dumps(states).encode()).hexdigest()
  said = plan["settings"] | {"tokenizer": tokenizer.fingerprint, "files": named}
  if (out / shards.INDEX).exists():
    index = shards.read_index(out)
    if index["settings"] == said:
      shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # of a process killed at its very end
      return index
    raise ValueError(f"{out} holds a corpus already, of other sources or settings; choose another "
                     "--out")
  with _locked(out, plan) as draft:
    if tokenizer.serialized:
      write_atomically(out / shards.TOKENIZER, tokenizer.serialized)
    job = Job(settings, tokenizer_name, out, units)
    sizes = [sum(size for _, size in unit) for unit in units]
    notes = job.run("encode", sizes, workers, show)
    loses_newlines = any(note["loses_newlines"] for note in notes)
    if settings.dedupe:
      arrange.mark_duplicates(draft, len(units))
    if settings.arranges:
      text = [sum(note[split]["bytes"] for split in SPLITS if note[split]) for note in notes]
      count = arrange.num_shards(len(units), settings.shuffle)
      notes = job.run("arrange", [sum(text) / count] * count, workers, show)
    entries = {split: arrange.entries(notes, split) for split in SPLITS}
    if not entries["train"]:
      _discard(out)
      names = ", ".join(settings.sources)
      raise DataError(f"every document of {names} is held out; name a smaller share with --held-out"
                      if entries["held_out"] else f"{names} is empty")
    index = shards.write_index(out, tokenizer, said, entries, loses_newlines)
    shutil.rmtree(draft)
  return index


def _discard(out):
  """Deletes what a corpus that comes to nothing has left."""
  for pattern in (shards.TOKENIZER, *(f"{split}-*" for split in SPLITS)):
    for path in out.glob(pattern):
      path.unlink()
  shutil.rmtree(out / UNFINISHED)


def _state(path) -> tuple[int, int]:
  """Size and time of change: whether a file is still the one that was read."""
  if not os.path.isfile(path):
    return 0, 0
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _locked(out, plan):
  """The folder of the unfinished work, which one process at a time has."""
  draft = out / UNFINISHED
  if os.path.lexists(out) and not out.is_dir():
    raise ValueError(f"{out} is no directory; choose another --out")
  others = [] if (draft / _PLAN).exists() or not out.exists() else [
      path.name for path in out.iterdir() if path.name != UNFINISHED and not is_litter(path.name)]
  if others:
    raise ValueError(f"{out} holds {min(others)} and is no corpus; choose another --out")
  draft.mkdir(parents=True, exist_ok=True)
  with _exclusive(draft / "lock", f"{out} is in use: another process tokenises there"):
    if (draft / _PLAN).exists():
      before = json.loads((draft / _PLAN).read_text())
      if before != plan and any(draft.glob("encode-*.json")):
        raise ValueError(
            f"{out} holds the beginning of another corpus: {_difference(before, plan)} changed "
            "since; delete it, or choose another --out")
      if before != plan:  # an attempt that failed before anything was done
        _discard(out)
        draft.mkdir()
    if not (draft / _PLAN).exists():
      write_atomically(draft / _PLAN, json.dumps(plan).encode())
    yield draft


def _difference(before, plan) -> str:
  settings = [name for name, value in plan["settings"].items()
              if before["settings"].get(name) != value]
  return ", ".join(settings + [name for name in ("tokenizer", "files")
                               if before[name] != plan[name]])


@contextlib.contextmanager
def _exclusive(path, message):
  """Holds a lock of the operating system, which ends with the process however that ends."""
  with open(path, "w") as stream:
    try:
      if fcntl is not None:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      raise ValueError(f"{message}; wait for its end, or choose another --out") from error
    except OSError:  # a file system without locks
      pass
    yield
