"""SentencePiece models written as a tokenizer.json give the same ids and the same text."""

import itertools
import random

import pytest
import sentencepiece

from palm_haiku import data
from palm_haiku.hub import HubError, tokenizer as hub_tokenizer

LINES = ["the quick brown fox jumps over the lazy dog", "naïve ≠ 数 ﬁne Ａ", "def f(x):",
         "    return x"]
TEXTS = ["", " ", "a", " a", "a  b ", "\n", "the\nfox\n\ndog", "\t x", "naïve ≠ 数 ﬁne Ａ",
         "数数数", "🙂🙂 x", "over<x>lazy<x> dog", "aaaaaa", "a▁b", "    def\n      fox"]
RANDOM = random.Random(0)
TEXTS += ["".join(RANDOM.choice("the fox  \n\tdéﬁ🙂_<x>") for _ in range(30)) for _ in range(60)]


def train(folder, text=LINES, **options):
  """The tokenizer of a small SentencePiece model."""
  sentencepiece.SentencePieceTrainer.train(**dict(
      sentence_iterator=iter(text * 20), model_prefix=str(folder / "m"), vocab_size=330,
      hard_vocab_limit=options.get("model_type") == "bpe", minloglevel=2) | options)
  return data.load_tokenizer(str(folder / "m.model"))


@pytest.mark.parametrize("kind, options", list(itertools.product(["unigram", "bpe"], [
    dict(), dict(add_dummy_prefix=False, byte_fallback=True),
    dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    dict(normalization_rule_name="identity", user_defined_symbols=["<x>", "\t"],
         byte_fallback=True)])), ids=str)
def test_ids_and_text_are_the_same(kind, options, tmp_path):
  size = 330 if options.get("byte_fallback") else 74
  tokenizer = train(tmp_path, model_type=kind, vocab_size=size, **options)
  fields = tokenizer.save(tmp_path)
  again = hub_tokenizer.load(tmp_path)
  assert (again.num_tokens, again.eod) == (tokenizer.num_tokens, tokenizer.eod)
  assert fields == {"eos_token_id": tokenizer.eod}
  for text in TEXTS:
    ids = tokenizer.encode(text).tolist()
    assert again.encode(text).tolist() == ids, text
    if "▁" not in text:
      assert again.decode(ids) == tokenizer.decode(ids), text


@pytest.mark.parametrize("options, message", [
    (dict(model_type="char"), "of kind char"), (dict(model_type="word"), "of kind word"),
    (dict(treat_whitespace_as_suffix=True), "with spaces behind words"),
    (dict(user_defined_symbols=["\n"]), r"exempts '\\n' from its normalization rule 'nmt_nfkc'")])
def test_what_cannot_be_expressed_is_refused(options, message, tmp_path):
  tokenizer = train(tmp_path, vocab_size=60, hard_vocab_limit=False, **options)
  with pytest.raises(HubError, match=message):
    tokenizer.save(tmp_path)
