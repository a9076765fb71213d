"""Two processes calibrate, plan and rebuild together (gloo, started by torchrun's module) what one does alone.

Run as a script this file is what each of the two processes runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from torch import Tensor

from compress.calibrate import ATTENTION, MLP, NORMS, LayerStats, share_text, stream_dense
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.errors import UserError
from compress.hidden import HiddenStore, batches, share_windows
from compress.parallel import ALONE, Group, join_group
from compress.pipeline import Task, check_share, compress_checkpoint, find_slopes, plan_checkpoint
from compress.plan import keep_everything
from compress.recipe import Recipe
from compress.surgery import inputs
from compress.surgery.describe import new_config
from compress.text import Windows
from compress.trials import pick_windows, share_trial
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.randint(3, 96, (64, 64), generator=torch.Generator().manual_seed(3))
PROCESSES = 2
# Of a tensor's largest value; the final norm's fit ends after some evaluations of a float32 loss, wherever it is then.
LIMIT, NORM_LIMIT = 1e-4, 5e-3
EXACT = 1e-12


@dataclass(frozen=True)
class Case:
    """One compression: the tiny model, what the recipe says, how many windows, and when the refit of inputs stops."""

    model: str
    recipe: dict[str, Any] = field(default_factory=dict)
    windows: int = 40  # 32, 8: whole batches of 32 are shared
    enough: int = 2**22
    limit: float = LIMIT


CASES = {
    "plain": Case("llama"),
    "tied": Case("llama-tied", {"norms": "slnp", "refine": 5}),
    "few": Case("llama", {"inputs": "none"}, windows=7, limit=1e-3),  # fewer batches than processes: 4 and 3 windows
    "hidden": Case("qwen3", {"axes": ("hidden",), "keep": 0.75}, enough=2**16),  # 1366 tokens: the first batch only
    "uneven": Case("qwen2", {"shapes": "per-layer", "trials": 2}),
    "clap": Case("llama", {"depth": "clap", "axes": ("kv", "layers"), "keep": 0.55}),
    "sandwich": Case("gemma2", {"refine": 2, "spill_bytes": 0}),
    "rotate": Case("gemma3_text", {"absorb": "all", "rotate": "pca"}),
    "taylor": Case("llama-biases", {"score": "taylor", "repair": "diagonal"}, windows=9, limit=1e-3),
}
# Cases whose gradients hold the streams of a few windows at all layers.
BACKWARD = ("uneven", "taylor")
# Sums: a plain model and one with norms behind its branches.
SUMMED = ("llama", "gemma2")


def open_task(folder: Path, case: Case, group: Group) -> Task:
    checkpoint = open_checkpoint(folder)
    recipe = Recipe(**{"keep": 0.6, "multiple": 8, "refine": 0, "trials": 0, **case.recipe})
    return Task(checkpoint, read_spec(checkpoint), Windows(IDS[: case.windows], "random"), recipe, group=group)


def run_case(dense: Path, case: Case, out: Path, group: Group) -> dict[str, Any]:
    """Plan and rebuild; return the plan. Only the first process writes."""
    inputs.TOKENS_TIMES_INPUTS = case.enough
    task = open_task(dense, case, group)
    plan = plan_checkpoint(task)
    if not group.first:
        compress_checkpoint(task, plan, None)
    else:
        with CheckpointWriter(out, new_config(task.spec, plan, task.recipe), task.recipe.shard_bytes) as writer:
            compress_checkpoint(task, plan, writer)
            writer.finish()
    return plan.to_json()


def stream_stats(dense: Path, windows: Windows, group: Group = ALONE) -> Iterator[LayerStats]:
    """All statistics of pass 1 over `windows`, which are this process's."""
    checkpoint = open_checkpoint(dense)
    spec = read_spec(checkpoint)
    with HiddenStore((*windows.ids.shape, spec.shape.hidden)) as store:
        yield from stream_dense(checkpoint, spec, windows, store, frozenset({ATTENTION, MLP, NORMS}), group)


def list_sums(stats: LayerStats) -> dict[str, Any]:
    """The objects that can be merged, by name."""
    named = {"attention": stats.attention, "mlp": stats.mlp, "block": stats.block}
    named |= {"attention_reads": stats.attention_reads, "mlp_reads": stats.mlp_reads}
    named |= {f"norm {role}": sums for role, sums in stats.norms.items()}
    for role, sums in stats.post_norms.items():
        named |= {f"{role} ordinary": sums.ordinary, f"{role} sinks": sums.sinks}
    return named


