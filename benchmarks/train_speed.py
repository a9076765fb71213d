"""Training steps a second: our loop against transformers' model with torch's AdamW (target: at least 0.8x).

    python benchmarks/train_speed.py [--sizes demo,mid] [--losses kl,ce] [--documents 1] [--threads N] [--rounds N]
                                     [--steps N] [--fused] [-o JSON]

demo is the shipped checkpoint (2.9 M parameters); mid a random llama of 8 layers, hidden 512, FFN 1408, vocabulary
8192 (28 M). The student is the teacher with noise on its weights. Both sides take the same steps in float32 on the same
batches of 8 x 256 tokens, one document a row or several (masked, with positions of their own, on both sides): student
forward, KL to the teacher's logits (or cross entropy), backward, gradient norm clipped at 1, AdamW. Ours is
`compress.recover.loop.train` as `recover` runs it, with its pieces of the head; theirs is what a user writes: all
logits at once, `clip_grad_norm_`, `torch.optim.AdamW`. The losses of the first steps must agree. Rounds alternate in
one process; the ratio is the median over rounds. Peak memory is that of a process that runs one side only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from compress.checkpoint import open_checkpoint  # noqa: E402
from compress.recover.data import Batch  # noqa: E402
from compress.recover.loop import LoopOptions, Trainer, train  # noqa: E402
from compress.recover.losses import Objective  # noqa: E402
from compress.recover.model import Frozen, Student  # noqa: E402
from compress.recover.optimizer import AdamOptions  # noqa: E402
from compress.recover.schedule import Schedule  # noqa: E402
from compress.recover.teacher import NoTeacher, OnlineTeacher, Teaching  # noqa: E402
from compress.weights import read_spec  # noqa: E402

TARGET, RATE, CLIP = 0.8, 1e-4, 1.0
ROWS, LENGTH, BATCHES = 8, 256, 4
TOLERANCE = 2e-3  # between the first losses, relative
Step = Callable[[], float]


@dataclass(frozen=True)
class Pair:
    """What both sides train: teacher and student, the loss, documents in a row, whether torch's AdamW is fused."""

    teacher: Path
    student: Path
    loss: str
    documents: int
    fused: bool

    @property
    def words(self) -> list[str]:
        """The pair as words of a command line, in the order of the fields."""
        return [str(self.teacher), str(self.student), self.loss, str(self.documents), str(int(self.fused))]


def read_pair(words: list[str]) -> Pair:
    """Return the pair of such words."""
    teacher, student, loss, documents, fused = words
    return Pair(Path(teacher), Path(student), loss, int(documents), fused == "1")


# Models and batches


