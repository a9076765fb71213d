"""Distilled data against random, selected and all data: held-out loss after the same short training.

    lightpress compress DENSE --keep 0.7 --trials 0 --refine 0 --repair none --text TEXT -o STUDENT
    python benchmarks/distill.py STUDENT DENSE --data stories=stories.txt --work FOLDER [--seeds 3]
    python benchmarks/distill.py STUDENT DENSE --data demo --work FOLDER

Rows have a prompt and a response, of which only the response counts: a story's first sentence and its second (stories
are separated by <|endoftext|> or two empty lines), or a task of the demo checkpoint and its right answer. Held-out rows
are never seen by any arm. Arms, each of 5 % of the tokens but `all`: random; loss (medium, by the student); gradient
(like 40 of the training rows); rows (the documents that trajectory matching ends with, as they stand); trajectory
(those documents, prompts distilled). Every arm trains the student for the same steps on the same number of rows, with
every rate of --rates; the table has the mean over the seeds, and the lowest and highest. A seed decides which
documents are drawn, the experts, and the order in training. What is in FOLDER/results.json is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from cli.distill import list_barred
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.demo.grammar import KINDS, write_tasks
from compress.recover.data import DataStream, make_options, open_stream
from compress.recover.distill import Request, choose_rows, distil_rows
from compress.recover.functional import load_model
from compress.recover.loop import Diverged, LoopOptions, Trainer, measure_loss, train
from compress.recover.losses import CE, Objective
from compress.recover.model import Frozen, Student
from compress.recover.schedule import Schedule
from compress.recover.teacher import NoTeacher, OnlineTeacher
from compress.recover.trajectory import TrajectoryOptions
from compress.text import load_tokenizer
from compress.weights import read_spec

ALL, ROWS, TRAJECTORY = "all", "rows", "trajectory"
ARMS = (ALL, "random", "loss", "gradient", ROWS, TRAJECTORY)
STORY_ROWS, TASKS, HELD = 800, 200, 200  # rows to train on, tasks of each kind, rows held out
LIKE = 40  # training rows that the gradient arm compares with
LENGTH = 128  # tokens of a row of packed documents

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    checkpoint: Checkpoint
    dense: Checkpoint
    work: Path
    options: argparse.Namespace

    def open(self, path: Path, seed: int = 0) -> DataStream:
        """Open rows as training sees them."""
        size = (self.options.rows, LENGTH)
        made = make_options(self.checkpoint.folder, self.checkpoint.config, size, seed=seed, plain=True)
        return open_stream([path], load_tokenizer(self.checkpoint.folder), made)


def main() -> None:
    """Make the data, run what has not been run, print the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(open_checkpoint(str(options.student)), open_checkpoint(str(options.dense)), options.work, options)
    make_data(bench)
    store = options.work / "results.json"
    results: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name, arm, seed, rate in list_runs(options):
        if name not in results:
            made = make_arm(bench, arm, seed)
            results[name] = {"loss": train_arm(bench, made, seed, rate), **read_facts(made)}
            write_whole(store, json.dumps(results, indent=1))
            print(name, results[name], flush=True)
    print_table(options, results)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--data", required=True, help="demo, or stories=FILE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--objective", default=CE, help="ce, or kl to the dense model")
    parser.add_argument("--rates", default="2e-4,5e-4,1e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--train-steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    for name, value in {"rank": 0, "experts": 1, "expert-steps": 40, "batch": 12, "every": 10, "ahead": 2, "inner": 3,
                        "prompt": 4, "steps": 16, "swaps": 20, "exchanges": 300}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="of TrajectoryOptions")
    parser.add_argument("--expert-rate", type=float, default=5e-4, help="of TrajectoryOptions")
    return parser.parse_args()


def list_runs(options: argparse.Namespace) -> Iterator[tuple[str, str, int, float]]:
    """Yield name, arm, seed and rate of every run."""
    for seed in range(options.seeds):
        for arm in options.arms.split(","):
            for rate in options.rates.split(","):
                yield f"{options.objective} {options.train_steps} {arm} {seed} {rate}", arm, seed, float(rate)


# Data


def make_data(bench: Bench) -> None:
    """Write train.jsonl, like.jsonl and held.jsonl, unless they are there."""
    if (bench.work / "held.jsonl").exists():
        return
    kind, _, path = bench.options.data.partition("=")
    rows = list(cut_stories(Path(path).read_text())) if kind == "stories" else list(ask_tasks())
    random.Random(0).shuffle(rows)
    held, rest = rows[:HELD], rows[HELD:]
    write_rows(bench.work / "train.jsonl", rest)
    write_rows(bench.work / "like.jsonl", rest[:LIKE])
    write_rows(bench.work / "held.jsonl", held)


