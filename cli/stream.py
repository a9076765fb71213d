"""What `generate` does: find the model in a folder, make token after token, print the text so far as it becomes whole.

Imported only by the running verb.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backends.eager import load_eager
from backends.export_onnx import GRAPH_NAME
from backends.genai import GENAI_NAME
from backends.ort import CPU_PROVIDER, open_onnx
from backends.runtime import Logits, Runtime
from cli.console import Console, RunFailure
from cli.measure import ONNX_FOLDER, limit_threads
from compress.checkpoint import open_checkpoint
from compress.checkpoint_source import CONFIG_NAME, read_json
from compress.checkpoint_writer import MANIFEST_NAME
from compress.errors import UserError
from compress.text import load_tokenizer
from compress.weights import read_spec

ONNX, TORCH, AUTO = "onnx", "torch", "auto"
RUNTIMES = {ONNX: "ONNX Runtime", TORCH: "torch"}
GENERATION_NAME = "generation_config.json"
STANDARD_INPUT = "-"
OM_RUNNER = "run_om.py"
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character, or not yet one
PRODUCER, PRODUCER_PLACE = b"lightpress", 64  # a graph's producer is among its first bytes, before any tensor
Choice = Callable[[Logits], int]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else among the `top_k` likeliest (0: among all)."""

    temperature: float = 0.0
    top_k: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """One `generate`: the folder, the prompt, at most how many new tokens, CPU threads (None: all), and how.

    `provider`: ONNX Runtime's, its CPU if empty.
    """

    source: Path
    prompt: str
    new: int = 64
    threads: int | None = None
    sampling: Sampling = Sampling()
    stop: bool = True
    runtime: str = AUTO
    provider: str = ""


@dataclass(frozen=True)
class Artifact:
    """The runtime that fits a folder, the folder it opens, and those that may hold tokenizer and configs, in order."""

    runtime: str
    folder: Path
    places: tuple[Path, ...]


@dataclass(frozen=True)
class Seconds:
    """Time to open the model, from the prompt to the first new token, and for all further tokens."""

    load: float
    first: float
    rest: float


@dataclass(frozen=True)
class Answer:
    """What was made: `ids` holds the end token too, if one was met (`ended`); `text` does not."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    ended: bool
    runtime: str
    seconds: Seconds
    tokens_per_s: float | None  # of the tokens after the first; None where there is none


def generate_text(question: Question, console: Console) -> Answer:
    """Make an answer and print it as it grows, unless it comes as JSON.

    Raises UserError for what does not fit together, before any token is made, and RunFailure for a model that yields
    no numbers. An interrupt says how far it came; what was printed stays.
    """
    made = Made()
    try:
        return make_answer(question, made, console)
    except KeyboardInterrupt as stop:
        where = f"after {len(made.ids)} of {question.new} new tokens" if made.ids else "before the first new token"
        raise KeyboardInterrupt(f"stopped {where}") from stop


def make_answer(question: Question, made: Made, console: Console) -> Answer:
    """Check everything that can be checked without weights, open the model, and stream."""
    check_sampling(question.sampling)
    artifact = find_artifact(question.source, question.runtime)
    tokenizer = open_tokenizer(artifact)
    prompt = read_prompt(question.prompt)
    ids = encode_prompt(tokenizer, prompt)
    check_length(len(ids), question.new, find_context(artifact))
    ends = find_ends(artifact) if question.stop else frozenset()
    started = time.perf_counter()
    model = open_model(artifact, question.threads, max(ids), question.provider)
    load = time.perf_counter() - started
    stream_answer(
        made, iterate_ids(model, ids, make_choice(question.sampling), question.new, ends), TextStream(tokenizer, ends),
        (lambda piece: None) if console.as_json else write_text,
    )  # fmt: skip
    return made.describe(prompt, len(ids), artifact.runtime, load, ends)


# Finding the model


def find_artifact(folder: Path, runtime: str = AUTO) -> Artifact:
    """Return what runs the model of a folder; UserError where there is none, or none for this runtime.

    `auto` takes the graph in the folder or in its `onnx` folder, but beside weights only one that Lightpress wrote:
    published folders ship graphs of their own, quantised or stale.
    """
    check_folder(folder)
    if runtime not in (AUTO, *RUNTIMES):
        raise UserError(f"--runtime {runtime} is not one of {', '.join((AUTO, *RUNTIMES))}.")
    check_runs_here(folder)
    graphs = [place for place in (folder / ONNX_FOLDER, folder) if (place / GRAPH_NAME).is_file()]
    if runtime == ONNX and not graphs:
        raise UserError(
            f"{folder} has neither {GRAPH_NAME} nor {ONNX_FOLDER}/{GRAPH_NAME}; write one with `lightpress export "
            f"{folder} -o {folder / ONNX_FOLDER}`, or leave out --runtime {ONNX}."
        )
    if not graphs and not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{folder} holds no model: no {GRAPH_NAME}, {ONNX_FOLDER}/{GRAPH_NAME} or {CONFIG_NAME}; give a "
            "checkpoint, a Lightpress output or an exported ONNX folder."
        )
    foreign = graphs and any(folder.glob("*.safetensors")) and not is_own_graph(folder, graphs[0] / GRAPH_NAME)
    if runtime == TORCH or not graphs or (runtime == AUTO and foreign):
        return Artifact(TORCH, folder, (folder,))
    place = graphs[0].absolute()  # for a folder given as `.`
    return Artifact(ONNX, graphs[0], (place, place.parent) if place.name == ONNX_FOLDER else (place,))


def check_folder(folder: Path) -> None:
    """Raise UserError unless a folder is one."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds the model.")
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; give a checkpoint, a Lightpress output or an exported ONNX folder."
        )


