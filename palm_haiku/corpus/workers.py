"""The processes that tokenise: each takes a unit at a time, and leaves a note when it is done."""

import array
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from palm_haiku import data
from palm_haiku.checkpoint import write_atomically
from palm_haiku.corpus import arrange, shards, sources
from palm_haiku.corpus.shards import SPLITS, UNFINISHED

_REPORT_BYTES = 2**20  # of text between two reports of a process
_SHOW_SECONDS = 0.5
_HALVES = struct.Struct("<QQ")  # of a document's hash, to find equal ones
# Checksums of documents that are much alike are far from uniform; times this, modulo 2^64, they
# are as uniform as those of any. SHA-256 would take 3 us a document, as long as reading it.
_MIX = 0x9E3779B97F4A7C15


@dataclasses.dataclass
class Progress:
  """Progress of a tokenisation."""

  stage: str  # "encode" or "arrange"
  total_bytes: float  # of the sources
  before_bytes: float  # of the sources, whose units an earlier attempt has done
  done_bytes: float  # of the sources, whose units are done
  text_bytes: int = 0  # of the documents that were read now, unpacked
  seconds: float = 0.0

  @property
  def speed(self) -> float:
    """Bytes of text a second."""
    return self.text_bytes / max(self.seconds, 1e-9)

  @property
  def seconds_left(self) -> float | None:
    """At the speed so far; None before a unit is done."""
    now = self.done_bytes - self.before_bytes
    return (self.total_bytes - self.done_bytes) * self.seconds / now if now else None


def is_held_out(text: bytes, limit: int) -> bool:
  """Whether a document is held out, if `limit` / 2^64 of all documents are."""
  return zlib.crc32(text) * _MIX % 2**64 < limit


class Worker:
  """The work on one unit or shard, in whatever process."""

  def __init__(self, job: "Job", report: Callable[[int], None]):
    """Loads the tokenizer.

    Args:
      job: what is to be done.
      report: receives the bytes of text that were read since the last time, now and then.
    """
    self.settings, self.out, self.units, self.report = job.settings, job.out, job.units, report
    self.draft = job.out / UNFINISHED
    self.tokenizer = data.load_tokenizer(job.tokenizer)
    self.dtype = shards.token_dtype(self.tokenizer)

  def encode(self, number: int) -> dict[str, Any]:
    """Tokenises a unit; returns its note."""
    settings, encode, loses = self.settings, self.tokenizer.encode, False
    keeps, dedupe, unread = self.tokenizer.keeps_newlines, self.settings.dedupe, 0
    hashes = [array.array("Q") for _ in SPLITS]
    limit = int(settings.held_out * 2**64)
    with self._writers(self.draft if settings.arranges else self.out, number) as writers:
      add = [writers[split].add for split in SPLITS]
      for piece, _ in self.units[number]:
        for text in sources.documents(piece, settings.field):
          split, size = is_held_out(text, limit), len(text)
          add[split](encode(text), size)
          if dedupe:
            hashes[split].extend(_HALVES.unpack_from(hashlib.sha256(text).digest()))
          loses = loses or not keeps and b"\n" in text
          unread += size
          if unread >= _REPORT_BYTES:
            self.report(unread)
            unread = 0
      self.report(unread)
      if dedupe:
        for split, values in zip(SPLITS, hashes):
          shards.write_array(arrange.hashes_file(self.draft, split, number),
                             np.array(values, np.uint64).reshape(-1, 2))
      note = {"loses_newlines": loses} | _closed(writers)
    return self._noted("encode", number, note)

  def arrange(self, number: int) -> dict[str, Any]:
    """Writes a shard of each part from the units; returns its note."""
    units = len(self.units)
    notes = [note for unit in range(units) if (note := read_note(self.draft, "encode", unit))]
    with self._writers(self.out, number) as writers:
      for split in SPLITS:
        source = shards.Tokens(self.draft, [note[split] for note in notes if note[split]],
                               self.dtype)
        arrange.gather(source, split, number, arrange.num_shards(units, self.settings.shuffle),
                       self.settings.shuffle, writers[split], self.report)
      note = _closed(writers)
    return self._noted("arrange", number, note)

  def _noted(self, stage, number, note):
    write_atomically(_note_path(self.draft, stage, number), json.dumps(note).encode())
    return note

  @contextlib.contextmanager
  def _writers(self, folder, number):
    with contextlib.ExitStack() as stack:
      yield {split: stack.enter_context(shards.ShardWriter(
          folder / f"{split}-{number:05d}", self.dtype, self.tokenizer.eod)) for split in SPLITS}


