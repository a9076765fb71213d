"""Texts and tokenizers whose words are the tokens of the tiny models."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

WORDS = [f"w{number}" for number in range(60)]


def write_words(path: Path, count: int = 40) -> Path:
    """Write documents of 60 words each, and return the path."""
    words = random.Random(0)
    documents = [" ".join(f"w{words.randint(3, 95)}" for _ in range(60)) for _ in range(count)]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of a word for each token of the vocabulary: w3 .. w95."""
    tokenizer = split_words({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 96)}, "<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer that knows WORDS, as tokens 10 .. 69, and `?` for all else."""
    words = {word: place + 10 for place, word in enumerate(WORDS)}
    return split_words({"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, **words}, "?")


def split_words(vocabulary: dict[str, int], unknown: str) -> Tokenizer:
    """Return a tokenizer that splits at spaces."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer
