"""Recovery by two real processes over gloo, held against one process: `torchrun` starts this very file as a script."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import cli.distributed
from cli.app import app
from cli.distributed import check_place, end_together
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from compress.parallel import ALONE, Group, join_group
from compress.recover.data import Batch
from compress.recover.loop import LoopOptions, Trainer, measure_loss, train
from compress.recover.lora import LoraOptions
from compress.recover.losses import CE, KL, MIX, Objective
from compress.recover.model import Frozen, Student, StudentOptions
from compress.recover.optimizer import AdamOptions
from compress.recover.parallel import own_part, span_rows
from compress.recover.parallel_data import check_rows, take_rows
from compress.recover.schedule import WSD, Schedule
from compress.recover.state import find_state, load_state, read_curve, save_state
from compress.recover.teacher import (
    CachedTeacher,
    NoTeacher,
    OnlineTeacher,
    Teaching,
    fill_cache,
    open_cache,
    plan_cache,
)
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parents[1]
STEPS, STOP, ROWS, LENGTH, VOCABULARY = 6, 3, 4, 20, 97
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
UNEVEN = {"1": {"intermediate_size": 25, **HEADS}, "2": {"intermediate_size": 8}}


@dataclass(frozen=True)
class Manner:
    """One way to train: the family, what changes in its config, objective, student and loop."""

    case: str
    changes: dict[str, Any] = field(default_factory=dict)
    objective: Objective = Objective()
    student: StudentOptions = StudentOptions()
    loop: LoopOptions = LoopOptions(3e-3, Schedule(STEPS))
    offline: bool = False
    exact: float = 1e-5  # how far the curves may lie apart


# 97 rows of 48 on two processes: neither vocabulary nor widths of uneven layers divide evenly.
MANNERS = {
    "untied, uneven": Manner(
        "glm4",
        {"per_layer_config": UNEVEN},
        Objective(MIX, 0.7, ((1, 1), (3, 2))),
        loop=LoopOptions(3e-3, Schedule(STEPS, WSD, 2), 2, 0.3, 0.9, adam=AdamOptions(decay=0.1)),
    ),
    "tied": Manner("gemma2", {}, Objective(CE), StudentOptions(run_again=True)),
    "adapters": Manner(
        "phi3", {"per_layer_config": UNEVEN}, Objective(KL), StudentOptions(LoraOptions(2), run_again=True)
    ),
    "adapters kept": Manner("llama-biases", {}, Objective(KL), StudentOptions(LoraOptions(3, roles=("q", "down")))),
    "offline": Manner("llama", {"per_layer_config": UNEVEN}, offline=True),
    # Rows side by side are rounded otherwise than the same rows alone.
    "bf16": Manner("qwen3", loop=LoopOptions(3e-3, Schedule(STEPS), bf16=True), exact=3e-2),
}
SCORES = ("scores", "scores-two")
RESUMED = ("untied, uneven", "tied", "adapters")


def make_batch(number: int) -> Batch:
    """Rows of two or three documents and padding; in every third batch the last two rows count nothing."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    weights = (torch.rand(ROWS, LENGTH, generator=generator) > 0.2).float()
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for row in range(ROWS):
        documents[row, 4 + row :] = 1
        documents[row, 12:] += row % 2
    weights[:, 0] = weights[:, -3:] = 0
    weights[1:, 1:] *= torch.tensor([0.0 if number % 3 == 2 and row > 1 else 1.0 for row in (1, 2, 3)])[:, None]
    return Batch(ids, weights, documents)


def yield_batches(start: int = 0):
    while True:
        yield make_batch(start)
        start += 1


def open_tiny(folder: Path):
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_spec(checkpoint)


def make_trainer(manner: Manner, folder: Path, group: Group) -> Trainer:
    student = Student(*open_tiny(folder / "student"), replace(manner.student, group=group))
    return Trainer(student, manner.objective, manner.loop)


def make_teaching(manner: Manner, folder: Path) -> Teaching:
    if manner.offline:
        return CachedTeacher(folder / "scores", plan_scores(manner))
    taps = [other for _, other in manner.objective.matches]
    return OnlineTeacher(Frozen(*open_tiny(folder / "teacher"), True), taps) if manner.objective.taught else NoTeacher()


def plan_scores(manner: Manner):
    return plan_cache({}, VOCABULARY, STEPS * manner.loop.accumulate, 2**16 // 2)


def run(trainer: Trainer, teaching: Teaching, count: int | None = None) -> list[list[float]]:
    """Train `count` steps (None: to the end); return losses and norms."""
    steps = train(trainer, teaching, yield_batches(trainer.history.batches))
    return [[report.loss, report.norm] for report in islice(steps, count)]


def finish(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the running mean, if there is one, as the final weights."""
    if trainer.average is not None:
        trainer.average.swap(trainer.optimizer.parameters)
    return {name: tensor.clone() for name, tensor in trainer.student.stored()}


def go(manner: Manner, folder: Path, group: Group, kind: str) -> None:
    """Train twice: to the end with a state on the way, and from the other kind's state; rank 0 leaves the results."""
    teaching, held = make_teaching(manner, folder), [make_batch(100), make_batch(101)]
    trainer = make_trainer(manner, folder, group)
    before = measure_loss(trainer.student, held)
    curve = run(trainer, teaching, STOP)
    save_state(folder / kind, trainer)
    curve += run(trainer, teaching)
    facts = {"curve": curve, "heldout": [before, measure_loss(trainer.student, held)]}
    parameters = list(trainer.student.parameters())
    held_here = sum(own_part(one).numel() for one in parameters)
    facts["parts"] = group.gather([held_here, sum(one.numel() for one in parameters)])
    leave(folder, kind, facts, finish(trainer), group)


def go_on(manner: Manner, folder: Path, group: Group, kind: str, other: str) -> None:
    """Resume the other kind's run."""
    trainer = make_trainer(manner, folder, group)
    state = find_state(folder / other)
    assert state is not None
    load_state(state, trainer)
    curve = run(trainer, make_teaching(manner, folder))
    leave(folder, f"{kind}-resumed", {"curve": curve}, finish(trainer), group)


def leave(folder: Path, kind: str, facts: dict[str, Any], weights: dict[str, torch.Tensor], group: Group) -> None:
    if group.first:
        (folder / f"{kind}.json").write_text(json.dumps(facts))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{kind}.safetensors")


def work(root: Path) -> None:
    """What each of the two processes does."""
    torch.set_grad_enabled(False)
    with join_group() as group:
        for name, manner in MANNERS.items():
            go(manner, root / name, group, "two")
            if name in RESUMED:
                go_on(manner, root / name, group, "two", "one")
            if manner.offline:
                fill_scores(manner, root / name, "scores-two", group)
        (root / f"ending-{group.rank}").write_text(end_badly(group))


def fill_scores(manner: Manner, folder: Path, name: str, group: Group) -> None:
    """Let the teacher score all batches, in three shards."""
    plan, scores = plan_scores(manner), folder / name
    if group.first:
        open_cache(scores, plan)
    fill_cache(scores, plan, Frozen(*open_tiny(folder / "teacher")), yield_batches, lambda *step: None, group)


def end_badly(group: Group) -> str:
    """Return how a mistake that every process finds ends this one."""
    try:
        with end_together(group):
            raise UserError("a mistake")
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__} {error}"


# The tests

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no torch.distributed with gloo",
)


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module in two processes, as a user does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all manners, each run by one process and by two, and some by each from the other's state."""
    root = tmp_path_factory.mktemp("parallel")
    for name, manner in MANNERS.items():
        make_checkpoint(root / name / "student", manner.case, vocab_size=VOCABULARY, **manner.changes)
        make_checkpoint(root / name / "teacher", manner.case, vocab_size=VOCABULARY, rms_norm_eps=0.1)
        if manner.offline:
            fill_scores(manner, root / name, "scores", ALONE)
        go(manner, root / name, ALONE, "one")
    done = launch(str(Path(__file__).resolve()), str(root))
    assert done.returncode == 0, done.stderr
    for name in RESUMED:
        go_on(MANNERS[name], root / name, ALONE, "one", "two")
    return root


def read(folder: Path, kind: str):
    return json.loads((folder / f"{kind}.json").read_text()), load_file(folder / f"{kind}.safetensors")


def assert_same(weights, others, bound):
    assert set(weights) == set(others)
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MANNERS)
def test_two_processes_train_as_one_does(name, runs):
    (one, weights), (two, others) = read(runs / name, "one"), read(runs / name, "two")
    manner = MANNERS[name]
    assert len(one["curve"]) == STEPS
    (losses, norms), (others_losses, others_norms) = (list(zip(*kind["curve"], strict=True)) for kind in (one, two))
    assert others_losses == pytest.approx(losses, abs=manner.exact)
    assert others_norms == pytest.approx(norms, rel=10 * manner.exact)
    assert two["heldout"] == pytest.approx(one["heldout"], abs=manner.exact)
    assert one["heldout"][0] != one["heldout"][1]
    assert_same(weights, others, 1e-5 if manner.exact < 1e-4 else 1e-2)
    if manner.loop.average:
        assert one["curve"][0][1] > manner.loop.clip  # else the clip would not have been tried


@pytest.mark.parametrize("name", MANNERS)
def test_each_process_holds_about_half_of_all_parameters(name, runs):
    parts = read(runs / name, "two")[0]["parts"]
    assert sum(own for own, _ in parts) == parts[0][1] == parts[1][1]
    assert max(own for own, _ in parts) < 0.53 * parts[0][1]


@pytest.mark.parametrize("name", RESUMED)
def test_states_go_from_one_process_to_two_and_back(name, runs):
    one, weights = read(runs / name, "one")
    for kind in ("one", "two"):
        resumed, others = read(runs / name, f"{kind}-resumed")
        losses, wanted = ([loss for loss, _ in curve] for curve in (resumed["curve"], one["curve"][STOP:]))
        assert losses == pytest.approx(wanted, abs=1e-5)
        assert_same(weights, others, 1e-5)
    # What each wrote is the same thing: whole tensors under the same names.
    states = [open_checkpoint(find_state(runs / name / kind)) for kind in ("one", "two")]
    first, second = (state.read(set(state.tensors) - {"random"}) for state in states)
    assert_same(first, second, 1e-5)


def test_scores_of_two_processes_are_those_of_one(runs):
    one, two = ({path.name: path.read_bytes() for path in (runs / "offline" / name).iterdir()} for name in SCORES)
    assert len(one) == 1 + 2 * 3
    assert one == two


def test_of_a_mistake_that_all_find_one_process_speaks(runs):
    endings = {(runs / f"ending-{rank}").read_text() for rank in range(2)}
    assert endings == {"UserError a mistake", "SystemExit 2"}


def test_rows_are_shared_evenly_or_refused():
    batch = make_batch(0)
    parts = [take_rows(batch, Group(rank, 2)) for rank in range(2)]
    for name in ("ids", "weights", "documents"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    check_rows(6, Group(size=3))
    with pytest.raises(UserError, match="--batch 4 cannot be shared evenly by 3 processes; give a multiple of 3"):
        check_rows(4, Group(size=3))


# The verb


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenised student, its dense model, and a text."""
    root = tmp_path_factory.mktemp("verb")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, changes in (("dense", {}), ("cut", {"per_layer_config": UNEVEN})):
        make_checkpoint(root / name, "llama", **changes)
        tokenizer.save(str(root / name / "tokenizer.json"))
    words = random.Random(0)
    documents = (" ".join(f"w{words.randint(3, 95)}" for _ in range(words.randint(4, 40))) for _ in range(80))
    (root / "words.txt").write_text("\n<|endoftext|>\n".join(documents))
    return root


def list_arguments(folders: Path, out: Path, *extra: object) -> list[str]:
    given = ["recover", folders / "cut", "--teacher", folders / "dense", "--text", folders / "words.txt", "-o", out]
    given += ["--tokens", 1900, "--batch", 4, "--length", 48, "--lr", 3e-3, "--threads", 1, *extra]
    return [str(one) for one in given]


def start_two(*commands: list[str]) -> list[subprocess.Popen[str]]:
    """Start a process for each command, with what torchrun would tell it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size, started = str(len(commands)), []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "cli", *command]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    return started