def check_runs_here(folder: Path) -> None:
    """Raise UserError for a folder that was written for an Ascend NPU."""
    if (folder / OM_RUNNER).is_file():
        raise UserError(
            f"{folder} holds graphs for an Ascend NPU; try them on this machine with `python3 {folder / OM_RUNNER} "
            "--onnx --prompt TEXT`."
        )


def is_own_graph(folder: Path, graph: Path) -> bool:
    """Tell whether Lightpress wrote a graph, or the whole folder around it."""
    if (folder / MANIFEST_NAME).is_file():
        return True
    with graph.open("rb") as stream:
        return PRODUCER in stream.read(PRODUCER_PLACE)


def open_model(artifact: Artifact, threads: int | None, largest: int, provider: str = "") -> Runtime:
    """Open the model; UserError when it does not have the prompt's largest token id, or for a provider without use."""
    if artifact.runtime == ONNX:
        graph = open_onnx(artifact.folder, threads, provider or CPU_PROVIDER)
        check_vocabulary(artifact, largest, graph.vocab)
        return graph
    if provider:
        raise UserError(
            f"--provider {provider} is ONNX Runtime's, and {artifact.folder} runs with torch: export it first "
            f"(`lightpress export {artifact.folder} -o {artifact.folder / ONNX_FOLDER}`), or leave it out."
        )
    limit_threads(threads)
    checkpoint = open_checkpoint(artifact.folder)
    check_vocabulary(artifact, largest, read_spec(checkpoint).shape.vocab)
    return load_eager(checkpoint)


def check_vocabulary(artifact: Artifact, largest: int, vocab: int) -> None:
    """Raise UserError for a token id that the model does not have."""
    if largest >= vocab:
        raise UserError(
            f"{find_file(artifact, 'tokenizer.json')} turns the prompt into token {largest}, but the model has only "
            f"{vocab}: the tokenizer belongs to another model; copy the right one there."
        )


# Prompt, tokenizer and configs


def read_prompt(prompt: str) -> str:
    """Return the prompt, or standard input for `-` without its last line break; UserError unless it is UTF-8."""
    try:
        if prompt == STANDARD_INPUT:
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        prompt.encode("utf-8")  # other bytes of a command line arrive as halves of surrogate pairs
    except UnicodeError as error:
        raise UserError("The prompt is not UTF-8 text; convert it first.") from error
    return prompt


def open_tokenizer(artifact: Artifact) -> Any:
    """Load the tokenizer, which must neither cut nor pad a prompt; UserError where there is none."""
    found = find_file(artifact, "tokenizer.json")
    tokenizer = load_tokenizer(found.parent if found else artifact.folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return a prompt's ids, with what the tokenizer itself puts around a text; UserError where nothing comes."""
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids:
        raise UserError("The prompt is empty: it gives no token; write a few words.")
    return ids


def check_length(prompt: int, new: int, context: int | None) -> None:
    """Raise UserError when a prompt and its new tokens are longer than the context, saying what fits."""
    if context is None or prompt + new <= context:
        return
    sizes = f"The prompt's {prompt} tokens and {new} new ones are more than the model's context of {context}"
    if prompt < context:
        raise UserError(f"{sizes}; give --new {context - prompt} at most, or a shorter prompt.")
    raise UserError(f"{sizes}; shorten the prompt: {context - 1} tokens and --new 1 are the most that fit.")


def find_file(artifact: Artifact, name: str) -> Path | None:
    """Return the first file of that name among an artifact's places."""
    return next((place / name for place in artifact.places if (place / name).is_file()), None)


def find_setting(artifact: Artifact, *keys: tuple[str, str]) -> tuple[Any, str]:
    """Return the first value that is there and not null, of (file, key) in turn, and the file's path."""
    for name, key in keys:
        path = find_file(artifact, name)
        data = read_json(path) if path else {}
        for part in (data, data.get("text_config"), data.get("model")):
            if isinstance(part, dict) and part.get(key) is not None:
                return part[key], f"{path}"
    return None, ""


def find_context(artifact: Artifact) -> int | None:
    """Return the longest sequence that the model was made for, in tokens; None where no config says it."""
    value, path = find_setting(artifact, (CONFIG_NAME, "max_position_embeddings"), (GENAI_NAME, "context_length"))
    if value is not None and not is_id(value):
        raise UserError(f"{path}: the longest sequence must be a number of tokens, not {value!r}; repair it.")
    return value  # type: ignore[no-any-return]


def find_ends(artifact: Artifact) -> frozenset[int]:
    """Return the ids of the model's end tokens; UserError for a config that says nonsense."""
    files = GENERATION_NAME, CONFIG_NAME, GENAI_NAME
    value, path = find_setting(artifact, *((name, "eos_token_id") for name in files))
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_id(end) for end in ends):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}; try --no-stop.")
    return frozenset(ends)


