"""Recovery after a cut, at equal tokens: starts, losses, offline, merges, on-policy rounds, curriculum.

    python benchmarks/recovery.py demo|stories|books [--books FOLDER] [--keep 0.7,0.5] [--part starts,losses,...]
                                  [--seeds N] [--work FOLDER] -o RESULTS.json

Every model is made by the command line as a user would, in a process of its own; each run is one line of the JSON, and
a run that is there already is not made again. Calibration is compress's default (128 windows of 256 tokens); training
reads ten times as many tokens of the same kind of text, which the held-out windows share nothing with:

    demo      text of compress/demo/grammar.py: split "train" for training, "heldout" for the test; also its tasks
    stories   ../shared/checkpoints/stories260K: one TinyStories sample for training, a disjoint one for the test
    books     what benchmarks/train_books.py left: pages all over the books; the test is the twentieth it never saw

`excess` is ln(perplexity / dense perplexity) on 200 held-out windows of 256 tokens; `closed` is the share of a start's
excess that training took away. Starts: `default` is the default recipe. `good` (CLAP, SLNP, least squares) and `plain`
(nothing after the cut) share one plan: equal layers, hidden and FFN channels; `paper` is CLAP and SLNP alone, `slnp`
SLNP alone, and `repaired` SLNP and least squares without CLAP.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from compress.checkpoint import open_checkpoint  # noqa: E402
from compress.demo.grammar import END_TOKEN, Task, write_documents, write_tasks  # noqa: E402
from compress.demo.score import Row, pad_rows  # noqa: E402
from compress.evaluate import fill_hidden, measure_quality, stream_logits  # noqa: E402
from compress.hidden import HiddenStore  # noqa: E402
from compress.pipeline import Task as Compression  # noqa: E402
from compress.pipeline import plan_checkpoint  # noqa: E402
from compress.plan import LayerPlan, Plan, plan_shape  # noqa: E402
from compress.recipe import Recipe  # noqa: E402
from compress.text import Windows, boundary_ids, load_tokenizer, read_windows  # noqa: E402
from compress.weights import read_spec  # noqa: E402

SHARED = ROOT.parent / "shared"
WINDOWS, LENGTH, TEST = Recipe().windows, Recipe().length, 200
TOKENS = 10 * WINDOWS * LENGTH
STEP = 4  # kept channels of the plans that `good` and `plain` share
PAGE, PAGES, TEST_PAGES = 4000, 450, 70  # characters in a page of a book, and pages read
ASKED = ("recall", "sums", "tracking")  # kinds whose prompt decides the answer; to agree, many verbs would do
TASKS, TEST_TASKS = 1500, 150  # of each kind
OWN_GROUPS = ("plain", "repaired", "slnp")  # starts without CLAP: groups of dropped layers go with them
# What `compress` is told for each start, beside the plan that all but `default` share.
STARTS = {
    "default": (),
    "good": ("--norms", "slnp", "--repair", "lstsq", "--refine", "0"),
    "repaired": ("--norms", "slnp", "--repair", "lstsq", "--refine", "0"),
    "paper": ("--norms", "slnp", "--repair", "none", "--inputs", "none", "--refine", "0"),
    "slnp": ("--norms", "slnp", "--repair", "none", "--inputs", "none", "--refine", "0"),
    "plain": ("--norms", "none", "--repair", "none", "--inputs", "none", "--refine", "0"),
}


@dataclass(frozen=True)
class Case:
    """A dense checkpoint, the texts, and a folder for what is made."""

    name: str
    dense: Path
    work: Path

    @property
    def train(self) -> Path:
        """The text for calibration and training."""
        return self.work / "train.txt"

    @property
    def heldout(self) -> Path:
        """The text of the test."""
        return self.work / "heldout.txt"


@dataclass(frozen=True)
class Run:
    """One training run: what it starts from, the flags beside the defaults, the seed, and its share of the tokens."""

    keep: float
    start: str
    flags: tuple[str, ...] = ()
    seed: int = 0
    share: float = 1.0
    text: str = "train.txt"

    @property
    def key(self) -> str:
        """The run's name in the results."""
        flags = " ".join(self.flags) or "kl"
        return f"{self.keep:g}/{self.start}/{self.text}/{flags}/{self.share:g}/seed {self.seed}"


# Texts


def write_texts(case: Case) -> None:
    """Write the training and the held-out text, if they are not there."""
    case.work.mkdir(parents=True, exist_ok=True)
    writers = {"demo": write_demo, "stories": write_stories, "books": write_books}
    if not case.heldout.exists():
        train, heldout = writers[case.name]()
        case.train.write_text(train, encoding="utf-8")
        case.heldout.write_text(heldout, encoding="utf-8")