def wait_for(processes: list[subprocess.Popen[str]]) -> tuple[list[int | None], list[str]]:
    """Return the exit codes, and the lines of both on stderr that state an error."""
    said = [process.communicate(timeout=200)[1] for process in processes]
    lines = [line for text in said for line in text.splitlines() if line.startswith("lightpress: ")]
    return [process.returncode for process in processes], lines


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """What one process makes of the request."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = CliRunner().invoke(app, list_arguments(folders, out, "--offline", "--no-verify"))
    assert done.exit_code == 0, done.stderr
    return out


def assert_same_output(out: Path, alone: Path) -> None:
    weights, others = (load_file(folder / "model.safetensors") for folder in (alone, out))
    assert_same(weights, others, 1e-5)
    curves = [[float(row["loss"]) for row in read_curve(folder / "recovery.csv")] for folder in (alone, out)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert len(curves[0]) == 10


def test_torchrun_recovers_as_one_process_does(folders, alone, tmp_path):
    out = tmp_path / "out"
    command = list_arguments(folders, out, "--offline", "--json", "--no-verify", "--save-steps", 4)
    done = launch("-m", "cli", *command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 10  # one object: the others are silent
    assert done.stderr.count("Reading the text.") == 1
    assert_same_output(out, alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupt_of_one_process_stops_all_and_one_goes_on_alone(folders, alone, tmp_path):
    out = tmp_path / "out"
    command = list_arguments(folders, out, "--offline", "--no-verify", "--quiet")
    processes = start_two(command, command)
    deadline = time.monotonic() + 150
    while len(read_curve(tmp_path / "out.training" / "loss.csv")) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGINT)
    codes, lines = wait_for(processes)
    assert codes == [1, 1], lines
    assert len(lines) == 1
    assert "--resume" in lines[0]
    assert not out.exists()
    done = CliRunner().invoke(app, [*command, "--resume"])
    assert done.exit_code == 0, done.stderr
    assert_same_output(out, alone)


@pytest.mark.parametrize(
    ("own", "extra", "sentence"),
    [
        ([], ["--lora", 2, "--alpha", 0.5], "--alpha does nothing"),  # before they meet
        (["--text", "none.txt"], [], "none.txt"),  # what only the second one finds, while the first waits for it
        ([], ["--batch", 0], "'--batch'"),  # on the command line
        ([], ["--device", "tpu"], "--device tpu is not one of"),
    ],
)
def test_mistakes_end_all_processes_with_one_sentence(own, extra, sentence, folders, tmp_path):
    command = list_arguments(folders, tmp_path / "out", *extra)
    codes, lines = wait_for(start_two(command, [*command, *own]))
    assert codes == [2, 2], lines
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_mistakes_in_a_recipe_are_told_once(verb, folders, tmp_path):
    command = [verb, str(folders / "dense"), "--keep", "2", "-o", str(tmp_path / "out")]
    codes, lines = wait_for(start_two(command, command))
    assert (codes, len(lines)) == ([2, 2], 1), lines
    assert "keep" in lines[0]


def test_the_first_process_without_a_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cli.distributed, "GRACE", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_place("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        check_place("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as left:
        check_place("cuda")
    assert left.value.code == 2


def test_devices_that_are_not_there_are_named(folders, tmp_path):
    asked = {"tpu": "--device tpu is not one of cpu, cuda, npu"}
    if not torch.cuda.is_available():
        asked["cuda"] = "--device cuda: torch finds no such device"
    for device, sentence in asked.items():
        done = CliRunner().invoke(app, list_arguments(folders, tmp_path / "out", "--device", device))
        assert (done.exit_code, sentence in done.stderr) == (2, True), done.stderr


def test_shares_are_what_torch_shards():
    for rows in range(8):
        for size in (1, 2, 3, 5):
            wanted = [len(one) for one in torch.zeros(rows).chunk(size)] if rows else []
            spans = [span_rows(rows, place, size) for place in range(size)]
            assert [span.stop - span.start for span in spans if span.stop > span.start] == wanted
            assert spans[-1].stop == rows


if __name__ == "__main__":
    work(Path(sys.argv[1]))