def spread_numbers(sums: Any) -> dict[str, Tensor]:
    """Every number that an object holds, as float64 tensors by field."""
    return {key: torch.as_tensor(value, dtype=torch.float64) for key, value in vars(sums).items()}


def flatten_stats(stats: LayerStats) -> dict[str, Tensor]:
    """Every number of one layer's statistics."""
    found = {f"{name} {key}": v for name, sums in list_sums(stats).items() for key, v in spread_numbers(sums).items()}
    found |= {"attention_spread": stats.attention_spread, "mlp_spread": stats.mlp_spread}
    found |= {"sinks": torch.tensor([stats.sinks]), "massive": torch.tensor(sorted(stats.massive))}
    return {f"{stats.index} {name}": value.clone() for name, value in found.items()}


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    if not one.numel():
        return 0.0
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))


# What each of the two processes runs


def run_share(folder: Path, group: Group) -> None:
    """Run every case, and leave what was found in `folder` (dense models are there)."""
    held: list[int] = []
    allocate = HiddenStore.__init__

    def count_windows(self: HiddenStore, shape: tuple[int, ...], spill_bytes: int = 2**30) -> None:
        held.append(shape[0])
        allocate(self, shape, spill_bytes)

    HiddenStore.__init__ = count_windows  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        held.clear()
        plan = run_case(folder / case.model, case, folder / f"out-{name}", group)
        plans, most = group.gather(json.dumps(plan)), group.gather(max(held))
        found[name] = {"plan": plan, "same": len(set(plans)) == 1, "held": most}
    for model in SUMMED:
        sums: dict[str, Tensor] = {}
        for stats in stream_stats(folder / model, share_text(group, Windows(IDS[:40], "random")), group):
            sums |= flatten_stats(stats)
        if group.first:
            save_file(sums, folder / f"sums-{model}.safetensors")
    slopes = find_slopes(open_task(folder / "llama", Case("llama", windows=1), group))  # the second process has none
    found["slopes"] = {str(layer): [kv.tolist(), ffn.tolist()] for layer, (kv, ffn) in slopes.items()}
    found["said"] = group.gather(refuse_short(folder / "llama", group))
    if group.first:
        (folder / "found.json").write_text(json.dumps(found))


def refuse_short(dense: Path, group: Group) -> list[str]:
    """What is said where there is one window for two processes."""
    task, said = open_task(dense, Case("llama", windows=1), group), []
    row = replace(keep_everything(task.spec.shape).layers[0], ffn=tuple(range(8)))
    plan = replace(keep_everything(task.spec.shape), layers=(row, *keep_everything(task.spec.shape).layers[1:]))
    for act in (lambda: plan_checkpoint(task), lambda: compress_checkpoint(task, plan, None)):
        try:
            act()
        except UserError as error:
            said.append(str(error))
    return said


# The tests


