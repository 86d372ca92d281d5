"""Tokenizers in the hub's layout: tokenizer.json, and its special tokens in the files beside it."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from palm_haiku.hub.errors import HubError, library

FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")  # where no file names the token


class HubTokenizer:
  """A tokenizer of the `tokenizers` library.

  Attributes:
    num_tokens: one more than the largest id.
    eod: id of the token that ends a document or an answer.
  """

  def __init__(self, name: str, files: dict[str, Any]):
    """Describes a tokenizer; `load` reads one.

    Args:
      name: under which a run remembers it.
      files: contents of tokenizer.json, tokenizer_config.json and config.json by name, the last two
        with the special tokens alone.
    """
    self.name, self._files = name, files
    self.serialized = json.dumps(files, sort_keys=True).encode()
    self.fingerprint = hashlib.sha256(self.serialized).hexdigest()
    try:
      self._tokenizer = library("tokenizers").Tokenizer.from_str(json.dumps(files[FILE]))
    except HubError:
      raise
    except Exception as error:  # the library raises no other kind
      raise HubError(f"{name} is no tokenizer.json: {error}") from None
    # Truncation and padding are for batches of other libraries.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    self.eod = self._end()
    if not isinstance(self.eod, int) or not 0 <= self.eod < self.num_tokens:
      raise HubError(f"the eos_token_id of {name} must be one of its {self.num_tokens} tokens; got "
                     f"{self.eod!r}")
    self.keeps_newlines = "\n" in self.decode(self.encode("a\nb"))

  def _end(self) -> int:
    token = self._files[_CONFIG].get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    names = [token] if token and isinstance(token, str) else []
    if not names:
      end = self._files["config.json"].get("eos_token_id")
      end = end[0] if isinstance(end, list) and end else end
      if end is not None:
        return end  # pyright: ignore[reportReturnType]  (its type is checked by the caller)
      names = _ENDS
    for token in names:
      if (end := self._tokenizer.token_to_id(token)) is not None:
        return end
    raise HubError(f"{self.name} names no token that ends a document; give it as eos_token in a "
                   f"{_CONFIG} beside it")

  def encode(self, text: str | bytes) -> np.ndarray:
    """int32[T], without special tokens; raises ValueError for bytes that are not UTF-8."""
    return self._encode(text, special=False)

  def prompt(self, text: str) -> np.ndarray:
    """int32[T] of a text to continue, with the special tokens that the model expects before it."""
    return self._encode(text, special=True)

  def _encode(self, text, special):
    try:
      text = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
      raise ValueError(f"text is not valid UTF-8: {error.reason} at position "
                       f"{error.start}") from error
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

  def decode(self, tokens) -> str:
    """The text of int[T], special tokens left out; an unknown id is a replacement character."""
    pieces, known = [], []
    for token in map(int, tokens):
      if self._tokenizer.id_to_token(token) is None:
        pieces += [self._tokenizer.decode(known), "\ufffd"]
        known = []
      else:
        known.append(token)
    return "".join([*pieces, self._tokenizer.decode(known)])

  def stream_decoder(self, prompt=()) -> "_StreamDecoder":
    """A decoder of what follows the tokens of a prompt, fed one token at a time."""
    return _StreamDecoder(self._tokenizer, prompt)

  def save(self, directory: pathlib.Path) -> dict[str, Any]:
    """Writes the tokenizer's files; returns what config.json says of it."""
    (directory / FILE).write_text(json.dumps(self._files[FILE], ensure_ascii=False))
    (directory / _CONFIG).write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast"} | self._files[_CONFIG], indent=1))
    return {"eos_token_id": self.eod} | self._files["config.json"]


class _StreamDecoder:
  """Holds tokens back until they make up characters."""

  def __init__(self, tokenizer, prompt):
    from tokenizers.decoders import DecodeStream

    self._tokenizer = tokenizer
    self._stream = DecodeStream(ids=[int(token) for token in prompt], skip_special_tokens=True)
    self._pending: list[int] = []

  def feed(self, token: int) -> str:
    """The text that this token completes, if any."""
    token = int(token)
    if self._tokenizer.id_to_token(token) is None:
      return self.flush() + "\ufffd"
    self._pending.append(token)
    text = self._stream.step(self._tokenizer, token)
    if text:
      self._pending.clear()
    return text or ""

  def flush(self) -> str:
    """The bytes held back at the end, which are no whole character."""
    text = self._tokenizer.decode(self._pending)
    self._pending.clear()
    return text


def load(path: str | pathlib.Path) -> HubTokenizer:
  """The tokenizer of a hub directory, of a tokenizer.json, or of the copy that a run keeps.

  Raises:
    HubError: there is none, or it cannot be read.
  """
  file = pathlib.Path(path).expanduser()
  file = file / FILE if file.is_dir() else file
  contents = _read(file, needed=True)
  if FILE in contents:  # a run's copy
    return HubTokenizer(str(path), contents)
  special = lambda name: {
      key: value for key, value in _read(file.with_name(name)).items()
      if key in ("bos_token", "eos_token", "pad_token", "unk_token", "bos_token_id",
                 "eos_token_id", "pad_token_id")}
  return HubTokenizer(str(path), {
      FILE: contents, _CONFIG: special(_CONFIG), "config.json": special("config.json")})


def _read(file: pathlib.Path, needed: bool = False) -> dict[str, Any]:
  try:
    contents = json.loads(file.read_text())
    if not isinstance(contents, dict):
      raise ValueError("no JSON object")
    return contents
  except OSError:
    if needed:
      raise HubError(f"there is no tokenizer at {file}") from None
    return {}
  except ValueError as error:
    raise HubError(f"{file} is not JSON: {error}") from None


def from_bytes() -> HubTokenizer:
  """The bytes of UTF-8 as a tokenizer.json: ids are the bytes, and byte 0 ends a document."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  printable = _printable_bytes()
  tokenizer = tokenizers.Tokenizer(models.BPE(
      vocab={character: byte for byte, character in enumerate(printable)}, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  return HubTokenizer("bytes", {
      FILE: json.loads(tokenizer.to_str()), _CONFIG: {"eos_token": printable[0]},
      "config.json": {}})


def _printable_bytes() -> list[str]:
  """The character that the ByteLevel pre-tokenizer writes for each byte."""
  kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
  others = iter(range(256, 512))
  return [chr(byte if byte in kept else next(others)) for byte in range(256)]
