"""`lightpress generate`: the text is the model's own, arrives in whole characters, and every misuse is one sentence."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tiny import make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from backends.export_onnx import export_onnx
from cli import stream
from cli.app import Verb, Verbs
from cli.generate import generate
from cli.stream import Sampling, TextStream, find_artifact, find_context, find_ends, weigh_ids
from compress.checkpoint import open_checkpoint

BROKEN = "\N{REPLACEMENT CHARACTER}"
MIXED = "naïve 你好, 👩‍👩‍👧 e\u0301 \N{REPLACEMENT CHARACTER} end"
PROMPT = "w94 w18 w64 w29"
app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)
app.callback()(lambda: None)
app.command("generate", cls=Verb)(generate)


def write_words(folder, largest=95):
    """A word is a token: w3 .. w95 of the tiny models' vocabulary, after a <s> that the tokenizer itself adds."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, largest + 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_byte_level():
    """Every byte is a token, as in byte-level vocabularies without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_fallback():
    """Bytes as <0x..> tokens where the vocabulary lacks a character, as in vocabularies made by sentencepiece."""
    whole = {"▁": 256, "a": 257, "e": 258, "好": 259, "<unk>": 260}
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | whole
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


BYTE_TOKENIZERS = {"byte-level": make_byte_level, "fallback": make_fallback}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A checkpoint with a tokenizer, which tests must not change."""
    folder = make_checkpoint(tmp_path_factory.mktemp("generate") / "model", "llama")
    write_words(folder)
    return folder


@pytest.fixture(scope="session")
def exported(plain, tmp_path_factory):
    """The same with an ONNX graph inside, as a Lightpress output has it."""
    folder = copy_folder(plain, tmp_path_factory.mktemp("generate") / "output")
    export_onnx(open_checkpoint(plain), folder / "onnx")
    return folder


@pytest.fixture
def model(plain, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return copy_folder(plain, tmp_path / "model")


def copy_folder(source, target):
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def run(*arguments, given=None):
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)], input=given)


def run_json(*arguments, given=None):
    done = run(*arguments, "--json", given=given)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def edit_json(path, **changes):
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


class Script:
    """A runtime that says the given ids one after the other, whatever it is asked, and can fail at a step."""

    vocab = 512

    def __init__(self, ids, failing=None, error=None):
        self.ids, self.failing, self.error = ids, failing, error

    def prefill(self, ids, mask=None, every=True):
        return self.say(0)

    def decode(self, ids, cache):
        return self.say(cache)

    def say(self, step):
        if step == self.failing:
            raise self.error
        logits = np.zeros((1, 1, self.vocab), dtype=np.float32)
        logits[0, 0, self.ids[step]] = 1.0
        return logits, step + 1


# The text


@pytest.fixture(scope="session")
def greedy(plain):
    """What transformers' own greedy generation makes of the prompt, the tokenizer's <s> before it."""
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = torch.tensor([[1, 94, 18, 64, 29]])
    made = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_greedy_text_is_that_of_transformers(runtime, exported, greedy):
    assert len(set(greedy)) > 12  # not one word again and again
    answer = run_json(exported, PROMPT, "--new", 24, "--no-stop", "--runtime", runtime, "--threads", 1)
    assert answer["ids"] == greedy
    assert answer["text"] == " ".join({0: "<pad>", 1: "<s>", 2: "</s>"}.get(token, f"w{token}") for token in greedy)
    assert (answer["prompt"], answer["prompt_tokens"], answer["new_tokens"]) == (PROMPT, 5, 24)
    assert (answer["runtime"], answer["ended"]) == (runtime, False)
    assert set(answer["seconds"]) == {"load", "first", "rest"}
    assert min(*answer["seconds"].values(), answer["tokens_per_s"]) > 0


