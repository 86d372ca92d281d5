import os
import re
import shutil
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import checkpoint
from palm_haiku.checkpoint import CheckpointError, Checkpoints


def items(value):
  return {"params": {"palm/layers": {"w": jnp.full((3, 2), float(value))}},
          "opt_state": (jnp.int32(value), {"mu": jnp.arange(4.0)})}


def saved(path, steps, **options):
  warnings = []
  checkpoints = Checkpoints(path, warn=warnings.append, **options)
  for step in steps:
    checkpoints.save(step, items(step), {"step": step, "config": {"dim": [1, 2]}})
  return checkpoints, warnings


def test_round_trip(tmp_path):
  checkpoints, warnings = saved(tmp_path / "a" / "b", [0, 10])
  assert checkpoints.latest() == 10 and not warnings
  chex.assert_trees_all_equal(checkpoints.restore(10, items(0)), items(10))
  assert checkpoints.metadata(0) == {"step": 0, "config": {"dim": [1, 2]}}
  only = checkpoints.restore(0, {"params": items(0)["params"]})
  chex.assert_trees_all_equal(only, {"params": items(0)["params"]})


@pytest.mark.parametrize("name", ["[lr=3e-3] a", "[!b]*?", "é%20", os.fsdecode(b"\xff")])
def test_any_name_of_a_directory(tmp_path, name):
  # Orbax looks for its files by patterns; TensorStore decodes names.
  checkpoints, _ = saved(tmp_path / name, [1])
  chex.assert_trees_all_equal(checkpoints.restore(1, items(0)), items(1))
  (checkpoints.directory / "\u00b2").mkdir()  # a digit, but no number
  assert checkpoints.steps() == [1]


def test_an_existing_step_is_refused_and_kept(tmp_path):
  checkpoints, warnings = saved(tmp_path, [1])
  with pytest.raises(CheckpointError, match=f"^checkpoint {tmp_path / '1'} exists already$"):
    checkpoints.save(1, items(2), {})
  assert checkpoints.latest() == 1 and not warnings
  chex.assert_trees_all_equal(checkpoints.restore(1, items(0)), items(1))


def test_keeps_the_newest(tmp_path):
  checkpoints, _ = saved(tmp_path, [1, 2, 3, 10], keep=2)
  assert checkpoints.steps() == [3, 10]


def test_later_checkpoints_are_forgotten(tmp_path):
  checkpoints, _ = saved(tmp_path, [1, 2, 3])
  checkpoints.forget_after(2)
  assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2


def test_an_empty_directory_has_none(tmp_path):
  assert Checkpoints(tmp_path / "absent").latest(repair=True) is None
  assert Checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize("damage", [
    "one bit", *(pytest.param(x, marks=pytest.mark.full) for x in ("cut short", "deleted"))])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(tmp_path, damage):
  original, _ = saved(tmp_path / "original", [1, 2])
  files = sorted(file.relative_to(original.directory / "2")
                 for file in (original.directory / "2").rglob("*") if file.is_file())
  assert len(files) > 5
  for number, file in enumerate(files):
    copy = shutil.copytree(original.directory, tmp_path / str(number))
    victim = copy / "2" / file
    content = victim.read_bytes()
    if damage == "cut short":
      victim.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
      victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
    else:
      victim.unlink()
    warnings = []
    checkpoints = Checkpoints(copy, warn=warnings.append)
    assert checkpoints.latest() == 1, file
    assert len(warnings) == 1 and str(copy / "2") in warnings[0] and "refused" in warnings[0]
    assert checkpoints.steps() == [1, 2]  # Only the writer changes anything.
    assert checkpoints.latest(repair=True) == 1 and checkpoints.steps() == [1]
    checkpoints.save(2, items(2), {})
    assert checkpoints.latest() == 2


def test_a_half_written_checkpoint_is_refused(tmp_path, monkeypatch):
  checkpoints, _ = saved(tmp_path, [1])

  class Killed(BaseException):
    pass

  def die(*_):
    raise Killed

  monkeypatch.setattr(checkpoint, "write_atomically", die)
  with pytest.raises(Killed):
    checkpoints.save(2, items(2), {})
  assert checkpoints.latest() == 1 and checkpoints.steps() == [1]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.unfinished"]
  with pytest.raises(Killed):  # again, and the first attempt is not in the way
    checkpoints.save(2, items(2), {})
  assert checkpoints.latest(repair=True) == 1 and [tmp_path / "1"] == list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
  checkpoints, _ = saved(tmp_path, [1])
  need = sum(x.nbytes for x in jax.tree.leaves(items(2)))
  disk = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=need))
  checkpoints._check_room(items(2))
  monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=need - 1))
  with pytest.raises(CheckpointError, match="no space left.*checkpoint 1 is intact") as error:
    checkpoints.save(2, items(2), {})
  assert "\n" not in str(error.value)
  assert checkpoints.steps() == [1] and checkpoints.latest() == 1