def cut_stories(text: str) -> Iterator[Row]:
    """Yield the first two sentences of each story that has them."""
    for story in re.split(r"<\|endoftext\|>|\n\s*\n\s*\n", text)[: STORY_ROWS + HELD]:
        sentences = re.findall(r"[^.!?]+[.!?]+[\"']?\s*", " ".join(story.split()))
        if len(sentences) > 1:
            yield {"prompt": sentences[0].rstrip(), "response": sentences[1].rstrip()}


def ask_tasks() -> Iterator[Row]:
    """Yield tasks of all kinds with their right answers, no prompt twice."""
    seen = set()
    for kind in KINDS:
        for task in write_tasks(kind, TASKS + HELD // len(KINDS), 1):
            if task.prompt not in seen:
                seen.add(task.prompt)
                yield {"prompt": task.prompt, "response": task.choices[task.answer]}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write JSON lines."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(text)
    work.replace(path)


# Arms


def make_arm(bench: Bench, arm: str, seed: int) -> Path:
    """Return the file that an arm trains on; it is made where it is not there yet."""
    if arm == ALL:
        return bench.work / "train.jsonl"
    path = bench.work / f"{arm}-{seed}.jsonl"
    if not path.exists():
        started = time.perf_counter()
        rows, facts = (restore_rows(bench, seed), {}) if arm == ROWS else choose_arm(bench, arm, seed)
        write_whole(path.with_suffix(".facts"), json.dumps({**facts, "seconds": time.perf_counter() - started}))
        write_rows(path, rows)
    return path


def choose_arm(bench: Bench, arm: str, seed: int) -> tuple[list[Row], dict[str, Any]]:
    """Choose or distil the rows of an arm, as `lightpress distill-data` does."""
    spec, tokenizer = read_spec(bench.checkpoint), load_tokenizer(bench.checkpoint.folder)
    own = {name: getattr(bench.options, name) for name in asdict(TrajectoryOptions()) if name in bench.options}
    request = Request(arm, bench.options.share, seed, trajectory=TrajectoryOptions(seed=seed, **own))
    model, stream = load_model(bench.checkpoint, spec), bench.open(bench.work / "train.jsonl")
    if arm == TRAJECTORY:
        outcome = distil_rows(request, model, stream, tokenizer, list_barred(spec, tokenizer), say_nothing)
    else:
        outcome = choose_rows(request, model, stream, bench.open(bench.work / "like.jsonl"), say_nothing)
    return list(outcome.rows), dict(outcome.facts)


def restore_rows(bench: Bench, seed: int) -> list[Row]:
    """Return the documents that a distilled set started from, as they stand."""
    given = (bench.work / "train.jsonl").read_text().splitlines()
    places = [row["provenance"]["document"] for row in map(json.loads, read_lines(make_arm(bench, TRAJECTORY, seed)))]
    return [json.loads(given[int(place.rpartition(" ")[2]) - 1]) for place in places]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file."""
    return path.read_text().splitlines()


def read_facts(path: Path) -> dict[str, Any]:
    """Return what is known of an arm's rows."""
    facts = path.with_suffix(".facts")
    return {"facts": json.loads(facts.read_text())} if facts.exists() else {}


def say_nothing(what: str, done: int, total: int) -> None:
    """Report no progress."""


# Training


def train_arm(bench: Bench, path: Path, seed: int, rate: float) -> float:
    """Train the student on a file and return its held-out loss in nats; infinite where training diverged."""
    stream, options = bench.open(path, seed), bench.options
    dense = read_spec(bench.dense)
    taught = options.objective != CE
    teaching = OnlineTeacher(Frozen(bench.dense, dense, resident=True)) if taught else NoTeacher()
    student = Student(bench.checkpoint, read_spec(bench.checkpoint))
    schedule = Schedule(options.train_steps, warmup=max(1, options.train_steps // 20))
    trainer = Trainer(student, Objective(options.objective), LoopOptions(rate, schedule))
    try:
        for _ in train(trainer, teaching, stream.batches()):
            pass
    except Diverged:
        return float("inf")
    held = bench.open(bench.work / "held.jsonl")
    count = -(-int(held.token_counts().sum()) // (options.rows * LENGTH))
    return measure_loss(student, islice(held.batches(), count))


# The table


def print_table(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print the held-out losses of every arm and rate, and each arm at its best rate."""
    rates = options.rates.split(",")
    print("arm | " + " | ".join(f"rate {rate}" for rate in rates) + " | best")
    for arm in options.arms.split(","):
        cells = []
        for rate in rates:
            names = [f"{options.objective} {options.train_steps} {arm} {seed} {rate}" for seed in range(options.seeds)]
            cells.append([results[name]["loss"] for name in names])
        best = min(cells, key=mean)
        print(f"{arm} | " + " | ".join(show_cell(cell) for cell in cells) + f" | {show_cell(best)}")


def show_cell(losses: Sequence[float]) -> str:
    """Return the mean, lowest and highest of some losses."""
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


if __name__ == "__main__":
    main()
