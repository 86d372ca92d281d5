"""Figures of docs/data.md: `python -m tests.corpus.measure --mb 2000 DIR`.

Makes a corpus of random words in DIR, tokenises it, and reports speed beside the tokenizer alone,
memory, start-up of a run, and how fast sequences are read and with how many bytes. Ends with the
first bound that does not hold; those of speed are for an idle machine.
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

DOCUMENT = 2000  # bytes, about


def write_corpus(path: pathlib.Path, size: int) -> None:
  """Writes JSON lines of random words, of lengths and frequencies like those of a language."""
  rng = np.random.default_rng(0)
  letters = np.array(list("etaoinshrdlucmfwyp"))
  words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(1, 12, 20_000)], object)
  with open(path, "w") as stream:
    while stream.tell() < size:
      drawn = words[np.minimum(rng.zipf(1.3, 150_000) - 1, len(words) - 1)]
      for start in range(0, len(drawn), 350):
        count = int(rng.integers(50, 650))
        stream.write(json.dumps({"text": " ".join(drawn[start: start + count])}) + "\n")


def train_pieces(corpus: pathlib.Path, path: pathlib.Path) -> None:
  """A SentencePiece model of 8,000 pieces of the beginning of a corpus."""
  import sentencepiece

  with open(corpus) as stream:
    texts = [json.loads(line)["text"][:1000] for line in itertools.islice(stream, 1000)]
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), vocab_size=8000,
      hard_vocab_limit=False, minloglevel=2)


def train_hub(corpus: pathlib.Path, path: pathlib.Path) -> None:
  """A tokenizer.json of 8,000 tokens, byte-level BPE, of a corpus."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, trainers

  with open(corpus) as stream:
    texts = [json.loads(line)["text"] for line in stream]
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.save(str(path))


def in_process(function: str, *arguments: object) -> dict:
  """The result of a function of this module in a process of its own, with its peak memory."""
  code = (f"import json; from tests.corpus import measure; print(json.dumps(measure.{function}("
          f"*{json.dumps(list(map(str, arguments)))})))")
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"},
                        cwd=pathlib.Path(__file__).parents[2])
  return json.loads(done.stdout.splitlines()[-1])


def peak() -> float:
  """MB of memory that this process has had at most."""
  from palm_haiku import memory

  return (memory.of_process() or 0) / 1e6


def tokenise(source: str, tokenizer: str, out: str) -> dict:
  """Tokenises in one process; CPU seconds without those before the first document."""
  from palm_haiku.corpus import build

  build.data.load_tokenizer(tokenizer)
  before, start = peak(), time.process_time()
  index = build.build(build.Settings((source,)), tokenizer, out)
  return {"cpu_seconds": time.process_time() - start, "peak_mb": peak(), "before_mb": before,
          "bytes": sum(total["bytes"] for total in index["totals"].values())}


def alone(source: str, tokenizer: str) -> dict:
  """CPU seconds of a tokenizer that is loaded and has the texts of JSON lines in memory."""
  from palm_haiku import data

  with open(source) as stream:
    texts = [json.loads(line)["text"].encode() for line in stream]
  begin = time.process_time()
  encode = data.load_tokenizer(tokenizer).encode
  for text in texts:
    encode(text)
  return {"cpu_seconds": time.process_time() - begin, "documents": len(texts)}


def whole(source: str, tokenizer: str, out: str) -> dict:
  """CPU seconds of all that tokenising does."""
  from palm_haiku.corpus import build

  begin = time.process_time()
  build.build(build.Settings((source,)), tokenizer, out)
  seconds = time.process_time() - begin
  shutil.rmtree(out)
  return {"cpu_seconds": seconds}


def beside_the_tokenizer(source: pathlib.Path, tokenizer: object, out: pathlib.Path,
                         rounds: int) -> dict:
  """CPU microseconds a document: of all that tokenising does, and of the tokenizer alone.

  Each in a process of its own, as it is used: SentencePiece is up to 3% faster or slower by where
  in memory it was loaded, and `tokenizers` keep what they have seen. They take turns, since a
  shared machine's speed changes: medians, and for the share that of the rounds' shares.
  """
  seconds, documents = {"alone": [], "whole": []}, 1
  for _ in range(rounds):
    figures = in_process("alone", source, tokenizer)
    documents = figures["documents"]
    seconds["alone"].append(figures["cpu_seconds"])
    seconds["whole"].append(in_process("whole", source, tokenizer, out)["cpu_seconds"])
  shares = sorted(a / b for a, b in zip(*seconds.values()))
  return {"share": statistics.median(shares), "least": shares[0], "most": shares[-1],
          **{f"{name}_us": 1e6 * statistics.median(x) / documents for name, x in seconds.items()}}