def is_id(value: Any) -> bool:
    """Tell whether a config's value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Choosing tokens


def check_sampling(sampling: Sampling) -> None:
    """Raise UserError for a temperature that makes no distribution."""
    if not 0 <= sampling.temperature < math.inf:
        raise UserError(f"--temperature {sampling.temperature:g} is not a number from 0 up; give 0 or, say, 0.8.")


def make_choice(sampling: Sampling) -> Choice:
    """Return what chooses an id by its logits `[vocab]`; it draws from a stream of random numbers of its own."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return lambda logits: int(logits.argmax())
    random = np.random.default_rng(sampling.seed)

    def draw(logits: Logits) -> int:
        ids, chances = weigh_ids(logits, sampling)
        return int(random.choice(ids, p=chances))

    return draw


def weigh_ids(logits: Logits, sampling: Sampling) -> tuple[Any, Any]:
    """Return the ids `[k]` that may be drawn, and their probabilities `[k]` in float64."""
    count = min(sampling.top_k or len(logits), len(logits))
    ids = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    scores = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # next to no temperature: all but the likeliest are infinitely far below
        weights = np.exp((scores - scores.max()) / sampling.temperature)
    return ids, weights / weights.sum()


def iterate_ids(model: Runtime, prompt: list[int], choose: Choice, count: int, ends: Collection[int]) -> Iterator[int]:
    """Yield up to `count` new ids after a prompt; an end id is the last. RunFailure when logits are not finite."""
    logits, cache = model.prefill(np.array([prompt], dtype=np.int64), every=False)
    for number in range(1, count + 1):
        if not math.isfinite(logits[0, -1].max()):
            raise RunFailure(f"the model computes no finite scores for new token {number}; its weights may be damaged.")
        chosen = choose(logits[0, -1])
        yield chosen
        if chosen in ends or number == count:
            return
        logits, cache = model.decode(np.array([[chosen]], dtype=np.int64), cache)


# Printing


class TextStream:
    """The text of a growing answer: each token gives the piece that is new and whole, end tokens give none."""

    def __init__(self, tokenizer: Any, ends: Collection[int] = frozenset()) -> None:
        self.text = ""
        self._tokenizer, self._ends, self._ids = tokenizer, ends, list[int]()

    def add(self, token: int) -> str:
        """Return what a token adds; bytes of an unfinished character wait for the next one."""
        if token not in self._ends:
            self._ids.append(token)
        return self._take(self._tokenizer.decode(self._ids).rstrip(BROKEN))

    def finish(self) -> str:
        """Return what still waits."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, ready: str) -> str:
        # By length: a decoder may turn printed characters, too, into broken ones while a byte after them is alone.
        piece = ready[len(self.text) :]
        self.text += piece
        return piece


@dataclass
class Made:
    """An answer while it is made: its ids, when each came, and its text."""

    started: float = 0.0
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""

    def describe(self, prompt: str, tokens: int, runtime: str, load: float, ends: Collection[int]) -> Answer:
        """Return the finished answer with its times."""
        first, rest = self.times[0] - self.started, self.times[-1] - self.times[0]
        rate = (len(self.ids) - 1) / rest if rest > 0 else None
        return Answer(
            prompt, self.text, tuple(self.ids), tokens, len(self.ids), self.ids[-1] in ends, runtime,
            Seconds(load, first, rest), rate,
        )  # fmt: skip


def stream_answer(made: Made, ids: Iterator[int], text: TextStream, write: Callable[[str], None]) -> None:
    """Take ids as they come, note their times and write the text that they make, with a line break behind it."""
    made.started = time.perf_counter()
    try:
        for token in ids:
            made.ids.append(token)
            made.times.append(time.perf_counter())
            write(text.add(token))
        write(text.finish())
        made.text = text.text
    finally:  # an interrupt's sentence must not stand in the middle of the text
        write("\n" if made.ids else "")


def write_text(piece: str) -> None:
    """Print a piece of text at once; characters that the terminal's encoding lacks become question marks."""
    if piece:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def render_answer(answer: Answer) -> str:
    """Return counts and speed of an answer in one line."""
    rate = "" if answer.tokens_per_s is None else f", then {answer.tokens_per_s:.1f} tokens/s"
    end = ", the last of them an end token" if answer.ended else ""
    return (
        f"{RUNTIMES[answer.runtime]}: {answer.prompt_tokens} prompt tokens, {answer.new_tokens} new{end}; "
        f"first after {answer.seconds.first:.2f} s{rate}."
    )
