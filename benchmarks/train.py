"""The whole model beside PaLM-jax: training step, peak memory, compile time, sampling.

Each implementation lives in a process of its own, so that its peak memory is its own and nothing
of one is cached for the other. The parent asks them in turns for one measurement at a time: what
else the machine does hits both alike, and medians of ratios of neighbours are what counts.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import rich.console
import rich.table

DEPTHS = (8, 64)  # whose compile times are compared
NEW_TOKENS = 128
PEER = "palm-jax"


@dataclasses.dataclass(frozen=True)
class Shape:
  """The model and batch: PaLM-lite on bytes; the defaults are PaLM-jax's own training config."""

  batch: int = 4
  seq: int = 1024
  dim: int = 512
  depth: int = 8
  heads: int = 8
  dim_head: int = 64

  @classmethod
  def parse(cls, text: str) -> "Shape":
    """From "4x1024x512x8x8x64": batch, length, dim, depth, heads, dim_head; may stop early."""
    try:
      sizes = [int(size) for size in text.split("x")]
    except ValueError:
      sizes = []
    if not 1 <= len(sizes) <= 6 or min(sizes) < 1:
      raise ValueError(f"a shape is BATCHxLENGTH[xDIMxDEPTHxHEADSxDIM_HEAD]; got {text!r}")
    return cls(*sizes)

  def __str__(self):
    return "x".join(str(size) for size in dataclasses.astuple(self))


class PalmHaiku:
  """This project's model, `implementation` of its ops by name."""

  def __init__(self, implementation: str, shape: Shape, dtype: str):
    import jax

    from palm_haiku import PaLMConfig, train_step

    model = PaLMConfig(256, shape.dim, shape.depth, shape.heads, shape.dim_head, position="alibi",
                       norm="rms", shared_kv=True)
    self._train = train_step
    self.config = train_step.TrainConfig(
        model=model, batch_size=shape.batch, seq_len=shape.seq, dtype=dtype,
        implementation=implementation)
    self.state_shapes = jax.eval_shape(lambda: train_step.init(self.config))

  def init(self):
    import jax
    return jax.jit(lambda: self._train.init(self.config))()

  def step(self, state, tokens):
    return self._train.train_step(self.config, state, {"tokens": tokens})

  def sample(self, state, prompt, length, key):
    from palm_haiku.generate import generate
    return generate(state.params, self.config.model, prompt, length, key=key, top_k=25,
                    dtype=self.config.dtype, implementation=self.config.implementation)