@dataclass(frozen=True)
class Pair:
    """What one process left and what two left."""

    folder: Path
    plans: dict[str, Any]
    found: dict[str, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("group")
    for model in sorted({case.model for case in CASES.values()} | set(SUMMED)):
        make_checkpoint(folder / model, model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, __file__, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as group:
        try:
            usual, threads = inputs.TOKENS_TIMES_INPUTS, torch.get_num_threads()
            torch.set_num_threads(1)  # as torchrun gives to each: products in more threads round otherwise
            plans = {
                name: run_case(folder / case.model, case, folder / f"alone-{name}", ALONE)
                for name, case in CASES.items()
            }
            inputs.TOKENS_TIMES_INPUTS = usual
            torch.set_num_threads(threads)
            said, _ = group.communicate(timeout=240)
        finally:
            group.kill()
    assert group.returncode == 0, said
    yield Pair(folder, json.loads(json.dumps(plans)), json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_plan_and_the_weights_of_one(pair: Pair, name: str) -> None:
    alone, found = pair.plans[name], pair.found[name]
    assert found["same"], "the two processes have different plans"
    assert [alone[key] for key in ("hidden", "layers")] == [found["plan"][key] for key in ("hidden", "layers")]
    assert alone.keys() == found["plan"].keys()
    one, two = (load_file(pair.folder / f"{kind}-{name}" / "model.safetensors") for kind in ("alone", "out"))
    assert one.keys() == two.keys()
    final = distance(two.pop("model.norm.weight"), one.pop("model.norm.weight"))
    assert final <= NORM_LIMIT
    worst = max((distance(two[key], one[key]), key) for key in one)
    assert worst[0] <= CASES[name].limit, worst


@pytest.mark.parametrize("name", [name for name in CASES if name not in BACKWARD])
def test_a_process_holds_its_share_of_the_hidden_states(pair: Pair, name: str) -> None:
    shares = [len(share_windows(Group(rank, PROCESSES), CASES[name].windows, 64)) for rank in range(PROCESSES)]
    assert pair.found[name]["held"] == shares


@cache
def sum_alone(folder: Path, start: int, stop: int) -> dict[int, dict[str, Any]]:
    return {stats.index: list_sums(stats) for stats in stream_stats(folder, Windows(IDS[start:stop], "random"))}


@pytest.mark.parametrize("model", SUMMED)
def test_reduced_sums_are_those_of_one_process(pair: Pair, model: str) -> None:
    reduced = load_file(pair.folder / f"sums-{model}.safetensors")
    wanted: dict[str, Tensor] = {}
    for stats in stream_stats(pair.folder / model, Windows(IDS[:40], "random")):
        wanted |= flatten_stats(stats)
    assert reduced.keys() == wanted.keys()
    assert max(distance(reduced[key], value) for key, value in wanted.items()) <= EXACT
    assert all(int(value) == 40 * 63 for key, value in wanted.items() if key.endswith("block count"))


@pytest.mark.parametrize("model", SUMMED)
def test_reduced_sums_are_the_merge_of_both_shares(pair: Pair, model: str) -> None:
    reduced = load_file(pair.folder / f"sums-{model}.safetensors")
    shares = [share_windows(Group(rank, PROCESSES), 40, 64) for rank in range(PROCESSES)]
    first, second = (sum_alone(pair.folder / model, own.start, own.stop) for own in shares)
    for layer, sums in first.items():
        for name, half in sums.items():
            for key, value in spread_numbers(half.merge(second[layer][name])).items():
                assert distance(reduced[f"{layer} {name} {key}"], value) <= EXACT, (layer, name, key)


def test_a_process_without_windows_adds_nothing_to_gradients(pair: Pair) -> None:
    wanted = find_slopes(open_task(pair.folder / "llama", Case("llama", windows=1), ALONE))
    assert len(wanted) == 4
    for layer, scores in wanted.items():
        for one, two in zip(scores, pair.found["slopes"][str(layer)], strict=True):
            assert torch.equal(one, torch.tensor(two, dtype=torch.float64))


def test_more_processes_than_windows_are_refused_in_one_sentence(pair: Pair) -> None:
    sentence = (
        "random: 2 processes cannot share 1 calibration window; start at most 1 (--nproc-per-node 1), or give more "
        "text, more --windows or a smaller --length."
    )
    assert pair.found["said"] == [[sentence, sentence]] * 2
    check_share(open_task(pair.folder / "llama", Case("llama", windows=2), Group(1, 2)))


# Shares, without processes


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("windows", [1, 7, 32, 33, 96, 101])
def test_shares_are_neighbours_that_cover_the_text_once(windows: int, size: int) -> None:
    shares = [share_windows(Group(rank, size), windows, 64) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(windows))
    assert all(shares) == (windows >= size)
    if windows > 32 * (size - 1):  # a batch for each: none is cut
        cut = [(share.start + start, share.start + stop) for share in shares for start, stop in batches(len(share), 64)]
        assert cut == list(batches(windows, 64))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_trial_measures_each_window_in_one_process(size: int) -> None:
    windows, most = pick_windows(Windows(IDS, "random"))
    assert (len(windows.ids), most) == (44, 12)
    parts = [share_trial(Group(rank, size), windows, most) for rank in range(size)]
    assert torch.equal(torch.cat([own.ids for own, _ in parts]), windows.ids)
    counted = [place < len(own.ids) - measured for own, measured in parts for place in range(len(own.ids))]
    assert counted == [True] * 32 + [False] * 12


if __name__ == "__main__":
    with torch.no_grad(), join_group() as joined:
        run_share(Path(sys.argv[1]), joined)
