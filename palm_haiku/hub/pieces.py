"""SentencePiece models as a tokenizer.json, with the ids that SentencePiece gives."""

import json
import re

from palm_haiku.hub.errors import HubError, library
from palm_haiku.hub.tokenizer import FILE, HubTokenizer

_SPACE = "\u2581"  # SentencePiece's space


def from_sentencepiece(name: str, serialized: bytes) -> HubTokenizer:
  """The tokenizer.json of a SentencePiece model of kind unigram or BPE.

  Two kinds of text differ: what spells out a piece that is no text, such as </s> or <unk>, becomes
  that piece; and a user-defined symbol alone gets no space before it.

  Args:
    name: of the model, for errors.
    serialized: contents of the model file, a `sentencepiece.ModelProto`.

  Raises:
    HubError: a kind of model, a symbol or a place of spaces that a tokenizer.json cannot express.
  """
  tokenizers = library("tokenizers")
  from sentencepiece import sentencepiece_model_pb2 as protos

  proto = protos.ModelProto.FromString(serialized)  # pyright: ignore[reportAttributeAccessIssue]
  if proto.trainer_spec.treat_whitespace_as_suffix:
    raise HubError(f"{name} is a SentencePiece model with spaces behind words, which a "
                   "tokenizer.json cannot express")
  tokenizer = tokenizers.Tokenizer(_model(name, proto))
  symbols = _pieces(proto, "USER_DEFINED")
  tokenizer.normalizer = _normalizer(proto, symbols)
  tokenizer.decoder = _decoder(proto)
  for symbol in symbols:
    if tokenizer.normalizer.normalize_str(symbol) != symbol:
      raise HubError(f"{name} is a SentencePiece model that exempts {symbol!r} from its "
                     f"normalization rule {proto.normalizer_spec.name!r}, which a tokenizer.json "
                     "cannot express")
  tokenizer.add_tokens([tokenizers.AddedToken(symbol, normalized=True) for symbol in symbols])
  tokenizer.add_special_tokens(_pieces(proto, "CONTROL"))
  return HubTokenizer(name, {
      FILE: json.loads(tokenizer.to_str()), "config.json": {},
      "tokenizer_config.json": {"eos_token": proto.trainer_spec.eos_piece}})


def _pieces(proto, kind):
  kind = proto.SentencePiece.Type.Value(kind)
  return [piece.piece for piece in proto.pieces if piece.type == kind]


def _model(name, proto):
  from tokenizers import models

  kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  [unknown] = _pieces(proto, "UNKNOWN")
  byte_fallback = proto.trainer_spec.byte_fallback
  if kind == "unigram":
    return models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], ids[unknown],
                          byte_fallback=byte_fallback)
  if kind == "bpe":
    return models.BPE(vocab=ids, merges=_merges(proto), unk_token=unknown, fuse_unk=True,
                      byte_fallback=byte_fallback)
  raise HubError(f"{name} is a SentencePiece model of kind {kind}, which a tokenizer.json cannot "
                 "express; it can express unigram and bpe")


def _merges(proto):
  """The pairs that make up each piece, best first; SentencePiece keeps the pieces alone."""
  rank = {piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces)
          if piece.type == proto.SentencePiece.NORMAL}
  merges = []
  for piece, order in rank.items():
    for i in range(1, len(piece)):
      if piece[:i] in rank and piece[i:] in rank:
        merges.append((order, rank[piece[:i]], (piece[:i], piece[i:])))
  return [pair for *_, pair in sorted(merges)]


def _normalizer(proto, symbols):
  """SentencePiece's steps from a text to what is cut into pieces."""
  from tokenizers import Regex, normalizers

  rules, steps = proto.normalizer_spec, []
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""),
              normalizers.Replace(Regex(" {2,}"), " ")]
  if rules.add_dummy_prefix:
    # The library normalizes the symbols that it looks for as well: these keep their form.
    alone = "|".join(map(re.escape, symbols))
    steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)" if alone else r"\A"), _SPACE))
  return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(proto):
  from tokenizers import decoders

  [unknown] = _pieces(proto, "UNKNOWN")
  return decoders.Sequence([
      decoders.Replace(unknown, proto.trainer_spec.unk_surface),
      decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else [])])
