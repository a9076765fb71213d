"""Text in, windows out: documents, packing, refusals in one line, and text that the model samples itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import make_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from compress.checkpoint import open_checkpoint
from compress.recipe import Recipe
from compress.sample import sample_windows
from compress.text import (
    Windows,
    boundary_ids,
    load_tokenizer,
    pack_windows,
    read_documents,
    read_windows,
)
from compress.weights import read_spec

CONFIG = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"?": 0, **{word: i + 10 for i, word in enumerate("abcdefgh")}}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


# Documents


def test_plain_text_splits_at_the_separator(tmp_path: Path) -> None:
    text = "\none é\nstill one\n<|endoftext|>\ntwo<|endoftext|>\n  \n<|endoftext|>three"
    for name in ("a.txt", "a", "a.TXT"):
        assert list(read_documents(put(tmp_path, name, text))) == ["one é\nstill one", "two", "three"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one", "body": "uno"}, {"text": "two\nlines", "body": "dos"}, {"text": " ", "body": "x"}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    for name in ("a.jsonl", "a.json"):
        assert list(read_documents(put(tmp_path, name, lines))) == ["one", "two\nlines"]
    assert list(read_documents(tmp_path / "a.jsonl", "body")) == ["uno", "dos", "x"]


def test_half_a_surrogate_pair_does_not_stop_the_tokenizer(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"text": "a \\ud83d b"}')
    assert read_windows(path, make_tokenizer(), CONFIG, (1, 4), "text").ids.tolist() == [[1, 10, 0, 11]]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", "one"), ("a.jsonl", '{"text": "one"}')):
        assert list(read_documents(put(tmp_path, name, content.encode("utf-8-sig")))) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"body": "x", "id": 3}', ["line 1", "'text'", "body, id", "--field"]),
        ("a.jsonl", '{"text": "x"}\n\n{"text": null}', ["line 3", "'text'", "--field"]),
        ("a.jsonl", '["text"]', ["line 1", "list"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', ["line 2", "not UTF-8"]),
        ("a.jsonl", "", ["no text"]),
        ("a.jsonl", '{"text": ""}\n', ["no text"]),
        ("a.txt", "", ["no text"]),
        ("a.txt", "\n <|endoftext|> \n", ["no text"]),
        ("a.txt", b"abc\xff", ["not UTF-8", "byte 3"]),
        ("a.csv", "a,b", [".csv", ".jsonl"]),
        ("a.bin", b"\x00", [".bin"]),
        ("a.parquet", b"PAR", []),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    path = put(tmp_path, name, content)
    refused(lambda: list(read_documents(path)), str(path), *words)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(lambda: list(read_documents(tmp_path / "none.txt")), "none.txt", "no such text file")
    refused(lambda: list(read_documents(tmp_path)), "is a folder")


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: list(read_documents(put(tmp_path, "a.parquet", b"PAR1"))), "pip install pyarrow")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "", "two"], "n": [1, 2, 3, 4]}), path)
    assert list(read_documents(path)) == ["one", "two"]
    refused(lambda: list(read_documents(path, "body")), "'body'", "text, n", "--field")


# Tokens


def test_documents_are_packed_after_boundaries(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", "a b c<|endoftext|>d e<|endoftext|>f g h")
    windows = read_windows(path, make_tokenizer(), CONFIG, (9, 4), "text")
    assert windows.ids.tolist() == [[1, 10, 11, 12], [1, 13, 14, 1]]  # f g h are less than a window
    assert windows.source == str(path)
    assert windows.tokens == 8
    assert read_windows(path, make_tokenizer(), CONFIG, (1, 4), "text").ids.tolist() == [[1, 10, 11, 12]]
    assert windows.take(1).ids.tolist() == [[1, 10, 11, 12]]
    assert windows.take(5).ids.shape == (2, 4)


def test_boundaries() -> None:
    assert boundary_ids({"bos_token_id": 0, "eos_token_id": 2}) == [0]
    assert boundary_ids({"bos_token_id": None, "eos_token_id": [5, 6]}) == [5]
    assert boundary_ids({"eos_token_id": 2}) == [2]
    assert boundary_ids({"eos_token_id": []}) == []
    assert boundary_ids({}) == []


def test_too_little_text_is_refused() -> None:
    refused(lambda: pack_windows([1, 2, 3], (1, 4), CONFIG, "a.txt"), "a.txt", "3 tokens", "window of 4")
    refused(lambda: pack_windows([], (1, 4), CONFIG, "a.txt"), "0 tokens")


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", "a b c d e f g h")
    config = {**CONFIG, "vocab_size": 17}
    refused(lambda: read_windows(path, make_tokenizer(), config, (1, 9), "text"), "token 17", "17 embeddings")
    assert read_windows(path, make_tokenizer(), {**CONFIG, "vocab_size": 18}, (1, 9), "text").ids.max() == 17


def test_tokenizers_are_loaded_or_refused(tmp_path: Path) -> None:
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.json")
    put(tmp_path, "tokenizer.json", "{}")
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json", "not a tokenizer")
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("b a").ids == [11, 10]


# Text from the model itself


def sample(folder: Path, **options: Any) -> Windows:
    checkpoint = open_checkpoint(folder)
    recipe = Recipe(**{"windows": 3, "length": 12, **options})
    return sample_windows(checkpoint, read_spec(checkpoint), recipe, lambda stage, done, total: None)


def test_sampled_text_follows_its_seed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "gemma3_text")
    windows = sample(folder)
    assert windows.ids.shape == (3, 12)
    assert (windows.ids[:, 0] == 1).all()
    assert int(windows.ids.min()) >= 0
    assert int(windows.ids.max()) < 96
    assert len({tuple(row) for row in windows.ids.tolist()}) == 3
    assert torch.equal(windows.ids, sample(folder).ids)
    assert not torch.equal(windows.ids, sample(folder, seed=1).ids)
    assert "sampled" in windows.source


def test_sampled_windows_fit_the_models_context(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", max_position_embeddings=7)
    assert sample(folder).ids.shape == (3, 7)


def test_many_windows_are_sampled_in_groups(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    done = []
    checkpoint = open_checkpoint(folder)
    recipe = Recipe(windows=40, length=3)
    windows = sample_windows(
        checkpoint, read_spec(checkpoint), recipe, lambda stage, count, total: done.append((stage, count, total))
    )
    assert windows.ids.shape == (40, 3)
    assert done == [("sample", 32, 40), ("sample", 40, 40)]
    assert len({tuple(row) for row in windows.ids.tolist()}) > 20


def test_a_document_that_ends_is_followed_by_the_next(tmp_path: Path) -> None:
    """With half of the vocabulary as ends of text, most windows hold one, and the boundary follows each."""
    stops = list(range(40, 96))
    ids = sample(make_checkpoint(tmp_path / "m", "llama", eos_token_id=stops), windows=6, length=20).ids
    ended = torch.isin(ids[:, :-1], torch.tensor(stops))
    assert ended.any()
    assert (ids[:, 1:][ended] == 1).all()
    only_end = sample(make_checkpoint(tmp_path / "n", "llama", bos_token_id=None, eos_token_id=2)).ids
    assert (only_end[:, 0] == 2).all()
    neither = sample(make_checkpoint(tmp_path / "o", "llama", bos_token_id=None, eos_token_id=None), windows=20).ids
    assert len(set(neither[:, 0].tolist())) > 5


def test_sampled_tokens_come_from_the_models_own_chances(tmp_path: Path) -> None:
    """Frequencies of the second token against the softmax of the uncached forward."""
    from test_decoder import run_decoder  # noqa: PLC0415 (only here)

    folder = make_checkpoint(tmp_path / "m", "qwen3")
    drawn = sample(folder, windows=1500, length=2).ids[:, 1]
    chances = run_decoder(folder, torch.tensor([[1]]), torch.float32)[0, 0].softmax(-1)
    counts = torch.bincount(drawn, minlength=96) / 1500
    assert float((counts - chances).abs().sum()) < 0.25
    assert float(chances.max()) > 0.05  # far from uniform, or the comparison says nothing
    wrong = torch.full((96,), 1 / 96)
    assert float((counts - wrong).abs().sum()) > 0.5


def test_sampling_that_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    refused(lambda: sample(folder), "--text FILE", "memory")
