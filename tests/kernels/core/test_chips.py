"""The table of chips is the only one, and a GPU without an entry takes its family's kernels."""

import ast
import dataclasses
import math
import pathlib
import re
import types

import jax
import numpy as np
import pytest

import palm_haiku
from palm_haiku import kernels, plan
from palm_haiku.kernels.aot import targets
from palm_haiku.kernels.attention import configs as attention
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.cross_entropy import configs as cross_entropy
from palm_haiku.kernels.decode import configs as decode
from palm_haiku.kernels.parallel_block import configs as parallel_block

ROOT = pathlib.Path(palm_haiku.__file__).resolve().parents[1]

QUOTED = re.compile("|".join(f'["\']{word}["\']' for chip in chips.CHIPS.values()
                             for word in (chip.name, chip.kind)), re.IGNORECASE)

# Names of chips without facts about them: block sizes, and measured runs.
NO_FACTS = ("configs.py", "hardware.py")


def chips_in(node) -> set[str]:
  """The chips that a displayed dict or a sequence of pairs has entries of."""
  words = {chip.name for chip in chips.CHIPS.values()}
  kinds = {chip.kind.lower(): chip.name for chip in chips.CHIPS.values()}
  keys = node.keys if isinstance(node, ast.Dict) else [
      pair.elts[0] for pair in getattr(node, "elts", ())
      if isinstance(pair, ast.Tuple | ast.List) and pair.elts]
  names = {key.value for key in keys
           if isinstance(key, ast.Constant) and isinstance(key.value, str)}
  return {name for name in names if name in words} | {
      kinds[name.lower()] for name in names if name.lower() in kinds}


def second_tables(tree) -> list[int]:
  """Lines of displays with entries of two chips or more."""
  return [node.lineno for node in ast.walk(tree)
          if isinstance(node, ast.Dict | ast.Tuple | ast.List) and len(chips_in(node)) > 1]


def test_there_is_one_table_of_chips():
  assert second_tables(ast.parse('PEAK = {"TPU v4": 275e12, "NVIDIA H200": 989e12}'))
  assert second_tables(ast.parse('VMEM = (("v4", 16), ("v5e", 128))'))
  found = []
  for path in (*ROOT.glob("kernels/**/*.py"), *ROOT.glob("palm_haiku/**/*.py")):
    text = path.read_text()
    if path.name not in (*NO_FACTS, "chips.py") and QUOTED.search(text):  # the rest need no parsing
      found += [f"{path}:{line}" for line in second_tables(ast.parse(text))]
  assert not found


def test_names_of_chips():
  for chip in chips.CHIPS.values():
    assert chips.name(chip.kind) == chips.name(chip.kind.upper()) == chip.name
    for variant in chip.variants:
      assert chips.name(f"{variant} of any memory") == chip.name
  assert chips.name("NVIDIA H200", "9.0") == "h200"
  assert chips.name("NVIDIA GeForce RTX 3090", "8.6") == "sm_86"
  assert chips.name("Tesla T4", "7.5") == "sm_75" and "sm_75" not in chips.ALL
  assert chips.name("AMD Instinct MI300X", "gfx942") is chips.name("cpu") is None


def test_peaks_are_those_of_one_device():
  assert chips.peak("NVIDIA H200") == 989e12 and chips.peak("TPU v5") == 459e12
  assert chips.peak("TPU7x") == 2307e12 / 2  # each of its cores is a device
  assert chips.peak("NVIDIA H100 PCIe") is chips.peak("cpu") is None  # a slower variant; none


def test_a_family_fits_in_its_shared_memory():
  # Of the CUDA C++ Programming Guide's table, in KiB, for a block.
  limits = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227,
            (10, 3): 227, (11, 0): 227, (12, 0): 99, (12, 1): 99}
  for gpu in chips.GPUS.values():
    assert gpu.shared_memory <= limits[gpu.capability] * 1024
    assert chips.CHIPS[gpu.like or gpu.name].shared_memory == gpu.shared_memory
    assert math.isnan(gpu.tflops) == (gpu.like is not None)