def write_demo() -> tuple[str, str]:
    """Return generated text of both splits."""
    return (
        END_TOKEN.join(write_documents(4000, 11, "train")),
        END_TOKEN.join(write_documents(800, 991, "heldout")),
    )


def write_stories() -> tuple[str, str]:
    """Return the two samples of TinyStories."""
    data = SHARED / "data"
    return (
        (data / "tinystories_1910stories_1p6MB.txt").read_text(encoding="utf-8"),
        (data / "tinystories_1000.txt").read_text(encoding="utf-8"),
    )


def write_books() -> tuple[str, str]:
    """Return pages from all over the books that were trained on, in a mixed order, and of those that were not."""
    from train_books import BOOKS, split_text

    seen, unseen = split_text(BOOKS)
    return END_TOKEN.join(cut_pages(seen, PAGES)), END_TOKEN.join(cut_pages(unseen, TEST_PAGES))


def cut_pages(text: str, count: int) -> list[str]:
    """Return `count` evenly spaced pages in an order that mixes the books."""
    pages = [text[at : at + PAGE].replace(END_TOKEN, "\n") for at in range(0, len(text) - PAGE, len(text) // count)]
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    return [pages[place] for place in order.tolist()]


# Tasks of the demo, as prompts with answers


@cache
def test_tasks() -> dict[str, list[Task]]:
    """Return each kind's questions of the test, every prompt once."""
    return {kind: list({task.prompt: task for task in write_tasks(kind, TEST_TASKS, 0)}.values()) for kind in ASKED}


def write_answers(case: Case) -> Path:
    """Write questions with their right answers, none of which the test asks."""
    path = case.work / "tasks.jsonl"
    if not path.exists():
        asked = {task.prompt for tasks in test_tasks().values() for task in tasks}
        tasks = [task for kind in ASKED for task in write_tasks(kind, TASKS, 1) if task.prompt not in asked]
        rows = ({"prompt": task.prompt, "response": task.choices[task.answer]} for task in tasks)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure_answers(folder: Path) -> dict[str, Any]:
    """Return the share of test questions of each kind whose right answer is generated (greedy, exact match)."""
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    model = (checkpoint, read_spec(checkpoint))
    return {"exact": {kind: match_greedy(model, tokenizer, tasks) for kind, tasks in test_tasks().items()}}


def match_greedy(model: tuple[Any, Any], tokenizer: Any, tasks: Sequence[Task]) -> float:
    """Return the share of tasks whose right answer is what greedy decoding writes after the prompt.

    Greedy decoding writes the answer exactly if each of its tokens is the likeliest after all before it.
    """
    start = boundary_ids(dict(model[1].config))
    rows = []
    for task in tasks:
        prompt = start + tokenizer.encode(task.prompt, add_special_tokens=False).ids
        answer = tokenizer.encode(task.choices[task.answer], add_special_tokens=False).ids
        rows.append(Row(prompt + answer, len(prompt)))
    windows = Windows(pad_rows(rows), "tasks")
    with HiddenStore((*windows.ids.shape, model[1].shape.hidden)) as store:
        fill_hidden(*model, windows, store)
        logits = stream_logits(*model, store)
        hits = [
            found[row.start - 1 : len(row.ids) - 1].argmax(-1).tolist() == row.ids[row.start :]
            for row, found in zip(rows, logits, strict=True)
        ]
    return sum(hits) / len(hits)


# Measuring, and calling the command line


def measure_loss(case: Case, folder: Path) -> float:
    """Return the held-out loss in nats per token."""
    checkpoint = open_checkpoint(folder)
    windows = read_windows(case.heldout, load_tokenizer(folder), checkpoint.config, (TEST, LENGTH), "text")
    return math.log(measure_quality(checkpoint, read_spec(checkpoint), windows).perplexity)


def call(verb: str, *words: object) -> dict[str, Any]:
    """Run one command of Lightpress in a process of its own and return its JSON; what it says goes to stderr.

    A shell stands between, since Linux counts the memory of whoever starts a process into its `ru_maxrss`.
    """
    lightpress = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", "from cli.app import main; main()"]
    command = [*lightpress, verb, *map(str, words), "--json", "--overwrite"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: lightpress {verb} {' '.join(map(str, words))}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Results:
    """The JSON file: one record per model, written after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records = self._read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of that name, made if it is not there."""
        if key not in self.records:
            print(f"{time.strftime('%H:%M:%S')} {key}", file=sys.stderr, flush=True)
            record = make()
            self.records = self._read()  # another case may have written meanwhile
            self.records[key] = record
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.records, indent=1))
            partial.replace(self._path)
        record = self.records[key]
        assert isinstance(record, dict)
        return record


# Starts


def make_start(case: Case, results: Results, keep: float, start: str) -> tuple[Path, dict[str, Any]]:
    """Return a cut model and its record."""
    folder = case.work / f"start-{start}-{keep:g}"

    def make() -> dict[str, Any]:
        shape = ("--keep", keep) if start == "default" else ("--plan", write_plan(case, keep, start))
        found = call(
            "compress", case.dense, *shape, *STARTS[start], "--text", case.train, "--eval-text",
            case.heldout, "--no-export", "--no-bench", "--no-verify", "-o", folder, "-q",
        )  # fmt: skip
        plan, row = found["plan"], found["plan"]["layers"][0]
        outline = f"{len(plan['layers'])} layers, hidden {plan['hidden']}, KV {row['kv_groups']}, FFN {row['ffn']}"
        return {"shape": outline, "kept": plan["kept_fraction"], **measure(case, results, folder)}

    return folder, results.get(f"{case.name}/start/{keep:g}/{start}", make)


def measure(case: Case, results: Results, folder: Path) -> dict[str, Any]:
    """Return loss and excess of a model, and on the demo its answers."""
    loss = measure_loss(case, folder)
    answers = measure_answers(folder) if case.name == "demo" else {}
    return {"loss": loss, "excess": loss - measure_dense(case, results)["loss"], **answers}


def measure_dense(case: Case, results: Results) -> dict[str, Any]:
    """Return the record of the dense model."""

    def make() -> dict[str, Any]:
        answers = measure_answers(case.dense) if case.name == "demo" else {}
        return {"loss": measure_loss(case, case.dense), "excess": 0.0, **answers}

    return results.get(f"{case.name}/dense", make)


def write_plan(case: Case, keep: float, start: str) -> Path:
    """Write the plan that all starts but the default share; without CLAP no groups live on."""
    path = case.work / f"plan-{keep:g}.json"
    if not path.exists():
        path.write_text(json.dumps(plan_joint(case, keep).to_json()))
    if start not in OWN_GROUPS:
        return path
    plan = json.loads(path.read_text())
    count = read_spec(open_checkpoint(case.dense)).shape.layers[0].kv_heads
    rows = [{"layer": row["layer"], "kv_groups": list(range(count)), "ffn": row["ffn"]} for row in plan["layers"]]
    plain = path.with_name(f"plan-{keep:g}-plain.json")
    plain.write_text(json.dumps({**plan, "layers": rows}))
    return plain


def plan_joint(case: Case, keep: float) -> Plan:
    """Plan depth, then hidden and FFN channels, as the paper cuts all axes together.

    Half of the cut, in logarithms, is layers; half of the rest hidden channels. Groups of dropped layers live on.
    """
    checkpoint = open_checkpoint(case.dense)
    spec, dense = read_spec(checkpoint), read_spec(checkpoint).shape
    windows = read_windows(case.train, load_tokenizer(case.dense), checkpoint.config, (WINDOWS, LENGTH), "text")

    def plan(axis: str, part: float) -> Plan:
        recipe = Recipe(axes=(axis,), keep=part, multiple=STEP, depth="clap", refine=0, trials=0)
        return plan_checkpoint(Compression(checkpoint, spec, windows, recipe))

    count = len(dense.layers)
    gone = max(1, round(count * (1 - math.sqrt(keep))))
    rows = plan("layers", 1 - (gone - 0.5) / count).layers
    hidden = plan("hidden", math.sqrt(keep / (1 - gone / count))).hidden
    full = Plan(hidden, rows)
    for size in range(dense.layers[0].ffn, 0, -STEP):
        sized = replace(full, layers=tuple(replace(row, ffn=row.ffn[:size]) for row in rows))
        if plan_shape(sized, dense).layer_parameters <= keep * dense.layer_parameters:
            break
    narrow = plan_shape(Plan(tuple(range(dense.hidden)), tuple(cut_ffn(rows, count, size))), dense)
    chosen = {row.layer: row.ffn for row in plan("ffn", narrow.layer_parameters / dense.layer_parameters).layers}
    assert all(len(ffn) == size for ffn in chosen.values())
    return replace(full, layers=tuple(replace(row, ffn=chosen[row.layer]) for row in rows))


def cut_ffn(rows: Sequence[LayerPlan], count: int, size: int) -> Iterator[LayerPlan]:
    """Yield all `count` layers with `size` FFN channels."""
    groups = tuple(range(rows[0].group_count))
    for layer in range(count):
        yield LayerPlan(layer, groups, tuple(range(size)))


# Runs


def train(case: Case, results: Results, run: Run) -> tuple[Path, dict[str, Any]]:
    """Return a trained model and its record."""
    start, before = make_start(case, results, run.keep, run.start)
    folder = case.work / run.key.replace("/", "_").replace(" ", "-")

    def make() -> dict[str, Any]:
        teacher = () if "ce" in run.flags else ("--teacher", case.dense)
        found = call(
            "recover", start, *teacher, "--text", case.work / run.text, "--tokens", round(run.share * TOKENS),
            "--seed", run.seed, *run.flags, "--no-verify", "-o", folder, "-q",
        )  # fmt: skip
        seen = {name: found[name] for name in ("tokens", "rate", "seconds", "peak_rss_bytes")}
        return {**seen, **describe_gain(before, measure(case, results, folder))}

    return folder, results.get(f"{case.name}/run/{run.key}", make)


def describe_gain(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what a model has reached, and the share of the start's excess that is closed."""
    return {**after, "before": before["excess"], "closed": 1 - after["excess"] / before["excess"]}


def merge(case: Case, results: Results, runs: Sequence[Run]) -> None:
    """Merge runs from one start and record what came of it."""
    start, before = make_start(case, results, runs[0].keep, runs[0].start)
    folders = [train(case, results, run)[0] for run in runs]
    seeds = "+".join(str(run.seed) for run in runs)
    folder = case.work / f"merged-{runs[0].keep:g}-{runs[0].start}-{runs[0].share:g}-{seeds}"

    def make() -> dict[str, Any]:
        call("recover", start, "--merge", ",".join(map(str, folders)), "--no-verify", "-o", folder, "-q")
        return describe_gain(before, measure(case, results, folder))

    results.get(f"{case.name}/run/{replace(runs[0], seed=0).key.replace('seed 0', f'merged {seeds}')}", make)


def run_all(case: Case, results: Results, runs: Sequence[Run], seeds: int) -> None:
    """Make the runs with each seed."""
    for seed in range(seeds):
        for run in runs:
            train(case, results, replace(run, seed=seed))


def close_default(case: Case, results: Results, keep: float, seeds: int) -> None:
    """What is left after the default recipe, and how much of it training takes away."""
    run_all(case, results, [Run(keep, "default")], seeds)


def compare_starts(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Starts against each other: the same plan, the same tokens."""
    run_all(case, results, [Run(keep, start) for start in ("default", "good", "plain")], seeds)


def compare_parts(case: Case, results: Results, keep: float, seeds: int) -> None:
    """What of the good start does the work: CLAP, SLNP, the repair."""
    run_all(case, results, [Run(keep, start) for start in STARTS if start != "default"], seeds)


def compare_losses(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Distillation against training on the text, and both."""
    flags = [(), ("--loss", "ce"), ("--loss", "mix")]
    run_all(case, results, [Run(keep, "default", flag) for flag in flags], seeds)


def compare_offline(case: Case, results: Results, keep: float, seeds: int) -> None:
    """The teacher in the loop against its top tokens on disk; the second reading of a cache loads no teacher at all."""
    cached = ("--offline", "--cache", str(case.work / f"scores-{keep:g}"))
    for seed in range(seeds):
        train(case, results, Run(keep, "default", seed=seed))
        own = (cached[0], cached[1], f"{cached[2]}-{seed}")
        train(case, results, Run(keep, "default", own, seed))
        train(case, results, Run(keep, "default", (*own, "--eval-steps", "1000"), seed))


def compare_merges(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Two runs of half the tokens, merged, against one of all tokens; and the mean of runs of all tokens."""
    del seeds
    train(case, results, Run(keep, "default"))
    merge(case, results, [Run(keep, "default", seed=seed, share=0.5) for seed in (1, 2)])
    merge(case, results, [Run(keep, "default", seed=seed) for seed in (0, 1)])


def compare_rates(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Learning rates above the default, and more steps from the same tokens by smaller batches."""
    flags = ["", "--lr 3e-3", "--lr 1e-2", "--batch 2", "--batch 2 --lr 3e-3"]
    run_all(case, results, [Run(keep, "default", tuple(flag.split())) for flag in flags], seeds)


def compare_amounts(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Three times the tokens, at the default rate and above it."""
    run_all(case, results, [Run(keep, "default", flag, share=3.0) for flag in [(), ("--lr", "3e-3")]], seeds)


def compare_rounds(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Off-policy distillation on answers against rounds on the student's own, at equal tokens (demo only)."""
    if case.name == "demo":
        text = write_answers(case).name
        flags = ["", "--rounds 2 --answer-tokens 16", "--loss ce"]
        run_all(case, results, [Run(keep, "default", tuple(flag.split()), text=text) for flag in flags], seeds)


def compare_curriculum(case: Case, results: Results, keep: float, seeds: int) -> None:
    """Easy first against the shuffled order."""
    texts = ["train.txt"] + ([write_answers(case).name] if case.name == "demo" else [])
    for text in texts:
        flags: list[tuple[str, ...]] = [(), ("--curriculum", "easy"), ("--curriculum", "medium")]
        run_all(case, results, [Run(keep, "default", flag, text=text) for flag in flags], seeds)


PARTS = {
    "default": close_default, "starts": compare_starts, "parts": compare_parts, "losses": compare_losses,
    "offline": compare_offline, "merge": compare_merges, "rates": compare_rates, "amounts": compare_amounts,
    "rounds": compare_rounds, "curriculum": compare_curriculum,
}  # fmt: skip

# The tables


def print_tables(results: Results, name: str) -> None:
    """Print all that is known of a checkpoint."""
    dense = results.records[f"{name}/dense"]
    print(f"\n{name}: dense perplexity {math.exp(dense['loss']):.3f}; exact answers, %:{describe_answers(dense)}\n")
    print("| start | kept | shape | perplexity | excess |\n|---|---|---|---|---|")
    for key, record in results.records.items():
        if key.startswith(f"{name}/start/"):
            perplexity = math.exp(record["loss"])
            what = key.removeprefix(f"{name}/start/")
            print(f"| {what} | {record['kept']:.3f} | {record['shape']} | {perplexity:.3f} | {record['excess']:.4f} |")
    print(f"\n| run | excess before | after | closed | seconds | peak MiB | exact answers, % |\n{'|---' * 7}|")
    for key, record in results.records.items():
        if key.startswith(f"{name}/run/"):
            print_run(key.removeprefix(f"{name}/run/"), record)


def print_run(key: str, record: dict[str, Any]) -> None:
    """Print one line of the table of runs."""
    memory = record.get("peak_rss_bytes", 0) / 2**20
    print(
        f"| {key} | {record['before']:.4f} | {record['excess']:.4f} | {100 * record['closed']:.0f} % "
        f"| {record.get('seconds', 0):.0f} | {memory:.0f} |{describe_answers(record)} |"
    )


def describe_answers(record: dict[str, Any]) -> str:
    """Return the shares of questions answered right, if they were asked: all kinds, and each."""
    if "exact" not in record:
        return ""
    shares = {kind: 100 * share for kind, share in record["exact"].items()}
    return f" {statistics.mean(shares.values()):.1f} ({', '.join(f'{kind} {x:.0f}' for kind, x in shares.items())})"


def open_case(name: str, books: Path, work: Path) -> Case:
    """Return the case, with its texts written; leaves where the checkpoint is not here."""
    folders = {"stories": SHARED / "checkpoints/stories260K", "demo": ROOT / "compress/demo/checkpoint", "books": books}
    if not folders[name].is_dir():
        print(f"skipped: {folders[name]} is not here")
        sys.exit(0)
    case = Case(name, folders[name].resolve(), (work / name).resolve())
    write_texts(case)
    return case


def main() -> None:
    """Read the command line, make what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["demo", "stories", "books"])
    parser.add_argument("--part", default="starts", help=f"of {', '.join(PARTS)}, with commas; or all")
    parser.add_argument("--keep", default="0.7,0.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--books", type=Path, default=Path("/tmp/books"), help="checkpoint of train_books.py")
    parser.add_argument("--work", type=Path, default=Path("/tmp/recovery"), help="where models are made")
    parser.add_argument("-o", "--output", type=Path, default=Path("/tmp/recovery/results.json"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    case, results = open_case(options.case, options.books, options.work), Results(options.output)
    measure_dense(case, results)
    for keep in map(float, options.keep.split(",")):
        for part in PARTS if options.part == "all" else options.part.split(","):
            PARTS[part](case, results, keep, options.seeds)
    print_tables(results, case.name)


if __name__ == "__main__":
    main()