def _closed(writers) -> dict[str, Any]:
  """The entries of the shards that hold anything."""
  return {split: writer.close() for split, writer in writers.items()}


@dataclasses.dataclass(frozen=True)
class Job:
  """A corpus to be made, in a form that other processes can be given."""

  settings: Any  # `build.Settings`
  tokenizer: str
  out: pathlib.Path
  units: list[list[tuple[sources.Piece, int]]]  # with their sizes in bytes

  def run(self, stage: str, sizes: Sequence[float], workers: int,
          show: Callable[[Progress], None]) -> list[dict[str, Any]]:
    """Does what is still to be done of a stage; returns all notes.

    Args:
      stage: "encode" or "arrange", a method of `Worker`.
      sizes: bytes of each unit or shard, to tell how far the work is.
      workers: processes; 1 for this one alone.
      show: called now and then.
    """
    notes = {k: note for k in range(len(sizes))
             if (note := read_note(self.out / UNFINISHED, stage, k)) is not None}
    before = sum(sizes[k] for k in notes)
    progress = Progress(stage, sum(sizes), before, before)
    wanted = [k for k in range(len(sizes)) if k not in notes]
    start = time.perf_counter()

    def tell(text_bytes):
      progress.text_bytes, progress.seconds = text_bytes, time.perf_counter() - start
      progress.done_bytes = sum(sizes[k] for k in notes)
      show(progress)

    do = self._here if min(workers, len(wanted)) <= 1 else self._in_processes
    do(stage, wanted, workers, notes, tell)
    return [notes[k] for k in range(len(sizes))]

  def _here(self, stage, wanted, _, notes, tell):
    shown, text_bytes = time.perf_counter(), 0

    def report(count):
      nonlocal shown, text_bytes
      text_bytes += count
      if time.perf_counter() - shown > _SHOW_SECONDS:
        tell(text_bytes)
        shown = time.perf_counter()

    if wanted:
      worker = Worker(self, report)
      for number in wanted:
        notes[number] = getattr(worker, stage)(number)
    tell(text_bytes)

  def _in_processes(self, stage, wanted, workers, notes, tell):
    context = _processes()
    counter, stop = context.Value("q"), context.Event()
    with futures.ProcessPoolExecutor(
        min(workers, len(wanted)), context, _start, (self, counter, stop)) as pool:
      try:
        running = {pool.submit(_do, stage, number): number for number in wanted}
        while running:
          done, _ = futures.wait(running, _SHOW_SECONDS, futures.FIRST_COMPLETED)
          for future in done:
            number = running.pop(future)
            notes[number] = future.result()
          tell(counter.value)
      except BrokenProcessPool as error:
        raise OSError("a process that tokenised was killed, perhaps for want of memory; the same "
                      "command goes on, with fewer --workers if need be") from error
      finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _processes():
  """The start method of processes: forks of one that has imported this, or else spawned."""
  if "forkserver" not in multiprocessing.get_all_start_methods():
    return multiprocessing.get_context("spawn")
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])
  return context


_worker: Worker  # of a process of the pool


def _start(job, counter, stop):
  """Makes a process ready, which ends with the one that started it."""
  global _worker
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for the process that waits
  threading.Thread(target=_end_with_parent, daemon=True).start()
  pending = 0

  def report(count):
    nonlocal pending
    pending += count
    if pending >= _REPORT_BYTES:
      with counter.get_lock():
        counter.value += pending
      pending = 0
      if stop.is_set():
        raise InterruptedError("the work was called off")

  _worker = Worker(job, report)


def _end_with_parent():
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
  os._exit(1)


def _do(stage, number):
  return getattr(_worker, stage)(number)


def read_note(draft: pathlib.Path, stage: str, number: int) -> dict[str, Any] | None:
  """The note of a finished unit or shard; None where it is not finished."""
  path = _note_path(draft, stage, number)
  return json.loads(path.read_text()) if path.exists() else None


def _note_path(draft, stage, number):
  return draft / f"{stage}-{number:05d}.json"
