"""python benchmarks/compare_code.py OLD NEW: whether two commits compile to the same machine code.

Every op by every backend, forward and backward, on one device and on a mesh of 2 x 2, is compiled
ahead of time from both: PTX of GPU kernels, bundles of TPU kernels and of what surrounds them,
StableHLO of plain JAX. Locations in the source are left out, for moving a line is no change. Exit
status: 0 the same, 1 different.
"""

import argparse
import collections
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from unittest import mock

OPS = ("flash_attention", "linear_cross_entropy", "decode_attention", "parallel_attention_ffn")
BACKENDS = {"h200": "mosaic_gpu", "a100": "triton", "v5e": "mosaic_tpu", "cpu": "xla"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("old", help="a commit, or the folder of a checkout")
  parser.add_argument("new", help="likewise")
  parser.add_argument("--targets", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument("--diff", metavar="FOLDER", help="where to leave code that differs")
  args = parser.parse_args(argv)
  changed = 0
  for target in args.targets:
    old, new = (_compiled(where, target, args.ops) for where in (args.old, args.new))
    for case in old:
      # Kernels by their code: numbers in the names of dumps depend on what was compiled before.
      ours, theirs = collections.Counter(new[case]), collections.Counter(old[case])
      if same := ours == theirs:
        word = "same"
      else:
        word = f"DIFFERENT: {(theirs - ours).total()} of {theirs.total()} codes"
        if args.diff:
          _leave(pathlib.Path(args.diff) / target / case, theirs - ours, ours - theirs)
      changed += not same
      print(f"{target:5} {BACKENDS[target]:10} {case:43} {len(old[case]):3} codes  {word}",
            flush=True)
  return int(changed > 0)


def _leave(folder, old, new):
  folder.mkdir(parents=True, exist_ok=True)
  for side, codes in (("old", old), ("new", new)):
    for number, code in enumerate(sorted(codes)):
      (folder / f"{number}.{side}").write_text(code)


def _compiled(where, target, ops) -> dict[str, list[str]]:
  """{case: what it compiles to} of a checkout, in a process of its own."""
  with tempfile.TemporaryDirectory(prefix="palm-haiku-code-") as folder:
    checkout = where
    if not os.path.isdir(where):
      checkout = os.path.join(folder, "checkout")
      subprocess.run(["git", "worktree", "add", "--quiet", "--detach", checkout, where], check=True)
    try:
      dumps = os.path.join(folder, "dumps")
      os.mkdir(dumps)
      environment = dict(
          os.environ, PYTHONPATH=os.path.abspath(checkout), JAX_PLATFORMS="cpu",
          MOSAIC_GPU_DUMP_TO=dumps, JAX_TRITON_DUMP_DIR=dumps,
          LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true "
          "--xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*")
      subprocess.run([sys.executable, os.path.abspath(__file__), "compile", target, folder, *ops],
                     cwd=checkout, env=environment, check=True)
      return pickle.loads((pathlib.Path(folder) / "codes").read_bytes())
    finally:
      if checkout != where:
        subprocess.run(["git", "worktree", "remove", "--force", checkout], check=True)


# ---- in the process that compiles


def _compile(target: str, folder: str, *ops: str) -> None:
  from palm_haiku.kernels.aot import build, ptxas, targets

  if target != "cpu":
    os.environ.update(targets.environment(target))
  if BACKENDS[target] == "mosaic_gpu":
    os.environ["PATH"] = f"{os.path.dirname(ptxas.tool('ptxas'))}{os.pathsep}{os.environ['PATH']}"
  import jax

  codes, dumps = {}, pathlib.Path(folder) / "dumps"
  for op in ops:
    function, arguments = _program(op, BACKENDS[target])
    for case, f in (("forward", function), ("backward", _gradient(function, arguments))):
      if case == "backward" and op == "decode_attention":
        continue
      if target == "cpu":
        codes[f"{op} {case}"] = [jax.jit(f).lower(*arguments).as_text()]
        continue
      for where, given in ((case, arguments), (f"{case} on a mesh", _on_mesh(arguments, target))):
        placed, mesh = build.place(given, target)
        lowered = build.lower(f, placed, {}, target, mesh)
        if BACKENDS[target] != "triton":  # Triton has compiled its kernels by now
          lowered.compile()
        codes[f"{op} {where}"] = _take(dumps)
  (pathlib.Path(folder) / "codes").write_bytes(pickle.dumps(codes))


def _on_mesh(arguments, target):
  """The arguments on 2 x 2 devices, over which the ops divide sequences and heads themselves."""
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from palm_haiku.kernels.aot import targets

  # Old commits know one GPU alone; four chips are the smallest topology of a TPU.
  one, more = topologies.get_topology_desc, {} if target == "v5e" else {"topology": "1x1x4"}
  with mock.patch.object(topologies, "get_topology_desc", lambda **given: one(**given | more)):
    devices = targets.devices(target)
  mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments)


def _take(dumps) -> list[str]:
  """The code that lies there, without places in the source; the dumps are removed."""
  codes = []
  for path in sorted(dumps.rglob("*")):
    if path.name.endswith(".ptx"):
      text = path.read_text().split("\n\t.section\t.debug")[0]
      text = re.sub(r"(?m)^\s*(\.loc|\.file|//).*\n?|\s*//.*$|\$L__tmp\d+:\n", "", text)
      codes.append(text)
    elif re.search(r"-\d+-packed-bundles-post-ra\.txt$", path.name):
      codes.append(re.sub(r"/\*.*?\*/|//.*|loc\(.*?\)", "", path.read_text(errors="replace")))
    if path.is_file():
      path.unlink()
  return codes


def _program(op, implementation):
  """A function of an op, and the types of its arguments."""
  import functools

  import jax
  import jax.numpy as jnp

  from palm_haiku import kernels

  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  function = functools.partial(getattr(kernels, op), implementation=implementation)
  if op == "flash_attention":
    slopes = kernels.alibi_slopes(8)
    return lambda *arrays: function(*arrays, alibi_slopes=slopes), (
        array(2, 1024, 8, 128), *[array(2, 1024, 1, 128)] * 2)
  if op == "decode_attention":
    return function, (array(4, 1, 16, 128), *[array(4, 4096, 1, 128)] * 2,
                      array(4, dtype=jnp.int32))
  if op == "linear_cross_entropy":
    return lambda *arrays: function(*arrays)[0], (
        array(2, 1024, 1024), array(8192, 1024), array(2, 1024, dtype=jnp.int32))
  dim, heads, dim_head, hidden = 1024, 8, 128, 4096
  params = dict(
      norm=array(dim, dtype=jnp.float32), query=array(dim, heads, dim_head),
      key=array(dim, dim_head), value=array(dim, dim_head), gate=array(dim, hidden),
      up=array(dim, hidden), attn_out=array(heads, dim_head, dim), ff_out=array(hidden, dim))
  return function, (array(2, 1024, dim), params)


def _gradient(function, arguments):
  import jax
  import jax.numpy as jnp

  floating = [n for n, x in enumerate(arguments) if all(
      jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(x))]
  return jax.grad(lambda *arrays: sum(
      x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*arrays))), argnums=floating)


if __name__ == "__main__":
  if sys.argv[1:2] == ["compile"]:
    _compile(*sys.argv[2:])
  else:
    sys.exit(main())