def write_pair(size: str, folder: Path, options: argparse.Namespace) -> list[Pair]:
    """Write the student (and the random teacher) and return a pair for each loss."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    teacher = ROOT / "compress/demo/checkpoint" if size == "demo" else write_random(folder / "teacher")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1 + 0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder / "student")
    losses = options.losses.split(",")
    return [Pair(teacher, folder / "student", loss, options.documents, options.fused) for loss in losses]


def write_random(folder: Path) -> Path:
    """Write a random llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_batches(vocabulary: int, count: int) -> Iterator[Batch]:
    """Yield a few batches of random tokens, `count` documents a row, over and over; all but first tokens count."""
    random = torch.Generator().manual_seed(1)
    documents = (torch.arange(LENGTH) * count // LENGTH).expand(ROWS, LENGTH)
    weights = torch.zeros(ROWS, LENGTH)
    weights[:, 1:] = (documents[:, 1:] == documents[:, :-1]).float()
    found = [torch.randint(vocabulary, (ROWS, LENGTH), generator=random) for _ in range(BATCHES)]
    return itertools.cycle([Batch(ids, weights, documents) for ids in found])


# The two sides


def start_ours(pair: Pair) -> Step:
    """Return one step of our loop; it returns the loss."""
    checkpoint = open_checkpoint(pair.student)
    spec = read_spec(checkpoint)
    schedule = Schedule(10**6)  # as good as a constant rate here
    trainer = Trainer(
        Student(checkpoint, spec), Objective(pair.loss), LoopOptions(RATE, schedule, clip=CLIP, adam=AdamOptions())
    )
    steps = train(trainer, open_teaching(pair), make_batches(spec.shape.vocab, pair.documents))
    return lambda: next(steps).loss


def open_teaching(pair: Pair) -> Teaching:
    """Return our teacher, in memory."""
    if pair.loss == "ce":
        return NoTeacher()
    checkpoint = open_checkpoint(pair.teacher)
    return OnlineTeacher(Frozen(checkpoint, read_spec(checkpoint), resident=True))


def start_theirs(pair: Pair) -> Step:
    """Return one step with transformers' model and torch's optimiser; it returns the loss."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32).train()
    teacher = None
    if pair.loss != "ce":
        teacher = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32).eval()
    adam = AdamOptions()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=RATE, betas=adam.betas, eps=adam.eps, weight_decay=adam.decay,
        fused=pair.fused or None,
    )  # fmt: skip
    batches = make_batches(student.config.vocab_size, pair.documents)

    def step() -> float:
        loss = compute_loss(student, teacher, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def compute_loss(student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    """Return the mean KL(teacher || student), or cross entropy without a teacher, in nats per token that counts."""
    inputs, counted = mask_documents(batch), batch.weights[:, 1:] > 0
    logits = student(**inputs, use_cache=False).logits[:, :-1][counted]
    if teacher is None:
        return F.cross_entropy(logits, batch.ids[:, 1:][counted])
    with torch.no_grad():
        wanted = teacher(**inputs, use_cache=False).logits[:, :-1][counted]
    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)


def mask_documents(batch: Batch) -> dict[str, torch.Tensor]:
    """Return transformers' inputs of a batch; with several documents a row, a mask and positions that restart."""
    ids, documents = batch.ids, batch.documents
    if int(documents.max()) == 0:
        return {"input_ids": ids}
    same = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    starts = torch.cat((torch.ones(len(ids), 1), (documents[:, 1:] != documents[:, :-1]).float()), 1)
    places = torch.arange(ids.shape[1])
    positions = places - (places * starts).cummax(1).values.long()
    return {"input_ids": ids, "attention_mask": same, "position_ids": positions}


SIDES = {"ours": start_ours, "theirs": start_theirs}


# Measuring


def race(pair: Pair, rounds: int, steps: int) -> dict[str, Any]:
    """Run both sides in turns; return tokens a second of each round, the ratios and the first losses."""
    sides = {name: start(pair) for name, start in SIDES.items()}
    losses = {name: [step() for _ in range(2)] for name, step in sides.items()}  # a warm-up, too
    for own, other in zip(*losses.values(), strict=True):
        if abs(own - other) > TOLERANCE * abs(other):
            raise SystemExit(f"{pair.loss}: the two sides train different things: losses {losses}")
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):  # who is first changes
            speeds[name].append(time_steps(sides[name], steps))
    ratios = [own / other for own, other in zip(*speeds.values(), strict=True)]
    return {"speeds": speeds, "ratios": ratios, "losses": losses}


def time_steps(step: Step, count: int) -> float:
    """Return tokens a second over `count` steps."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return count * ROWS * LENGTH / (time.perf_counter() - started)


def measure_peak(pair: Pair, side: str, threads: int) -> int:
    """Return the most memory of a process that makes three steps of one side, in bytes."""
    command = [sys.executable, __file__, "--side", side, "--threads", str(threads), "--pair", *pair.words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def run_side(options: argparse.Namespace) -> None:
    """Make three steps of one side and print the peak memory of this process in bytes."""
    step = SIDES[options.side](read_pair(options.pair))
    for _ in range(3):
        step()
    print(read_peak())


def read_peak() -> int:
    """Return the peak memory of this process in bytes.

    Linux counts that of the process which started this one into `ru_maxrss`, but not into VmHWM.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_row(size: str, pair: Pair, found: dict[str, Any]) -> None:
    """Print one line of the table."""
    speeds = {name: statistics.median(values) for name, values in found["speeds"].items()}
    ratios, peaks = found["ratios"], found["peaks"]
    ratio = statistics.median(ratios)
    print(
        f"| {size} | {pair.loss} | {speeds['ours']:.0f} | {speeds['theirs']:.0f} "
        f"| {ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {'met' if ratio >= TARGET else 'MISSED'} "
        f"| {peaks['ours'] / 2**20:.0f} | {peaks['theirs'] / 2**20:.0f} |",
        flush=True,
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="demo,mid")
    parser.add_argument("--losses", default="kl,ce")
    parser.add_argument("--documents", type=int, default=1, help="in a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW on their side")
    parser.add_argument("-o", "--output", type=Path, help="JSON of all that was measured")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--pair", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table, and write all rounds where that is asked for."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.side:
        run_side(options)
        return
    print(f"{options.threads} threads, {ROWS} x {LENGTH} tokens, {options.rounds} rounds of {options.steps} steps\n")
    print("| model | loss | ours, tokens/s | transformers + torch | ratio | target 0.8 | MiB, ours | theirs |")
    print("|---" * 8 + "|", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            for pair in write_pair(size, Path(folder) / size, options):
                found = race(pair, options.rounds, options.steps)
                found["peaks"] = {side: measure_peak(pair, side, options.threads) for side in SIDES}
                results[f"{size}/{pair.loss}"] = found
                print_row(size, pair, found)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
