"""Training data: formats, chat templates against transformers, packing that loses nothing, resume, bounded memory."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from compress.recover import data_index
from compress.recover.chat import compile_template, mark_tokens, read_template, render_chat
from compress.recover.data import DataStream, StreamOptions, check_documents, make_options, open_stream
from compress.recover.data_index import DocumentIndex
from compress.recover.data_pack import cut_document, pack_rows
from compress.text import read_documents

SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = (
    "{%- if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}"
)
BRACKETS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{{ 'Today: ' + strftime_now('%Y') + '\n' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in m.content %}"
    "{{- m.content.split('</think>')[-1] }}{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
CHAT = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "Four, é 🙂."},
    {"role": "user", "content": "And three?", "name": None},
    {"role": "assistant", "content": "5 of them"},
]
TALK = "once upon a time there was a little girl who said four of them and what is two plus two in a house"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([TALK] * 4, trainer)
    return made


def put(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_template(text: str) -> Any:
    return compile_template(text, {"bos_token": "<s>", "eos_token": "</s>"}, "a template")


def answers(stream: DataStream, tokenizer: Tokenizer, number: int = 0) -> str:
    found = stream.document(number)
    kept = [one for one, weight in zip(found.ids, found.weights, strict=True) if weight]
    return str(tokenizer.decode(kept, skip_special_tokens=False))


# Chat templates


@pytest.mark.parametrize("text", [MARKED, IM, BRACKETS, THINKING])
def test_tokens_equal_those_of_transformers(text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=text)
    options = StreamOptions(length=500, template=make_template(text))
    stream = open_stream([put(tmp_path / "a.jsonl", {"messages": CHAT})], tokenizer, options)
    masked = text == MARKED
    wanted = other.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=masked)
    assert list(stream.document(0).ids) == wanted["input_ids"]
    if masked:
        assert list(stream.document(0).weights) == wanted["assistant_masks"]
    prompt = make_template(text).render(CHAT[:4], prompt=True)
    assert prompt == other.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MARKED, "Four, é 🙂.<|im_end|>5 of them<|im_end|>"),
        (IM, "Four, é 🙂.<|im_end|>\n5 of them<|im_end|>\n"),
        (BRACKETS, " Four, é 🙂.</s> 5 of them</s>"),
    ],
)
def test_only_the_assistant_counts(text: str, said: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = StreamOptions(length=500, template=make_template(text))
    stream = open_stream([put(tmp_path / "a.jsonl", {"messages": CHAT})], tokenizer, options)
    assert answers(stream, tokenizer) == said
    assert stream.facts.rewritten == 0


def test_a_template_that_rewrites_the_past_counts_the_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [*CHAT[1:], {"role": "user", "content": "why"}, {"role": "assistant", "content": "<think>\nwell</think>so"}]
    chat[1] = {"role": "assistant", "content": "<think>hm</think>four"}
    options = StreamOptions(length=500, template=make_template(THINKING))
    stream = open_stream([put(tmp_path / "a.jsonl", {"messages": chat})], tokenizer, options)
    assert answers(stream, tokenizer) == "well</think>so<|im_end|>\n"
    assert stream.facts.rewritten == 1


def test_tools_reach_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"messages": CHAT[1:3], "tools": [{"name": "<add>"}]}
    stream = open_stream(
        [put(tmp_path / "a.jsonl", row)], tokenizer, StreamOptions(length=500, template=make_template(IM))
    )
    text = tokenizer.decode(list(stream.document(0).ids), skip_special_tokens=False)
    assert text.startswith('<|im_start|>system\nTools: [{"name": "<add>"}]<|im_end|>\n')


def test_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    config = {"chat_template": [{"name": "default", "template": "two{{ bos_token }}"}], "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_template(tmp_path)
    assert found is not None and found.render(CHAT) == "two<s>"
    (tmp_path / "chat_template.jinja").write_text("one{{ strftime_now('%d') }}")
    found = read_template(tmp_path, datetime(2020, 1, 17))
    assert found is not None and found.render(CHAT) == "one17"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    refused(lambda: read_template(tmp_path), "chat_template.jinja", "not a valid chat template")


def test_the_sandbox_holds() -> None:
    hostile = make_template("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    refused(lambda: render_chat(hostile, CHAT), "refuses this chat")


def test_marks_follow_overlap() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 8), (8, 9), (9, 12)]
    assert mark_tokens(offsets, [(4, 6), (9, 12)]) == [0, 1, 0, 1, 0, 1]


# Formats


def test_kinds_of_rows_may_be_mixed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT},
        {"prompt": "two plus", "response": " four"},
        {"instruction": "add", "input": "two", "output": "four"},
        {"question": "what", "answer": "that"},
        {"text": "once upon"},
    ]
    plain = tmp_path / "b.txt"
    plain.write_text("\none é\nstill\n<|endoftext|>\n \n<|endoftext|>two")
    options = StreamOptions(length=500, start=(1,), end=(2,), template=make_template(BRACKETS), plain=True)
    stream = open_stream([put(tmp_path / "a.jsonl", *rows), plain], tokenizer, options)
    said = [answers(stream, tokenizer, number) for number in range(7)]
    assert said[1:] == [" four</s>", "four</s>", "that</s>", "once upon</s>", "one é\nstill</s>", "two</s>"]
    whole = tokenizer.decode(list(stream.document(2).ids), skip_special_tokens=False)
    assert whole == "<s>add\n\ntwofour</s>"
    assert stream.facts.documents == 7
    templated = open_stream([tmp_path / "a.jsonl"], tokenizer, StreamOptions(template=make_template(BRACKETS)))
    assert tokenizer.decode(list(templated.document(1).ids), skip_special_tokens=False) == (
        "<s>[INST] two plus [/INST]  four</s>"
    )


def test_refusals_name_file_and_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def start(*paths: Path, **rest: Any) -> Any:
        return lambda: open_stream(paths, tokenizer, StreamOptions(**rest))

    def look(*paths: Path, **rest: Any) -> Any:
        return lambda: check_documents(paths, StreamOptions(**rest))

    good = {"text": "once upon"}
    refused(start(put(tmp_path / "a.jsonl", good, {"body": "x", "head": "y"})), "a.jsonl: line 2", "body, head")
    refused(start(put(tmp_path / "b.jsonl", {"messages": CHAT})), "b.jsonl: line 1", "chat_template.jinja")
    refused(start(put(tmp_path / "c.jsonl", {"messages": [{"content": "x"}]})), "line 1", "role")
    bad = {"messages": [CHAT[0], CHAT[2]]}
    refused(start(put(tmp_path / "d.jsonl", bad), template=make_template(BRACKETS)), "line 1", "roles must alternate")
    (tmp_path / "e.jsonl").write_text('{"text": "a b"}\n\n{"text"')
    refused(start(tmp_path / "e.jsonl"), "line 3", "not JSON")
    (tmp_path / "f.txt").write_bytes(b"once \xff upon")
    refused(start(tmp_path / "f.txt"), "byte 5", "UTF-8")
    (tmp_path / "g.txt").write_text("\n \n")
    refused(start(tmp_path / "g.txt"), "holds no text")
    refused(start(tmp_path / "none.txt"), "no such file")
    refused(start(tmp_path), "is a folder")
    refused(start(put(tmp_path / "h.csv", good)), "'.csv'")
    refused(start(), "No training data")
    refused(start(put(tmp_path / "i.jsonl", good), vocabulary=10), "line 1", "10 embeddings")
    refused(start(put(tmp_path / "j.jsonl", {"text": "<s>"})), "no token there counts")
    refused(start(tmp_path / "i.jsonl", length=1), "no prediction")
    # What needs no tokens is found without them.
    check_documents([tmp_path / "i.jsonl", tmp_path / "j.jsonl"], StreamOptions())
    refused(look(tmp_path / "i.jsonl", tmp_path / "a.jsonl"), "a.jsonl: line 2", "body, head")
    refused(look(tmp_path / "d.jsonl", template=make_template(BRACKETS)), "line 1", "roles must alternate")
    refused(look(tmp_path / "e.jsonl"), "line 3", "not JSON")
    refused(look(tmp_path / "f.txt"), "byte 5", "UTF-8")


def test_digest_is_of_what_decides_the_batches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def digest(path: Path, **rest: Any) -> str:
        return open_stream([path], tokenizer, StreamOptions(**{"length": 16, "rows": 2, **rest})).digest

    rows = [{"prompt": TALK[at : at + 20], "response": TALK[: 9 + at]} for at in range(9)]
    one = digest(put(tmp_path / "a.jsonl", *rows))
    assert digest(put(tmp_path / "b.jsonl", *rows)) == one == digest(tmp_path / "a.jsonl", field="other")
    turned = [{"prompt": row["prompt"] + row["response"][:1], "response": row["response"][1:]} for row in rows]
    texts = [{"text": row["prompt"] + row["response"]} for row in rows]
    others = [digest(put(tmp_path / "c.jsonl", *given)) for given in (rows[1:], rows[::-1], turned, texts)]
    changes: list[dict[str, Any]] = [{"length": 15}, {"rows": 3}, {"seed": 1}, {"start": (1,)}]
    others += [digest(tmp_path / "a.jsonl", **change) for change in changes]
    assert len({one, *others}) == 1 + len(others)


def test_texts_equal_those_of_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeff\n\none é\nstill one\n<|endoftext|>\ntwo<|endoftext|>\n  \n<|endoftext|>three\n\n")
    index = DocumentIndex([path])
    assert [index.read(number)[0]["text"] for number in range(len(index))] == list(read_documents(path))
    # A document longer than a block comes in pieces, which together are the document.
    monkeypatch.setattr(data_index, "BLOCK", 64)
    text = "<|endoftext|>".join([TALK + "\n" + TALK, "é" * 90, "short", (TALK + "\n") * 3 + TALK])
    path.write_text(text)
    index, whole = DocumentIndex([path]), [""]
    for number in range(len(index)):
        row, _, last = index.read(number)
        whole[-1] += row["text"]
        whole += [""] if last else []
    assert len(index) > 8
    assert whole[:-1] == list(read_documents(path))


# Packing


def pack_slowly(sizes: list[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        rooms = [length - sum(sizes[other] for other in row) for row in rows]
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= sizes[place]]
        if fitting:
            rows[min(fitting)[1]].append(place)
        else:
            rows.append([place])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_equals_its_slow_twin(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 33, (120,), generator=random).tolist()
    fast, slow = pack_rows(sizes, 32), pack_slowly(sizes, 32)
    assert sorted(place for row in fast for place in row) == list(range(120))
    # Rows with equal room are interchangeable, so that what they hold may differ but not how full they are.
    assert Counter(sum(sizes[i] for i in row) for row in fast) == Counter(sum(sizes[i] for i in row) for row in slow)


@pytest.mark.parametrize(("size", "length"), [(1, 8), (8, 8), (9, 8), (15, 8), (16, 8), (40, 2)])
def test_a_cut_document_predicts_every_token_once(size: int, length: int) -> None:
    spans = cut_document(size, length)
    assert all(stop - start <= length for start, stop in spans)
    assert [token for start, stop in spans for token in range(start + 1, stop)] == list(range(1, size))


def make_texts(folder: Path, count: int = 60) -> Path:
    words = TALK.split()
    rows = [{"text": " ".join(words[(n * 7 + i) % len(words)] for i in range(1 + n * 5 % 23))} for n in range(count)]
    return put(folder / "many.jsonl", *rows)


def epoch_documents(stream: DataStream, batches: int) -> tuple[Counter[tuple[int, ...]], list[torch.Tensor]]:
    found: Counter[tuple[int, ...]] = Counter()
    seen = []
    for batch in islice(stream.batches(), batches):
        seen.append(batch.ids)
        for ids, documents, weights in zip(batch.ids, batch.documents, batch.weights, strict=True):
            last = int(documents.max())
            for number in range(last + 1):
                own = documents == number
                if weights[own].any():
                    assert weights[own][0] == 0
                    found[tuple(ids[own].tolist())] += 1
    return found, seen


def test_every_document_comes_once_an_epoch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = make_texts(tmp_path)
    stream = open_stream([path], tokenizer, StreamOptions(length=16, rows=1, start=(1,), end=(2,)))
    rows = len(next(iter(stream._plan_windows(0, None))))
    found, _ = epoch_documents(stream, rows)
    whole = [[1, *tokenizer.encode(text).ids, 2] for text in read_documents(path)]
    pieces = [tuple(ids[start:stop]) for ids in whole for start, stop in cut_document(len(ids), 16)]
    assert found == Counter(pieces)
    assert stream.facts.split == sum(len(ids) > 16 for ids in whole) > 3
    assert stream.facts.tokens == sum(map(len, whole))
    assert stream.facts.counted == sum(len(ids) - 1 for ids in whole)
    assert sum(map(len, pieces)) > 0.85 * 16 * rows  # best fit leaves little room


def test_shuffles_are_the_seeds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = make_texts(tmp_path)

    def rows(seed: int, start: int, count: int) -> list[list[list[int]]]:
        stream = open_stream([path], tokenizer, StreamOptions(length=32, rows=3, seed=seed))
        return [batch.ids.tolist() for batch in islice(stream.batches(start), count)]

    first = rows(0, 0, 40)  # several epochs
    assert first == rows(0, 0, 40)
    assert first[:3] != rows(1, 0, 3)
    for start in (1, 7, 23, 39):
        assert rows(0, start, 1) == first[start : start + 1]


def test_an_order_is_followed(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.recover.data as module

    monkeypatch.setattr(module, "WINDOW", 4)
    texts = [f"{'little ' * 6}{n}" for n in range(12)]
    path = put(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    stream = open_stream([path], tokenizer, StreamOptions(length=len(tokenizer.encode(texts[0]).ids) + 1, rows=1))
    order = [8, 9, 10, 11, 0, 1, 2, 3]
    seen = [
        texts.index(tokenizer.decode(batch.ids[0][batch.documents[0] == 0].tolist()))
        for batch in islice(stream.batches(order=order), 8)
    ]
    assert sorted(seen[:4]) == order[:4] and sorted(seen[4:]) == order[4:]
    refused(lambda: next(stream.batches(order=[])), "names none")


def test_what_has_nothing_to_predict_is_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"messages": CHAT[:2]}, {"messages": CHAT}, {"prompt": "once upon a time " * 9, "response": "there was"}]
    options = StreamOptions(length=16, template=make_template(MARKED), plain=True)
    stream = open_stream([put(tmp_path / "a.jsonl", *rows)], tokenizer, options)
    assert (stream.facts.documents, stream.facts.unanswered, stream.facts.split) == (2, 1, 2)
    assert stream.facts.idle > 16  # the prompt's own pieces
    assert stream.document(0).ids == [] and stream.token_counts()[0] == 0


def test_a_limit_takes_documents_at_random(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = make_texts(tmp_path, 600)
    stream = open_stream([path], tokenizer, StreamOptions(length=64, most_tokens=500))
    assert 500 <= stream.facts.tokens < 600
    assert stream.facts.documents + stream.facts.unread + stream.facts.idle == 600
    used = stream.token_counts().nonzero()[0]
    assert used.max() > 400 and used.min() < 200


def test_options_come_from_the_checkpoint(tmp_path: Path) -> None:
    config = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": [2, 3]}
    options = make_options(tmp_path, config, (4, 64), seed=7)
    assert (options.rows, options.length, options.seed) == (4, 64, 7)
    assert (options.start, options.end, options.vocabulary, options.template) == ((1,), (2,), 96, None)


def test_a_large_file_stays_on_disk(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.recover.data as module

    monkeypatch.setattr(module, "GROUP_CHARACTERS", 2**15)
    monkeypatch.setattr(module, "WINDOW", 64)
    path = tmp_path / "large.jsonl"
    with path.open("w") as lines:
        for number in range(1000):
            lines.write(json.dumps({"text": f"{number} {TALK} " * 20}) + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    stream = open_stream([path], tokenizer, StreamOptions(length=128, rows=2))
    for _ in islice(stream.batches(3000), 5):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 2 * 10**6
    assert peak < size / 2, (peak, size)


def test_tables_are_copied_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    rows = [{"body": "one é"}, {"messages": CHAT, "kind": "b"}, {"body": "🙂", "kind": "a"}]
    monkeypatch.setattr(data_index, "read_table", lambda path, field: enumerate(rows, 1))  # the real one needs pyarrow
    index = DocumentIndex([path], "body")
    assert [index.read(number)[0] for number in range(len(index))] == rows
    assert index.place(2) == f"{path}: line 3"


def test_tables_without_their_reader_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: DocumentIndex([path]), "a.parquet", "pip install pyarrow")


def test_tables_hold_chats_and_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [
        {"messages": CHAT, "kind": "long"}, {"prompt": "two plus", "response": " four", "kind": "short"},
        {"text": "once upon"}, {"text": " "}, {"kind": "none"}, {"text": "a house"},
    ]  # fmt: skip
    names = ("messages", "prompt", "response", "text", "kind")
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    stream = open_stream([path], tokenizer, StreamOptions(length=500, template=make_template(IM)))
    other = open_stream(
        [put(tmp_path / "a.jsonl", *rows[:3], rows[5])], tokenizer, StreamOptions(500, template=make_template(IM))
    )
    assert [stream.document(number) for number in range(4)] == [other.document(number) for number in range(4)]
    assert stream.index.read(0)[0]["kind"] == "long" and stream.index.place(3) == f"{path}: line 6"
    parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    refused(lambda: DocumentIndex([path]), "no column 'text'", "it has body", "--field")
    path.write_bytes(b"PAR1")
    refused(lambda: DocumentIndex([path]), "not a Parquet file")