def test_a_failed_write_loses_nothing(tmp_path, monkeypatch):
  checkpoints, _ = saved(tmp_path, [1])

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "write_atomically", fail)
  with pytest.raises(CheckpointError, match="No space left on device; checkpoint 1 is intact"):
    checkpoints.save(2, items(2), {})
  assert checkpoints.steps() == [1]
  assert not [path for path in tmp_path.iterdir() if path.name != "1"]


def test_a_failed_write_leaves_no_traceback(tmp_path, monkeypatch, limit_files):
  """Nor do the writes of other arrays, which go on and fail after the first error."""
  checkpoints, _ = saved(tmp_path, [])
  random = np.random.default_rng(0)  # or TensorStore would compress them
  many = {"params": {str(i): jnp.asarray(random.normal(size=10_000)) for i in range(8)}}
  tracebacks = []
  monkeypatch.setattr(sys, "unraisablehook", tracebacks.append)
  limit_files(20_000)
  with pytest.raises(CheckpointError, match="could not write"):
    checkpoints.save(1, many, {})
  limit_files(None)
  time.sleep(0.05)
  assert tracebacks == []


def test_other_shapes_are_refused(tmp_path):
  checkpoints, _ = saved(tmp_path, [1])
  with pytest.raises(CheckpointError, match="could not read checkpoint"):
    checkpoints.restore(1, {"params": {"palm/layers": {"w": jnp.zeros((4, 2))}}})


LITTER = (".DS_Store", "._1", "Thumbs.db", "desktop.ini", ".nfs0000001", "manifest.json~", ".m.swp")


def test_litter_is_no_part_of_a_checkpoint(tmp_path):
  checkpoints, warnings = saved(tmp_path, [1, 2], keep=2)
  for folder in (tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())):
    for name in LITTER:
      (folder / name).write_text("litter")
    (folder / "__MACOSX").mkdir()
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir/a").write_text("litter")
  for name in ("007", "\u00b2", "\u0663", "-1", "5 copy"):  # The second and third are digits.
    (tmp_path / name).mkdir()
  (tmp_path / "3").write_text("a file")
  # Nor would a manifest list what may be gone the next moment.
  for name in checkpoint._hashes(tmp_path / "2"):
    assert not name.split("/")[-1].startswith((".DS", "._", ".nfs", "Thumbs", "desktop")), name
    assert "@eaDir" not in name
  assert checkpoints.steps() == [1, 2]
  assert checkpoints.latest() == checkpoints.latest(repair=True) == 2 and not warnings
  chex.assert_trees_all_equal(checkpoints.restore(2, items(0)), items(2))
  checkpoints.save(3, items(3), {})
  assert checkpoints.steps() == [2, 3] and checkpoints.latest() == 3
  assert warnings == [f"{tmp_path / '3'} is no checkpoint; it is kept as 3.refused"]
  assert (tmp_path / "3.refused").read_text() == "a file"


def test_a_directory_named_like_a_step_costs_no_checkpoint(tmp_path):
  checkpoints, warnings = saved(tmp_path, [1, 2], keep=2)
  for name in ("7", "8", "9"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text(name)
  checkpoints.save(3, items(3), {})
  checkpoints.forget_after(2)
  assert checkpoints.steps() == [2, 7, 8, 9]
  assert checkpoints.latest(repair=True) == 2
  assert [line.split(" is refused: ")[1] for line in warnings] == [
      f"manifest.json is missing; it is kept as {step}.refused" for step in (9, 8, 7)]
  assert (tmp_path / "9.refused" / "notes").read_text() == "9"


def test_where_no_checkpoint_is_usable_nothing_is_touched(tmp_path):
  checkpoints, warnings = saved(tmp_path, [1, 2])
  (tmp_path / "1" / "manifest.json").write_text("{}")
  (tmp_path / "2" / "manifest.json").unlink()
  before = sorted(tmp_path.rglob("*"))
  for repair in (False, True):
    with pytest.raises(CheckpointError, match="is usable .2: manifest.json is missing; 1: "
                       "manifest.json is corrupt.; restore one") as error:
      checkpoints.latest(repair=repair)
    assert "\n" not in str(error.value)
  assert sorted(tmp_path.rglob("*")) == before and not warnings
  # Nor where all of them were refused before.
  for step in (1, 2):
    (tmp_path / str(step)).rename(tmp_path / f"{step}.refused")
  with pytest.raises(CheckpointError, match="1.refused: refused before; 2.refused"):
    checkpoints.latest(repair=True)


@pytest.mark.parametrize("name", ["1 (copy)", "01", "step_1", "1.bak"])
def test_renamed_checkpoints_are_not_begun_anew(tmp_path, name):
  checkpoints, _ = saved(tmp_path, [1])
  (tmp_path / "1").rename(tmp_path / name)
  assert checkpoints.exist()
  with pytest.raises(CheckpointError, match=re.escape(name) + ": renamed"):
    checkpoints.latest(repair=True)