def tokenise_and_read(source: str, out: str) -> dict:
  """Figures of `tokenise`, `read` and `pack`, one after the other, with bytes as tokens."""
  figures = {"tokenise": tokenise(source, "bytes", out), "read": read(out, "20")}
  return figures | {"pack": pack(out)}


def pack(source: str) -> dict:
  """CPU seconds to pack a corpus and to find the first sequence, and the share of padding."""
  from palm_haiku.corpus import packing, shards

  tokens, begin = shards.open_tokens(source), time.process_time()
  packed = packing.Packed(tokens, seq_len=2048, seed=0, eod=0, mask=True)
  seconds = [time.process_time() - begin]
  packed[0]
  seconds.append(time.process_time() - begin - seconds[0])
  begin = time.process_time()
  for k in range(2000):
    packed[k]
  return {"padding": packed.padding, "start_seconds": seconds[0], "group_seconds": seconds[1],
          "tokens_per_cpu_second": 2000 * 2048 / (time.process_time() - begin),
          "peak_mb": peak()}


def start(source: str, out: str) -> dict:
  """Wall-clock seconds and memory of a run of two steps on a tokenised corpus."""
  from palm_haiku import cli

  begin = time.perf_counter()
  status = cli.main([
      "train", f"--data={source}", f"--out={out}", "--dim=16", "--depth=1", "--heads=2",
      "--dim-head=8", "--steps=2", "--batch-size=4", "--eval-tokens=2000", "--num-tokens=8192"])
  return {"status": status, "seconds": time.perf_counter() - begin, "peak_mb": peak()}


def read(source: str, batches: str) -> dict:
  """Tokens a second of batches of 64 x 2,049 tokens in random order, and bytes that were read."""
  from palm_haiku import data
  from palm_haiku.corpus import shards

  tokens = shards.open_tokens(source)
  windows = data.windows(tokens, seq_len=2048, seed=0)
  np.stack([windows[k]["tokens"] for k in range(64)])
  before, cpu, begin = _bytes_read(), time.process_time(), time.perf_counter()
  for batch in range(int(batches)):
    np.stack([windows[64 * batch + k]["tokens"] for k in range(64)])
  count = int(batches) * 64 * 2049
  return {"tokens_per_second": count / (time.perf_counter() - begin),
          "tokens_per_cpu_second": count / (time.process_time() - cpu),
          "bytes_over_needed": (_bytes_read() - before) / (count * tokens.dtype.itemsize),
          "peak_mb": peak()}


def _bytes_read() -> int:
  """Bytes that this process has asked files for."""
  text = pathlib.Path("/proc/self/io").read_text()
  return int(text.split("rchar:")[1].split()[0])


def main() -> None:
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("directory", type=pathlib.Path)
  parser.add_argument("--mb", type=int, default=2000)
  parser.add_argument("--tokenizer-mb", type=int, default=40, help="for tokenizers' speed")
  args = parser.parse_args()
  folder = args.directory
  folder.mkdir(parents=True)
  large, small, part = folder / "large.jsonl", folder / "small.jsonl", folder / "part.jsonl"
  for path, size in ((large, args.mb), (small, 1), (part, args.tokenizer_mb)):
    write_corpus(path, size * 10**6)
  model = folder / "pieces.model"
  train_pieces(small, model)
  hub = folder / "tokenizer.json"
  train_hub(small, hub)

  def show(name, figures):
    print(name, {key: round(x, 4) if isinstance(x, float) else x for key, x in figures.items()},
          flush=True)
    return figures

  for tokenizer in (model, hub, "bytes"):
    name = getattr(tokenizer, "name", tokenizer)
    show(f"tokenize beside {name} alone",
         beside_the_tokenizer(part, tokenizer, folder / "out", 7))
  in_process("tokenise", small, "bytes", folder / "little")
  in_process("tokenise", part, model, folder / "pieces")
  made = show("tokenize, bytes", in_process("tokenise", large, "bytes", folder / "bytes"))
  assert made["peak_mb"] < 1000, "a process that tokenises needs more than 1 GB"
  runs = {"little": [], "bytes": []}
  for turn, name in itertools.product(range(2), runs):
    runs[name].append(show(f"two steps on {name}", in_process(
        "start", folder / name, folder / f"run-{name}-{turn}")))
  for key, bound in (("seconds", 5), ("peak_mb", 100)):
    little, much = (min(run[key] for run in runs[name]) for name in runs)
    assert much < little + bound, f"{key} of a run on much text are {much - little} more"
  for name in ("bytes", "pieces"):
    got = show(f"read, {name}", in_process("read", folder / name, 200))
    assert got["bytes_over_needed"] <= 2, "more than twice the bytes are read"
    assert got["tokens_per_cpu_second"] > 2.5e6, "a core reads less than 2.5 million a second"
  show("pack", in_process("pack", folder / "bytes"))


if __name__ == "__main__":
  main()