def test_every_op_has_block_sizes_for_every_chip():
  for name in chips.GPUS:
    assert attention.triton(name, 128) and cross_entropy.triton(name, 2)
    assert parallel_block.triton(name, 2, 512)
    assert decode.triton(name, 128, 16, np.dtype("float16"))
  for name in chips.HOPPER:
    assert attention.mosaic_gpu(name, 128) and cross_entropy.mosaic_gpu(name)
    assert parallel_block.mosaic_gpu(name) and decode.mosaic_gpu(name, 128, 2)
  for name in chips.TPUS:
    assert all(attention.mosaic_tpu(name, 128)) and all(cross_entropy.mosaic_tpu(name))
    assert all(parallel_block.mosaic_tpu(name))
    assert decode.mosaic_tpu(name, 1, 128).size >= decode.mosaic_tpu(name, 2, 128).size >= 4096


def test_a_new_chip_is_an_entry_and_the_block_sizes_that_it_has(monkeypatch):
  new = dataclasses.replace(chips.CHIPS["h200"], name="new", kind="NVIDIA New", like="h200")
  sizes = attention.HopperConfig(64, 2, 64)
  for table, entry in ((chips.ALL, new), (chips.GPUS, new)):
    monkeypatch.setitem(table, "new", entry)
  monkeypatch.setitem(attention.MOSAIC_GPU, ("new", 128), sizes)
  assert attention.mosaic_gpu("new", 128) == sizes
  assert attention.mosaic_gpu("new", 64) == attention.mosaic_gpu("h200", 64)
  assert cross_entropy.triton("new", 2) == cross_entropy.triton("h200", 2)
  assert kernels.explain("decode_attention", chip="new").implementation == "triton"


ATTENTION = [(1, 2048, 8, 128), (1, 2048, 1, 128)]


@pytest.fixture
def gpu_at_hand(monkeypatch):
  """gpu_at_hand(kind, capability): the default device."""
  def set_up(kind, capability):
    device = types.SimpleNamespace(
        platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    # Not about whether Triton is installed.
    monkeypatch.setattr(kernels.core.dispatch.triton_call, "problem", lambda: None)
  return set_up


@pytest.mark.parametrize("kind, capability, implementation, configs", [
    ("NVIDIA GeForce RTX 3090", "8.6", "triton", "rtx4090"),
    ("NVIDIA A10", "8.6", "triton", "rtx4090"), ("NVIDIA A30", "8.0", "triton", "a100"),
    ("NVIDIA L4", "8.9", "triton", "rtx4090"), ("NVIDIA GH200 480GB", "9.0", "mosaic_gpu", "h100"),
    ("NVIDIA GB200", "10.0", "triton", "b200"),
    ("NVIDIA GeForce RTX 5090", "12.0", "triton", "rtx4090")])
def test_a_gpu_without_an_entry_takes_its_familys_kernels(
    gpu_at_hand, kind, capability, implementation, configs):
  gpu_at_hand(kind, capability)
  name = "sm_" + capability.replace(".", "")
  choice = kernels.explain("flash_attention", *ATTENTION)
  assert choice.implementation == implementation
  assert f"the fused kernel for {name}, with the block sizes of {configs}" in choice.reason
  assert kernels.explain("flash_attention", *ATTENTION, chip=name) == choice
  # A mesh knows its devices by their kind alone.
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
  with jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
    assert kernels.explain("flash_attention", *ATTENTION) == choice
  for op, shapes in (("decode_attention", [(2, 1, 8, 128), (2, 512, 1, 128)]),
                     ("linear_cross_entropy", [(512, 256), (1000, 256)])):
    assert kernels.explain(op, *shapes).implementation == implementation


def test_a_gpu_before_bfloat16_takes_plain_jax(gpu_at_hand):
  gpu_at_hand("Tesla T4", "7.5")
  choice = kernels.explain("flash_attention", *ATTENTION)
  assert choice.implementation == "xla"
  assert "needs a GPU with bfloat16 in its tensor cores, of compute capability 8.0" in choice.reason
  assert choice.reason.endswith("got sm_75")
  with pytest.raises(ValueError, match="flash_attention: triton needs a GPU with .*sm_75"):
    kernels.explain("flash_attention", *ATTENTION, implementation="triton")


def test_every_gpu_is_a_target():
  for name, gpu in chips.GPUS.items():
    assert f"core_count: {gpu.multiprocessors}" in targets.target_config(targets.chip(name))
  for name in ("a100", "rtx4090"):
    assert plan.Machine(f"{name}:8").chips == 8