def test_text_goes_to_stdout_and_speed_to_stderr(plain, greedy):
    asked = (plain, PROMPT, "--new", 3, "--no-stop")
    done = run(*asked)
    assert done.stdout == f"w{greedy[0]} w{greedy[1]} w{greedy[2]}\n"
    assert done.stderr.count("\n") == 1
    for words in ("torch: 5 prompt tokens, 3 new;", "first after", "tokens/s."):
        assert words in done.stderr
    assert "then" not in run(plain, PROMPT, "--new", 1, "--no-stop").stderr  # a single token has no rate
    quiet = run(*asked, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_prompt_comes_from_standard_input(plain):
    for given in (PROMPT, f"{PROMPT}\n", f"{PROMPT}\r\n"):
        answer = run_json(plain, "-", "--new", 2, given=given)
        assert answer["prompt"] == PROMPT
    assert answer["ids"] == run_json(plain, PROMPT, "--new", 2)["ids"]


def test_tokenizer_does_not_cut_or_pad_the_prompt(plain, model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(model / "tokenizer.json"))
    asked = (PROMPT, "--new", 3)
    assert run_json(model, *asked)["ids"] == run_json(plain, *asked)["ids"]
    assert run_json(model, *asked)["prompt_tokens"] == 5


# Whole characters


@pytest.mark.parametrize("kind", BYTE_TOKENIZERS)
def test_pieces_are_whole_characters_and_join_to_the_decoded_text(kind):
    tokenizer = BYTE_TOKENIZERS[kind]()
    ids = tokenizer.encode(MIXED).ids
    text = TextStream(tokenizer)
    pieces = [text.add(token) for token in ids]
    assert "".join(pieces) + text.finish() == tokenizer.decode(ids) == MIXED == text.text
    assert [piece for piece in pieces if BROKEN in piece] == [f"{BROKEN} "]  # MIXED's own, once the next token is there
    assert pieces.count("") >= sum(len(letter.encode()) - 1 for letter in "ï你👩👩👧")  # unfinished ones waited


@pytest.mark.parametrize("kind", BYTE_TOKENIZERS)
def test_cut_character_at_the_end_is_held_back_until_then(kind):
    tokenizer = BYTE_TOKENIZERS[kind]()
    cut = tokenizer.encode("a你").ids[:-1]
    text = TextStream(tokenizer)
    assert "".join(text.add(token) for token in cut) == "a"
    assert set(text.finish()) == {BROKEN}
    assert text.text == tokenizer.decode(cut)


def test_lone_byte_neither_repeats_nor_stalls_the_text():
    """In a run of fallback bytes one wrong byte breaks all: what was printed before stands, what follows goes on."""
    tokenizer = make_fallback()
    run_of_bytes = [*"你".encode(), 0xE5, 257]
    text = TextStream(tokenizer)
    assert tokenizer.decode(run_of_bytes) == BROKEN * 4 + "a"
    pieces = [text.add(token) for token in run_of_bytes]
    assert pieces == ["", "", "你", "", BROKEN * 3 + "a"]
    assert text.finish() == ""


def test_verb_prints_pieces_as_they_come(plain, model, monkeypatch):
    tokenizer = make_byte_level()
    tokenizer.save(str(model / "tokenizer.json"))
    ids = tokenizer.encode("é 你!").ids
    written = []
    monkeypatch.setattr(stream, "open_model", lambda *given: Script(ids))
    monkeypatch.setattr(stream, "write_text", written.append)
    assert run(model, "x", "--new", len(ids), "--no-stop").exit_code == 0
    assert written == ["", "é", " ", "", "", "你", "!", "", "\n"]


def test_every_piece_is_flushed_in_the_terminals_encoding(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    stream.write_text("né")
    assert raw.getvalue() == b"n\xe9"
    stream.write_text("你")
    assert raw.getvalue() == b"n\xe9?"


# Where it stops


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_end_token_stops_and_is_not_printed(runtime, exported, greedy, tmp_path):
    folder = copy_folder(exported, tmp_path / "out")
    copy_folder(exported / "onnx", folder / "onnx")
    end = greedy[5]
    expected = greedy[: greedy.index(end) + 1]
    for place in (folder, folder / "onnx"):
        edit_json(place / "generation_config.json", eos_token_id=[0, end])
    asked = (folder, PROMPT, "--new", 24, "--runtime", runtime)
    answer = run_json(*asked)
    assert (answer["ids"], answer["ended"]) == (expected, True)
    assert answer["text"].split() == run_json(*asked, "--no-stop")["text"].split()[: len(expected) - 1]
    assert "the last of them an end token" in run(*asked).stderr
    assert run_json(*asked, "--no-stop")["ids"] == greedy


@pytest.mark.parametrize(
    ("generation", "config", "genai", "ends"),
    [
        (5, 6, None, {5}),
        ([5, 7], 6, None, {5, 7}),
        (None, 6, None, {6}),
        (None, [6, 8], 4, {6, 8}),
        (None, None, [4], {4}),
        (None, None, None, set()),
        (0, 6, None, {0}),
    ],
)
def test_end_tokens_come_from_the_first_config_that_has_some(generation, config, genai, ends, model):
    edit_json(model / "generation_config.json", eos_token_id=generation)
    edit_json(model / "config.json", eos_token_id=config)
    edit_json(model / "genai_config.json", model={"eos_token_id": genai})
    assert find_ends(find_artifact(model)) == ends


def test_context_comes_from_config_or_what_genai_reads(model):
    artifact = find_artifact(model)
    assert find_context(artifact) == 256
    edit_json(model / "config.json", max_position_embeddings=None, text_config={"max_position_embeddings": 99})
    assert find_context(artifact) == 99
    edit_json(model / "config.json", text_config=None)
    assert find_context(artifact) is None
    edit_json(model / "genai_config.json", model={"context_length": 77})
    assert find_context(artifact) == 77


# Sampling


def test_sampling_repeats_with_its_seed_and_is_greedy_at_its_ends(plain, greedy):
    def sample(*flags):
        return run_json(plain, PROMPT, "--new", 24, "--no-stop", *flags)["ids"]

    warm = ("--temperature", 0.9)
    assert sample(*warm, "--seed", 3) == sample(*warm, "--seed", 3)
    assert len({tuple(sample(*warm, "--seed", seed)) for seed in range(3)}) == 3
    assert sample("--temperature", 0, "--seed", 3) == greedy
    assert sample(*warm, "--top-k", 1) == greedy
    assert sample("--temperature", 1e-300) == greedy
    assert sample(*warm, "--top-k", 0) != greedy


@pytest.mark.parametrize("top_k", [2, 7, 19, 20, 500, 0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_chances_equal_their_slow_twin(top_k, temperature):
    logits = np.random.default_rng(0).normal(0, 4, 20).astype(np.float32)
    ids, chances = weigh_ids(logits, Sampling(temperature, top_k))
    best = sorted(range(20), key=lambda index: -logits[index])[: top_k or 20]
    weights = {index: math.exp((float(logits[index]) - float(logits.max())) / temperature) for index in best}
    expected = {index: weight / sum(weights.values()) for index, weight in weights.items()}
    assert dict(zip(ids.tolist(), chances.tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)


def test_draws_follow_the_chances():
    choose = stream.make_choice(Sampling(temperature=2.0, top_k=2, seed=1))
    logits = np.array([0.0, 2 * math.log(3), -1.0, 0.5], dtype=np.float32)
    drawn = [choose(logits) for _ in range(2000)]
    assert set(drawn) == {1, 3}
    share = 3 / (3 + math.exp(0.25))
    assert abs(drawn.count(1) / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)


# Folders


def test_graph_of_lightpress_is_preferred_and_any_other_is_not(exported, plain, tmp_path):
    inside = find_artifact(exported)
    assert (inside.runtime, inside.folder) == ("onnx", exported / "onnx")
    assert find_artifact(exported, "torch").folder == exported
    assert find_artifact(exported, "torch").runtime == "torch"
    assert find_artifact(exported / "onnx").folder == exported / "onnx"
    assert find_artifact(plain).runtime == "torch"
    folder = copy_folder(plain, tmp_path / "published")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"by somebody else" * 100)
    assert find_artifact(folder).runtime == "torch"
    assert find_artifact(folder, "onnx").runtime == "onnx"
    (folder / "lightpress.json").write_text("{}")  # in an output of Lightpress a damaged graph is not passed over
    assert find_artifact(folder).runtime == "onnx"


def test_graph_without_weights_runs_wherever_it_lies(exported, greedy, tmp_path, monkeypatch):
    alone = copy_folder(exported / "onnx", tmp_path / "alone")
    asked = (PROMPT, "--new", 6, "--no-stop")
    assert run_json(alone, *asked)["ids"] == greedy[:6]
    # In OUT/onnx the tokenizer and the configs may be those of OUT, also when the folder is given as a dot.
    nested = copy_folder(exported, tmp_path / "out")
    graph = copy_folder(exported / "onnx", nested / "onnx")
    for path in (graph / "tokenizer.json", nested / "model.safetensors"):
        path.unlink()
    monkeypatch.chdir(graph)
    for folder in (nested, graph, Path(".")):
        answer = run_json(folder, *asked)
        assert (answer["ids"], answer["runtime"]) == (greedy[:6], "onnx")
        refuse((folder, PROMPT, "--new", 300), "context of 256")
    refuse((alone.parent, PROMPT), "no model")


# What is refused


def refuse(arguments, *words, code=2, given=None):
    done = run(*arguments, given=given)
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("lightpress: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(".\n")
    for word in words:
        assert word in done.stderr
    return done.stderr


def empty_folder(folder):
    for file in folder.iterdir():
        file.unlink()


def leave_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


FOLDERS = {
    "no model": (empty_folder, ["holds no model", "model.onnx"]),
    "pickle": (leave_pickle, ["pickled"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "end": (lambda folder: edit_json(folder / "config.json", eos_token_id="</s>"), ["eos_token_id", "--no-stop"]),
    "ends": (lambda folder: edit_json(folder / "config.json", eos_token_id=[2, True]), ["eos_token_id", "True"]),
    "context": (
        lambda folder: edit_json(folder / "config.json", max_position_embeddings="long"),
        ["config.json", "'long'"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_wrong_folder_is_one_sentence(case, model):
    damage, words = FOLDERS[case]
    damage(model)
    refuse((model, PROMPT), *words)


FLAGS = {
    "cold": (["--temperature", "-1"], ["--temperature -1"]),
    "no number": (["--temperature", "nan"], ["--temperature nan"]),
    "endless": (["--temperature", "inf"], ["--temperature inf"]),
    "runtime": (["--runtime", "tensorflow"], ["auto, onnx, torch"]),
    "no graph": (["--runtime", "onnx"], ["model.onnx", "lightpress export"]),
    "nothing": (["--new", "0"], ["--new"]),
    "no seed": (["--seed", "-1"], ["--seed"]),
    "no choice": (["--top-k", "-1"], ["--top-k"]),
    "too much": (["--new", "252"], ["5 tokens", "context of 256", "--new 251 at most"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flag_is_one_sentence(case, plain, monkeypatch):
    monkeypatch.setattr(stream, "open_model", None)  # all of these are seen before any weight is read
    flags, words = FLAGS[case]
    refuse((plain, PROMPT, *flags), *words)


def test_wrong_places_are_one_sentence(plain, tmp_path):
    refuse((tmp_path / "nowhere", PROMPT), "no folder", "nowhere")
    refuse((plain / "config.json", PROMPT), "is a file")


def test_context_is_used_to_its_last_token(plain):
    long = " ".join(["w5"] * 254)  # and <s>
    assert run_json(plain, long, "--new", 1)["prompt_tokens"] == 255
    refuse((plain, f"{long} w5", "--new", 1), "256 tokens", "255 tokens and --new 1")


def test_wrong_prompt_is_one_sentence(plain, model):
    assert run_json(plain, "", "--new", 1)["prompt_tokens"] == 1  # <s> alone is a start
    make_byte_level().save(str(model / "tokenizer.json"))
    refuse((model, ""), "prompt is empty")
    refuse((model, "-"), "prompt is empty", given="\n")
    refuse((plain, "-"), "not UTF-8", given=b"w5 \xff")
    refuse((plain, "w5 \udcff"), "not UTF-8")


def test_providers_that_are_not_there_are_refused(exported, plain):
    refuse((exported, PROMPT, "--provider", "FooExecutionProvider"), "no provider FooExecutionProvider", "CPUExecution")
    refuse((plain, PROMPT, "--provider", "CPUExecutionProvider"), "runs with torch", "lightpress export")


def test_a_provider_that_silently_falls_back_is_refused(exported, monkeypatch):
    # As onnxruntime-cann does without CANN: it is listed, and the session runs on the CPU (reference/ascend.md, 3).
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["AzureExecutionProvider"])
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda session: ["CPUExecutionProvider"])
    refuse((exported, PROMPT, "--provider", "AzureExecutionProvider"), "does not start", "CPUExecutionProvider")


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_tokenizer_of_another_model_is_refused(runtime, exported, tmp_path, monkeypatch):
    folder = copy_folder(exported, tmp_path / "out")
    graph = copy_folder(exported / "onnx", folder / "onnx")
    for place in (folder, graph):
        write_words(place, largest=120)
    monkeypatch.setattr(stream, "load_eager", None)  # seen before the layers are read
    refuse((folder, "w3 w96", "--runtime", runtime), "token 96", "only 96", "tokenizer.json")


def test_weights_that_compute_nothing_fail_the_run(plain, monkeypatch):
    class Broken(Script):
        def say(self, step):
            logits, cache = super().say(step)
            logits[0, 0, 40] = math.nan if step == 2 else 0.0
            return logits, cache

    monkeypatch.setattr(stream, "open_model", lambda *given: Broken([5, 6, 7]))
    done = run(plain, PROMPT)
    assert (done.exit_code, done.stdout) == (1, "w5 w6\n")
    assert "no finite scores for new token 3" in done.stderr


@pytest.mark.parametrize(("step", "printed", "words"), [
    (0, "", "stopped before the first new token"),
    (2, "w5 w6\n", "stopped after 2 of 9 new tokens"),
])  # fmt: skip
def test_interrupt_keeps_what_was_printed(step, printed, words, plain, monkeypatch):
    monkeypatch.setattr(stream, "open_model", lambda *given: Script([5, 6, 7], step, KeyboardInterrupt()))
    done = run(plain, PROMPT, "--new", 9)
    assert (done.exit_code, done.stdout) == (1, printed)
    assert done.stderr == f"lightpress: {words}\n"