class PalmJax:
  """PaLM-jax's `palm_lite.PaLM`, with the loss and the optimizer of this project."""

  def __init__(self, shape: Shape, num_tokens: int = 256):
    import jax
    import optax
    from palm_jax.palm_lite import PaLM  # pyright: ignore[reportMissingImports]

    from palm_haiku import optim

    self._build = lambda: PaLM(
        num_tokens=num_tokens, dim=shape.dim, depth=shape.depth, heads=shape.heads,
        dim_head=shape.dim_head, max_seq_len=max(2048, shape.seq), key=jax.random.key(0))
    model = self._build()
    leaves, self._tree = jax.tree.flatten(model)
    self._optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optim.schedule(3e-3, steps=2000)))
    self.state_shapes = jax.eval_shape(lambda x: (x, self._optimizer.init(x)), leaves)

  def init(self):
    import jax
    leaves = jax.tree.leaves(self._build())
    return leaves, jax.jit(self._optimizer.init)(leaves)

  def step(self, state, tokens):
    import jax
    import optax
    leaves, opt_state = state

    def loss_of(leaves):
      logits = jax.tree.unflatten(self._tree, leaves)(tokens[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(leaves)
    updates, opt_state = self._optimizer.update(grads, opt_state, leaves)
    return (optax.apply_updates(leaves, updates), opt_state), {"loss": loss}

  def sample(self, state, prompt, length, key):
    import jax
    from palm_jax.utils import sample  # pyright: ignore[reportMissingImports]
    model = jax.tree.unflatten(self._tree, state[0])
    return sample(key, model, prompt, len(prompt) + length, top_k=25)


def _work(name: str, shape: Shape, dtype: str) -> None:
  """A worker: reads a request a line, answers with a JSON line."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from palm_haiku import memory

  out, sys.stdout = sys.stdout, sys.stderr
  model = PalmJax(shape) if name == PEER else PalmHaiku(name, shape, dtype)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 256, (shape.batch, shape.seq + 1)), jnp.int32)
  prompt = jnp.asarray(rng.integers(1, 256, 100), jnp.int32)
  step = state = None
  for line in sys.stdin:
    request = line.strip()
    start = time.perf_counter()
    if request == "compile":
      lowered = jax.jit(model.step, donate_argnums=0).lower(model.state_shapes, tokens)
      step = lowered.compile()
      answer = time.perf_counter() - start
    elif request == "step":
      if state is None:
        state = model.init()
        state, _ = jax.block_until_ready(step(state, tokens))
        start = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, tokens))
      answer = time.perf_counter() - start
    elif request == "peak":
      answer = memory.peak(jax.devices()[0])
    elif request == "sample":
      jax.block_until_ready(model.sample(state, prompt, NEW_TOKENS, jax.random.key(0)))
      answer = NEW_TOKENS / (time.perf_counter() - start)
    elif request == "device":
      answer = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    print(json.dumps(answer), file=out, flush=True)


class _Worker:
  """A process that measures one implementation."""

  def __init__(self, name, shape, dtype):
    self.name = name
    self._errors = tempfile.TemporaryFile("w+")
    self._process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--worker", name, "--shapes",
         str(shape), "--dtype", dtype],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.communicate()
    self._errors.close()

  def ask(self, request: str):
    """The worker's answer; raises RuntimeError with its last words if it died."""
    try:
      self._process.stdin.write(request + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass
    line = self._process.stdout.readline()
    if not line:
      status = self._process.wait()
      self._errors.seek(0)
      words = self._errors.read().strip().splitlines()
      raise RuntimeError(words[-1] if words else f"ended with {status}")
    return json.loads(line)


def absent(name: str) -> str | None:
  """Why an implementation cannot be measured, or None."""
  if name != PEER:
    from palm_haiku import kernels
    try:
      kernels.explain("parallel_attention_ffn", implementation=name)
    except ValueError as error:
      return str(error)
    return None
  try:
    importlib.metadata.version("PaLM-jax")
  except importlib.metadata.PackageNotFoundError:
    return "not installed; pip install PaLM-jax"
  return None


def measure(shape: Shape, names: list[str], dtype: str, rounds: int, say=print) -> list[dict]:
  """One row per implementation.

  Args:
    shape: what is trained.
    names: implementations of this project's ops, and "palm-jax".
    dtype: of this project's activations; PaLM-jax computes in float32.
    rounds: how often each time is taken.
    say: receives a line about what is going on.

  Returns:
    Rows with step_seconds, compile_seconds by depth, tokens_per_second (each a list, one entry
    per round, of which the n-th were taken side by side) and peak_bytes; or with `absent`, the
    reason.
  """
  rows = {name: {"implementation": name, "dtype": "float32" if name == PEER else dtype}
          for name in names}
  for name, row in rows.items():
    if reason := absent(name):
      row["absent"] = reason
  running = []
  present = [name for name in names if "absent" not in rows[name]]

  def attempt(worker, request, note):
    row = rows[worker.name]
    if "absent" in row:
      return
    say(f"{worker.name}: {request}")
    try:
      note(row, worker.ask(request))
    except RuntimeError as error:
      row["absent"] = str(error)

  def in_turns(request, key):
    for _ in range(rounds):
      for worker in running:
        attempt(worker, request, lambda row, x: row.setdefault(key, []).append(x))

  # PaLM-jax's program grows with depth, and a compilation of 64 layers takes minutes.
  for _ in range(rounds):
    for depth in dict.fromkeys((shape.depth, *DEPTHS)):
      for name in present:
        if name == PEER and depth != shape.depth:
          continue
        with _Worker(name, dataclasses.replace(shape, depth=depth), dtype) as worker:
          attempt(worker, "compile", lambda row, x: row.setdefault("compile_seconds", {})
                  .setdefault(str(depth), []).append(x))
  try:
    for name in present:
      running.append(_Worker(name, shape, dtype))
      attempt(running[-1], "device", lambda row, x: row.update(device=x))
      attempt(running[-1], "compile", lambda row, x: None)
    in_turns("step", "step_seconds")
    for worker in running:
      attempt(worker, "peak", lambda row, x: row.update(peak_bytes=x))
      attempt(worker, "sample", lambda row, x: None)  # Compiles.
    in_turns("sample", "tokens_per_second")
  finally:
    for worker in running:
      worker.__exit__()
  return list(rows.values())


def ratio(ours: list[float], theirs: list[float]) -> float:
  """Median of ours / theirs over measurements that were taken side by side."""
  return statistics.median(a / b for a, b in zip(ours, theirs))


def table(shape: Shape, rows: list[dict]) -> rich.table.Table:
  """Medians, and in brackets how they compare with PaLM-jax."""
  peer = next((row for row in rows if row["implementation"] == PEER and "absent" not in row), None)

  def cell(row, values, of_peer, unit, better):
    if values is None:
      return ""
    text = f"{statistics.median(values):.3g} {unit}"
    if peer is None or row is peer or of_peer is None:
      return text
    return f"{text} ({better(ratio(values, of_peer))})"

  faster = lambda x: f"{1 / x:.2f}x faster"
  result = rich.table.Table(
      "implementation", "train step", "peak memory", *(f"compile, depth {d}" for d in DEPTHS),
      "sampling", title=f"batch x length x dim x depth x heads x dim_head = {shape}", box=None)
  for row in rows:
    if "absent" in row:
      result.add_row(row["implementation"], "absent: " + row["absent"])
      continue
    compiled = row["compile_seconds"]
    theirs = peer and peer["compile_seconds"]
    result.add_row(
        f"{row['implementation']} ({row['dtype']})",
        cell(row, row["step_seconds"], peer and peer["step_seconds"], "s", faster),
        cell(row, [row["peak_bytes"] / 1e9], peer and [peer["peak_bytes"] / 1e9], "GB",
             lambda x: f"{x:.2f} of it"),
        *(cell(row, compiled.get(str(d)), theirs and theirs.get(str(d)), "s",
               lambda x: f"{x:.2f} of it") for d in DEPTHS),
        cell(row, row["tokens_per_second"], peer and peer["tokens_per_second"], "tokens/s",
             lambda x: f"{x:.1f}x"))
  return result


def write(directory: pathlib.Path, results: list[dict]) -> pathlib.Path:
  """Saves results as dated JSON with what is needed to take them again."""
  now = datetime.datetime.now(datetime.UTC)
  commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                          text=True, cwd=pathlib.Path(__file__).parent)
  versions = {}
  for package in ("jax", "jaxlib", "dm-haiku", "optax", "PaLM-jax"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / f"train-{now:%Y-%m-%d-%H%M%S}.json"
  path.write_text(json.dumps({
      "benchmark": "train", "date": now.isoformat(timespec="seconds"),
      "commit": commit.stdout.strip() or None, "python": platform.python_version(),
      "platform": platform.platform(), "versions": versions, "results": results}, indent=1) + "\n")
  return path


def main(argv: list[str] | None = None) -> int:
  """Runs the comparison; returns the exit status."""
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks train", description="Train and sample beside PaLM-jax.")
  parser.add_argument("--shapes", nargs="+", default=[str(Shape())], metavar="SHAPE",
                      help="batch x length x dim x depth x heads x dim_head (default %(default)s)")
  parser.add_argument("--implementations", nargs="+", default=["auto", PEER], metavar="NAME",
                      help=f"of this project's ops, and {PEER} (default %(default)s)")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--rounds", type=int, default=5, metavar="N")
  parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                      default=pathlib.Path(__file__).parent / "results")
  parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  try:
    shapes = [Shape.parse(text) for text in args.shapes]
  except ValueError as error:
    parser.error(str(error))
  if args.rounds < 1:
    parser.error(f"--rounds must be at least 1; got {args.rounds}")
  if args.worker:
    _work(args.worker, shapes[0], args.dtype)
    return 0
  console = rich.console.Console()
  results = []
  for shape in shapes:
    with console.status("") as status:
      rows = measure(shape, args.implementations, args.dtype, args.rounds, say=status.update)
    results.append({"shape": dataclasses.asdict(shape), "rows": rows})
    console.print(table(shape, rows))
  console.print(f"\n{write(args.out, results)}", highlight=False, soft_wrap=True)
  return 0 if any("absent" not in row for result in results for row in result["rows"]) else 1


if __name__ == "__main__":
  sys.exit(main())
