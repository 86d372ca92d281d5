"""Figures of docs/data.md: `python -m tests.corpus.measure --mb 2000 DIR`.

Makes a corpus of random words in DIR, tokenises it, and reports speed beside the tokenizer alone,
memory, start-up of a run, and how fast sequences are read and with how many bytes.
"""

import argparse
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

DOCUMENT = 2000  # bytes, about


def write_corpus(path: pathlib.Path, size: int) -> None:
  """JSON lines of random words, whose lengths and frequencies are like those of a language."""
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
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def tokenise(source: str, tokenizer: str, out: str) -> dict:
  """Tokenises in one process; CPU seconds without those before the first document."""
  from palm_haiku.corpus import build

  build.data.load_tokenizer(tokenizer)
  before, start = peak(), time.process_time()
  index = build.build(build.Settings((source,)), tokenizer, out)
  return {"cpu_seconds": time.process_time() - start, "peak_mb": peak(), "before_mb": before,
          "bytes": sum(total["bytes"] for total in index["totals"].values())}


def tokenizer_alone(source: str, tokenizer: str, size: str) -> dict:
  """CPU seconds of the tokenizer on the texts of a source's beginning, held in memory."""
  from palm_haiku import data

  texts, total = [], 0
  with open(source) as stream:
    for line in stream:
      texts.append(json.loads(line)["text"].encode())
      total += len(texts[-1])
      if total > int(size):
        break
  encode, start = data.load_tokenizer(tokenizer).encode, time.process_time()
  for text in texts:
    encode(text)
  return {"cpu_seconds": time.process_time() - start, "bytes": total}


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
  parser.add_argument("--tokenizer-mb", type=int, default=40, help="for the tokenizer's speed")
  args = parser.parse_args()
  folder = args.directory
  folder.mkdir(parents=True)
  large, small, part = folder / "large.jsonl", folder / "small.jsonl", folder / "part.jsonl"
  for path, size in ((large, args.mb), (small, 1), (part, args.tokenizer_mb)):
    write_corpus(path, size * 10**6)
  model = folder / "pieces.model"
  train_pieces(small, model)

  def show(name, figures):
    print(name, {key: round(x, 3) if isinstance(x, float) else x for key, x in figures.items()},
          flush=True)

  show("SentencePiece alone", in_process("tokenizer_alone", part, model, 10**12))
  show("tokenize, SentencePiece", in_process("tokenise", part, model, folder / "pieces"))
  show("tokenize, bytes", in_process("tokenise", large, "bytes", folder / "bytes"))
  in_process("tokenise", small, "bytes", folder / "little")
  for name in ("little", "bytes"):
    show(f"two steps on {name}", in_process("start", folder / name, folder / f"run-{name}"))
  show("read", in_process("read", folder / "bytes", 200))
  show("read, 2 bytes a token", in_process("read", folder / "pieces", 200))


if __name__ == "__main__":
  main()
