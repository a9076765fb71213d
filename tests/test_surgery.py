"""Pass 2 piece by piece: what each fit learns, from which tokens, and that it equals loops over stacked tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import slow_twins
import torch
import torch.nn.functional as F
from refusals import refused
from tiny import FAMILIES, POST_NORM_FAMILIES, make_checkpoint
from torch import Tensor

from compress.calibrate import fill_embeddings
from compress.checkpoint import open_checkpoint
from compress.decoder import apply_norm, compute_logits, make_frame, project
from compress.family import POST_NORMS
from compress.plan import LayerPlan, Plan, keep_everything
from compress.recipe import Recipe
from compress.solve import RIDGE
from compress.spec import ModelSpec
from compress.stats import ordinary_tokens
from compress.surgery import finish, inputs, job, rebuild
from compress.surgery.cut import cut_layer
from compress.surgery.describe import describe_new
from compress.surgery.ends import cut_ends, finish_norm, read_new_head, storage_types
from compress.surgery.finish import fit_final_norm, sample_tokens
from compress.surgery.inputs import Pair, ScaleSums, fit_inputs
from compress.surgery.job import ATTENTION, MLP, Half, Rebuild, Streams, half_inputs, open_streams, start_pruned
from compress.surgery.norms import rescale_norm
from compress.surgery.rebuild import (
    gather_moments,
    make_target,
    rebuild_layers,
    refit_projection,
    run_dense_half,
    run_own_half,
    wanted_change,
)
from compress.surgery.refine import refine_layer, total_error
from compress.text import Windows
from compress.weights import Weights, read_head, read_layer, read_spec

DOUBLE = torch.float64
WINDOWS = Windows(torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(3)), "random")
# The closed forms alone; tests switch on what they are about.
BARE: dict[str, Any] = {"norms": "slnp", "inputs": "none", "repair": "none", "refine": 0, "trials": 0}
HIDDEN = tuple(i for i in range(48) if i % 3 != 1)
NARROW = Plan(HIDDEN, tuple(LayerPlan(i, (0, 2), tuple(range(i % 2, 56, 2))) for i in range(4)))
WIDE = replace(NARROW, hidden=tuple(range(48)))
HALVES = pytest.mark.parametrize("half", [ATTENTION, MLP], ids=["attention", "mlp"])
BIASED = [*FAMILIES, "llama-biases", "llama-tied"]
# Families with norms behind their branches, and biases between projection and norm.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-biases": ("gemma2", {"attention_bias": True}),
    "olmo2-biases": ("olmo2", {"attention_bias": True}),
    "sandwich-biases": ("pangu_sandwich", {"attention_bias": True, "mlp_bias": True}),
}
MULTIPLIER = {"sandwich-biases": 0.4}  # no family has one behind a post-norm yet


@dataclass
class Bench:
    """A job with its streams ahead of the first layer: dense embeddings, and those as written."""

    job: Rebuild
    streams: Streams

    def dense(self, place: int = 0) -> Weights:
        return read_layer(self.job.checkpoint, self.job.old, self.job.plan.layers[place].layer, torch.float32)

    def cut(self, place: int = 0) -> Pair:
        return cut_layer(self.job, place, self.dense(place))

    def tokens(self, name: str) -> Tensor:
        store = getattr(self.streams, name)
        return store.read(0, store.shape[0])

    def disturb(self, size: float = 0.3, seed: int = 1) -> None:
        """Give the pruned stream the errors of earlier layers."""
        self.streams.pruned.write(0, self.tokens("pruned") + size * noise(*self.streams.pruned.shape, seed=seed))

    @property
    def mask(self) -> Tensor:
        """Tokens that count, by the dense stream as it stands."""
        return ordinary_tokens(self.tokens("dense"))[0] & self.streams.counted[:, None]


Open = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a bench for a case and a plan."""
    with ExitStack() as stack:

        def make(
            case: str, plan: Plan = NARROW, dtype: torch.dtype = torch.float32, measured: int = 0, **recipe: Any
        ) -> Bench:
            folder = tmp_path / f"{case} {dtype}"
            if not folder.exists():
                name, changes = VARIANTS.get(case, (case, {}))
                make_checkpoint(folder, name, dtype, **changes)
            checkpoint = open_checkpoint(folder)
            spec, asked = read_spec(checkpoint), Recipe(**{**BARE, **recipe})
            new = describe_new(spec, plan, asked)
            if case in MULTIPLIER:
                spec, new = (replace(model, residual_multiplier=MULTIPLIER[case]) for model in (spec, new))
            made = Rebuild(checkpoint, spec, new, plan, asked, storage_types(checkpoint, spec, new))
            streams = open_streams(stack, made, WINDOWS, measured)
            fill_embeddings(checkpoint, spec, WINDOWS, streams.dense)
            start_pruned(new, WINDOWS, streams, cut_ends(made, ("embed",))["embed"])
            return Bench(made, streams)

        yield make


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def double(weights: Weights) -> Weights:
    return {role: tensor.double() for role, tensor in weights.items()}


def assert_near(found: Tensor, wanted: Tensor, bound: float = 1e-3) -> None:
    """Float32 products against float64 ones, through a solve whose ridge is a thousandth."""
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound * float(wanted.abs().max()))


def equal_weights(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[role], two[role]) for role in one)


# Where the stream starts and ends


@pytest.mark.parametrize("case", BIASED)
def test_the_stream_starts_as_the_dense_one_and_ends_in_the_same_logits(case: str, bench: Open) -> None:
    """Also where a multiplier on embeddings follows the width, which the stored matrices must make up for."""
    b = bench(case, norms="none")
    assert_near(b.tokens("pruned"), b.job.narrow(b.tokens("dense")).double(), 1e-6)
    dense = double(read_head(b.job.checkpoint, b.job.old, torch.float32))
    gain = finish_norm(b.job, b.streams).double() + b.job.new.norm_offset
    wanted = (dense["final_norm"] + b.job.old.norm_offset) * dense["head"]
    assert_near(gain * read_new_head(b.job).double(), wanted[:, list(HIDDEN)], 1e-6)


# What reads the stream


@HALVES
@pytest.mark.parametrize("case", BIASED)
def test_readers_equal_least_squares_on_stacked_tokens(case: str, half: Half, bench: Open) -> None:
    b = bench(case, inputs="lstsq", repair="lstsq")
    b.disturb()
    cut, reference = b.cut()
    before = dict(cut)
    fit_inputs(b.job, b.streams, half, (cut, reference))
    old, start = double(reference), double(before)
    n = apply_norm(b.job.old, old, half.reads, b.tokens("dense").double()[b.mask])
    m = apply_norm(b.job.new, start, half.reads, b.tokens("pruned").double()[b.mask])
    for role in half.readers:
        wanted = project(old, role, n)
        assert float((project(start, role, m) - wanted).norm() / wanted.norm()) > 0.1
        assert float((cut[role] - before[role]).abs().max()) > 0.03
        if f"{role}_bias" not in cut:
            assert_near(cut[role], slow_twins.fit_projection(m, wanted, start[role], RIDGE))
            continue
        weight, shift = slow_twins.fit_with_bias(m, wanted, start[role], RIDGE)
        assert_near(cut[role], weight)
        assert_near(cut[f"{role}_bias"], shift)
    untouched = set(cut) - {name for role in half.readers for name in (role, f"{role}_bias")}
    assert all(cut[role] is before[role] for role in untouched)


@HALVES
@pytest.mark.parametrize("case", FAMILIES)
def test_a_pruned_stream_that_lost_nothing_is_read_without_error(case: str, half: Half, bench: Open) -> None:
    """The dense stream is a rotated copy of the pruned one in a subspace: both norms agree but for the known gain."""
    b = bench(case, inputs="lstsq", repair="lstsq")
    basis = torch.linalg.qr(noise(48, 32, seed=5)).Q
    b.streams.pruned.write(0, noise(8, 32, 32, seed=6))
    b.streams.dense.write(0, b.tokens("pruned") @ basis.T)
    cut, reference = b.cut()
    start = dict(cut)
    fit_inputs(b.job, b.streams, half, (cut, reference))
    n = apply_norm(b.job.old, reference, half.reads, b.tokens("dense"))
    m = apply_norm(b.job.new, cut, half.reads, b.tokens("pruned"))
    for role in half.readers:
        wanted = project(reference, role, n)
        assert float((project(start, role, m) - wanted).norm() / wanted.norm()) > 0.3
        # What is left is the ridge, a thousandth of the inputs' mean square, and gains far below 1.
        assert float((project(cut, role, m) - wanted).norm() / wanted.norm()) < 0.02


@HALVES
@pytest.mark.parametrize("case", BIASED)
def test_the_calibrated_constant_equals_a_loop(case: str, half: Half, bench: Open) -> None:
    b = bench(case, norms="calibrated")
    b.disturb()
    cut, reference = b.cut()
    before = dict(cut)
    fit_inputs(b.job, b.streams, half, (cut, reference))
    if half.reads not in cut:
        assert equal_weights(cut, before)
        return
    offset, kept = b.job.new.norm_offset, list(HIDDEN)
    product = square = 0.0
    old, start = double(reference), double(before)
    dense, pruned = b.tokens("dense").double()[b.mask], b.tokens("pruned").double()[b.mask]
    for x, p in zip(dense, pruned, strict=True):
        wanted, present = apply_norm(b.job.old, old, half.reads, x)[kept], apply_norm(b.job.new, start, half.reads, p)
        product += float(wanted @ present)
        square += float(present @ present)
    assert abs(product / square - 1) > 0.01
    assert_near(cut[half.reads], (start[half.reads] + offset) * (product / square) - offset, 1e-5)
    assert all(cut[role] is before[role] for role in set(cut) - {half.reads})


@pytest.mark.parametrize("case", [case for case in FAMILIES if case != "olmo2"])
def test_the_constant_is_the_mean_of_what_a_cut_does_to_the_norm(case: str, bench: Open) -> None:
    """Methods 1.4: rho = rms(x kept) / rms(x) per token, in 0 .. sqrt(d / d'); no constant is nearer than its mean."""
    b = bench(case, norms="calibrated")
    plain = bench(case, norms="none").cut()[0]["attn_in"].double() + b.job.new.norm_offset
    cut, reference = b.cut()
    b.streams.pruned.write(0, b.job.narrow(b.tokens("dense")))
    fit_inputs(b.job, b.streams, ATTENTION, (cut, reference))
    x = b.tokens("dense").double()[b.mask]
    kept = x[:, list(HIDDEN)]
    rho = (kept.pow(2).mean(-1) / x.pow(2).mean(-1)).sqrt()
    assert float(rho.max()) <= (48 / 32) ** 0.5
    weight = (plain * kept / kept.pow(2).mean(-1, keepdim=True).sqrt()).pow(2).sum(-1)
    factor = (cut["attn_in"].double() + b.job.new.norm_offset) / plain
    assert float(factor.max() - factor.min()) < 1e-5
    assert float(factor.mean()) == pytest.approx(float((rho * weight).sum() / weight.sum()), rel=1e-4)
    assert float(rho.min()) < float(factor.mean()) < float(rho.max())
    assert float(rho.std() / rho.mean()) > 0.02  # one constant cannot be exact


@pytest.mark.parametrize("case", FAMILIES)
def test_slnp_of_equal_gains_is_the_root_of_the_widths(case: str, bench: Open) -> None:
    offset = bench(case).job.new.norm_offset
    gain = torch.full((48,), 0.7) - offset
    assert_near(rescale_norm(gain, gain[:32], offset) + offset, torch.full((32,), 0.7 * 1.5**0.5).double(), 1e-6)


NOTHING = {
    "all channels stay": (WIDE, {"norms": "calibrated", "inputs": "auto", "repair": "lstsq"}),
    "neither asked for": (NARROW, {"norms": "slnp", "inputs": "none", "repair": "lstsq"}),
    "no repair": (NARROW, {"norms": "slnp", "inputs": "lstsq", "repair": "none"}),
}


@pytest.mark.parametrize(("plan", "recipe"), NOTHING.values(), ids=NOTHING)
def test_inputs_stay_where_nothing_is_to_be_fitted(plan: Plan, recipe: dict[str, Any], bench: Open) -> None:
    b = bench("llama-biases", plan, **recipe)
    b.disturb()
    cut, reference = b.cut()
    before = dict(cut)
    fit_inputs(b.job, b.streams, ATTENTION, (cut, reference))
    assert all(cut[role] is tensor for role, tensor in before.items())


def test_no_energy_leaves_the_norm_as_it_is() -> None:
    assert ScaleSums().constant == 1.0
    sums = ScaleSums()
    sums.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
    sums.update(torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert sums.constant == pytest.approx(6 / 11)


def test_a_text_longer_than_needed_is_not_read_to_its_end(bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench("llama", inputs="lstsq", repair="lstsq")
    monkeypatch.setattr(inputs, "batches", lambda *_: ((i, i + 1) for i in range(8)))
    assert inputs.gather_inputs(b.job, b.streams, ATTENTION, b.cut()).count == 8 * 31
    for each, times in ((2, 0), (0, 32 * 64)):  # 64 tokens, and the rest of a window
        monkeypatch.setattr(inputs, "TOKENS_PER_INPUT", each)
        monkeypatch.setattr(inputs, "TOKENS_TIMES_INPUTS", times)
        assert inputs.gather_inputs(b.job, b.streams, ATTENTION, b.cut()).count == 3 * 31


# Both branches of a layer


def run_branch(spec: ModelSpec, index: int, half: Half, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a branch's last projection, its raw output, and what the branch adds to the stream (float64)."""
    entering = half_inputs(spec, index, half, weights, x, make_frame(spec, *x.shape[:2], 0, DOUBLE))
    raw = project(weights, half.projection, entering)
    return entering, raw, apply_norm(spec, weights, half.norm, raw) * spec.residual_multiplier


def fit_twin(repair: str, x: Tensor, goal: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a repair makes of a projection: `x` `[tokens, in]`, `goal` `[tokens, out]`."""
    if repair == "diagonal":
        factors, shifts = torch.tensor(slow_twins.fit_lines(x @ weight.T, goal, bias is None), dtype=DOUBLE).T
        return factors[:, None] * weight, None if bias is None else shifts
    if repair == "bias":
        return weight, None if bias is None else (goal - x @ weight.T).mean(0)
    if bias is not None:
        return slow_twins.fit_with_bias(x, goal, weight, RIDGE)
    return slow_twins.fit_projection(x, goal, weight, RIDGE), None


def damped_goal(model: ModelSpec, half: Half, cut: Weights, x: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Behind a post-norm: what W x / rms should be, for every token and channel on its own."""
    gain = (cut[half.norm] + model.norm_offset) * model.residual_multiplier
    tau, goal = 0.3 * gain.abs().median(), []
    for token, change, factor in zip(x, wanted, scale, strict=True):
        now = cut[half.projection] @ token * factor
        shift = cut[f"{half.projection}_bias"] * factor if f"{half.projection}_bias" in cut else 0.0
        goal.append(now + (change - gain * (now + shift)) * gain / (gain**2 + tau**2))
    return torch.stack(goal)


def repair_twin(b: Bench, half: Half, cut: Weights, tokens: tuple[Tensor, Tensor, Tensor]) -> Weights:
    """The repaired tensors of one branch, from its inputs, the wanted change of the stream and the dense 1 / rms."""
    x, wanted, scale = tokens
    model, repair, bias_role = b.job.new, b.job.recipe.repair, f"{half.projection}_bias"
    if half.norm not in cut:
        fitted = fit_twin(repair, x, wanted / model.residual_multiplier, cut[half.projection], cut.get(bias_role))
        return dict(zip((half.projection, bias_role), fitted, strict=True))
    goal = damped_goal(model, half, cut, x, wanted, scale)
    weight, _ = fit_twin(repair, x * scale, goal, cut[half.projection], None)
    if repair != "lstsq":
        return {half.projection: weight}
    raw = project({**cut, half.projection: weight}, half.projection, x)
    unit = raw * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + model.eps)
    gain = slow_twins.fit_gain(unit, wanted / model.residual_multiplier, cut[half.norm] + model.norm_offset, RIDGE)
    return {half.projection: weight, half.norm: gain - model.norm_offset}


def check_layer(b: Bench, following: int) -> int:
    """Compare the first layer of the new model with loops in float64; return how many tensors moved."""
    model, index, moved = b.job, b.job.plan.layers[0].layer, 0
    d, p, mask = b.tokens("dense").double(), b.tokens("pruned").double(), b.mask
    every = [double(read_layer(model.checkpoint, model.old, i, torch.float32)) for i in range(following)]
    for i in range(index):
        for half in (ATTENTION, MLP):
            d = d + run_branch(model.old, i, half, every[i], d)[2]
    mask, dense = ordinary_tokens(d)[0], every[index]
    cut = double(b.cut()[0])
    found = double(next(rebuild_layers(model, b.streams)))
    for half in (ATTENTION, MLP):
        _, raw, branch = run_branch(model.old, index, half, dense, d)
        own = run_branch(model.old, index, half, dense, p)[2] if not model.narrows else branch
        d = d + branch
        for i in range(index + 1, following) if half is MLP else ():
            for part in (ATTENTION, MLP):
                d = d + run_branch(model.old, i, part, every[i], d)[2]
        targets = {"corrected": d[..., list(model.plan.hidden)] - p, "dense": branch[..., list(model.plan.hidden)]}
        wanted = {**targets, "own": own}[model.recipe.target]
        scale = torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + model.old.eps)
        x = run_branch(model.new, 0, half, {**cut, **{r: found[r] for r in half.readers}}, p)[0]
        fitted = repair_twin(b, half, cut, (x[mask], wanted[mask], scale[mask]))
        for role, tensor in fitted.items():
            if tensor is not None:
                assert_near(found[role], tensor, 5e-3)
                moved += float((found[role] - cut[role]).abs().max()) > 0.02
        p = p + run_branch(model.new, 0, half, found, p)[2]
    return moved


LAYER_CASES = ["llama", "llama-biases", "granite", "glm4", "gemma2", "olmo2", "phi3", *VARIANTS]
TARGETS = [("corrected", NARROW), ("dense", NARROW), ("corrected", WIDE), ("own", WIDE)]


@pytest.mark.parametrize(("target", "plan"), TARGETS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("repair", ["lstsq", "diagonal"])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_a_layer_equals_its_slow_twin(case: str, repair: str, target: str, plan: Plan, bench: Open) -> None:
    axes = ("ffn", "kv") if target == "own" else ("ffn", "kv", "hidden")
    b = bench(case, plan, repair=repair, target=target, axes=axes)
    b.disturb()
    assert check_layer(b, 1) >= 2


@pytest.mark.parametrize("target", ["corrected", "dense", "own"])
@pytest.mark.parametrize("case", ["llama", "llama-biases", "pangu_embedded", "qwen3", "granite"])
def test_moved_biases_equal_their_slow_twin(case: str, target: str, bench: Open) -> None:
    b = bench(case, WIDE, repair="bias", target=target, axes=("ffn", "kv"), biases="own")
    b.disturb()
    assert check_layer(b, 1) == 2


@pytest.mark.parametrize("repair", ["lstsq", "diagonal"])
@pytest.mark.parametrize("target", ["corrected", "own"])
@pytest.mark.parametrize("case", ["llama", "glm4", "olmo2"])
def test_dropped_layers_before_and_after_are_part_of_the_target(
    case: str, target: str, repair: str, bench: Open
) -> None:
    """Layer 1 alone is kept: the dense stream goes through 0 before it, through 2 and 3 ahead of its MLP's repair."""
    plan = replace(WIDE, layers=WIDE.layers[1:2])
    b = bench(case, plan, repair=repair, target=target, axes=("ffn", "kv", "layers"))
    assert check_layer(b, 4) >= 2


@pytest.mark.parametrize("target", ["corrected", "dense"])
@pytest.mark.parametrize("absorbed", [("attn_out",), ("mlp_out",), tuple(POST_NORMS)], ids="-".join)
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_an_absorbed_norm_stays_in_the_dense_half(
    case: str, absorbed: tuple[str, ...], target: str, bench: Open
) -> None:
    """The target is what the dense model does, norm and all; the projection that took the norm in is fitted freely."""
    constants = tuple((role, 1.3) for role in absorbed)
    plan = replace(NARROW, layers=tuple(replace(row, absorbed=constants) for row in NARROW.layers))
    b = bench(case, plan, repair="lstsq", target=target)
    dense, (cut, reference) = b.dense(), b.cut()
    assert set(dense) - set(cut) == set(absorbed) == set(dense) - set(reference)
    for role in absorbed:
        projection, row = POST_NORMS[role][0], b.job.plan.layers[0]
        units, count = {"o": (row.kv_groups, 3), "down": (row.ffn, 56)}[projection]
        columns = slow_twins.inputs_of(list(units), dense[projection].shape[1] // count)
        gain = 1.3 * (dense[role].double() + b.job.old.norm_offset)
        exact = (gain[:, None] * dense[projection].double())[list(HIDDEN)][:, columns]
        assert_near(cut[projection], exact, 1e-6)
    assert check_layer(b, 1) >= 2


def channel_errors(b: Bench, half: Half, cut: Weights) -> tuple[Tensor, Tensor]:
    """Squared error of every output channel before and after a repair in place, summed over tokens one by one."""
    if b.job.recipe.target == "own":
        run_own_half(b.job, b.streams, half, b.dense(), 0)
    run_dense_half(b.job, b.streams, half, b.dense(), 0)
    moments = gather_moments(b.job, b.streams, half, cut, 0, True)
    x, mask, p = b.tokens("inputs"), b.streams.mask, b.tokens("pruned")
    scaled = x * b.streams.scale if half.norm in cut else x
    goal = make_target(b.job, half, cut)(wanted_change(b.job, b.streams, 0, 8, p), scaled, b.streams.scale)[mask]
    before = dict(cut)
    refit_projection(b.job, half, cut, moments)
    free = half.norm not in cut  # behind a post-norm the target counts the bias already
    errors = []
    for weights in (before, cut):
        shift = weights.get(f"{half.projection}_bias", torch.zeros(())) if free else torch.zeros(())
        errors.append((scaled[mask] @ weights[half.projection].T + shift - goal).double().pow(2).sum(0))
    return errors[0], errors[1]


@pytest.mark.parametrize("target", ["corrected", "own"])
@pytest.mark.parametrize("repair", ["lstsq", "diagonal"])
@pytest.mark.parametrize("case", [*BIASED, *VARIANTS])
def test_no_channels_error_rises(case: str, repair: str, target: str, bench: Open) -> None:
    """Methods 2.9.2: no channel's error on the tokens of the fit is larger after it than before."""
    b = bench(case, WIDE, repair=repair, target=target, axes=("ffn", "kv"))
    b.disturb()
    cut = b.cut()[0]
    for half in (ATTENTION, MLP):
        before, after = channel_errors(b, half, cut)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < float(before.sum())


def test_the_pruned_stream_is_what_the_written_weights_make_of_it(bench: Open) -> None:
    b = bench("gemma2", dtype=torch.bfloat16, repair="lstsq", inputs="lstsq", norms="calibrated")
    p = b.tokens("pruned").double()
    for place, weights in enumerate(rebuild_layers(b.job, b.streams)):
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        for half in (ATTENTION, MLP):
            p = p + run_branch(b.job.new, place, half, double(weights), p)[2]
        assert_near(b.tokens("pruned"), p, 1e-5)


# Which tokens teach


def rebuild_all(b: Bench) -> list[Tensor]:
    """All tensors of the new model in their order, the final norm last."""
    tensors = [tensor for weights in rebuild_layers(b.job, b.streams) for tensor in weights.values()]
    return [*tensors, finish_norm(b.job, b.streams)]


EVERYTHING: dict[str, Any] = {"norms": "calibrated", "inputs": "lstsq", "repair": "lstsq", "refine": 2}


@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "olmo2"])
def test_windows_that_measure_teach_nothing(
    case: str, bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed, measured in ((3, 3), (4, 3), (4, 0)):
        b = bench(case, measured=measured, **EVERYTHING)
        others = torch.randint(3, 96, (3, 32), generator=torch.Generator().manual_seed(seed))
        windows = Windows(torch.cat((WINDOWS.ids[:5], others)), "other")
        fill_embeddings(b.job.checkpoint, b.job.old, windows, b.streams.dense)
        start_pruned(b.job.new, windows, b.streams, cut_ends(b.job, ("embed",))["embed"])
        found.append(rebuild_all(b))
    assert all(torch.equal(one, two) for one, two in zip(found[0], found[1], strict=True))
    changed = [not torch.equal(one, two) for one, two in zip(found[1], found[2], strict=True)]
    assert sum(changed) > len(changed) / 2
    assert changed[-1]


def test_a_repair_that_the_plan_leaves_nothing_to_do_is_refused(bench: Open) -> None:
    refused(lambda: bench("llama", target="own", axes=("ffn", "kv")), "--target own", "hidden", "corrected")
    refused(lambda: bench("glm4", repair="bias", biases="own"), "--repair bias", "norm stands behind", "--absorb all")
    everything = tuple((role, 1.0) for role in POST_NORMS)
    rows = tuple(replace(row, absorbed=everything) for row in NARROW.layers)
    bench("glm4", replace(NARROW, layers=rows), repair="bias", biases="own")


@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "olmo2"])
def test_sinks_and_first_tokens_teach_nothing(case: str, bench: Open) -> None:
    """What the pruned stream holds there moves no fit of what reads it, of the MLP, nor of the final norm."""

    def fit(places: Sequence[tuple[int, int]]) -> list[Tensor]:
        b = bench(case, **EVERYTHING)
        dense, pruned = b.tokens("dense"), b.tokens("pruned")
        dense[2, 7, 5] = 1e4  # a sink
        for window, spot in places:
            pruned[window, spot] = 50 * noise(pruned.shape[-1], seed=spot)
        b.streams.dense.write(0, dense)
        b.streams.pruned.write(0, pruned)
        assert int((~b.mask).sum()) == 9
        b.streams.mask[:] = b.mask
        cut, reference = b.cut()
        final = finish_norm(b.job, b.streams)
        fit_inputs(b.job, b.streams, ATTENTION, (cut, reference))
        fit_inputs(b.job, b.streams, MLP, (cut, reference))
        run_dense_half(b.job, b.streams, MLP, b.dense(), 0)
        rebuild.repair_half(b.job, b.streams, MLP, cut, 0)
        return [final, *(cut[role] for role in ("q", "k", "v", "gate", "up", "down"))]

    plain, silent, loud = fit([]), fit([(2, 7), (0, 0), (5, 0)]), fit([(2, 8)])
    assert all(torch.equal(one, two) for one, two in zip(plain, silent, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(plain, loud, strict=True))


# The final norm


def divergence(b: Bench, tokens: tuple[Tensor, Tensor], ends: Weights, factor: Tensor) -> float:
    """KL(dense || compressed) per token in float64."""
    dense = double(read_head(b.job.checkpoint, b.job.old, torch.float32))
    gain = (ends["final_norm"].double() + b.job.new.norm_offset) * factor - b.job.new.norm_offset
    wanted = compute_logits(b.job.old, dense, tokens[0].double()).log_softmax(-1)
    found = compute_logits(b.job.new, {"final_norm": gain, "head": ends["head"].double()}, tokens[1].double())
    return float(F.kl_div(found.log_softmax(-1), wanted, reduction="sum", log_target=True)) / len(wanted)


@pytest.mark.parametrize("case", BIASED)
def test_the_final_norm_lowers_the_divergence(case: str, bench: Open) -> None:
    b = bench(case, norms="calibrated", repair="lstsq")
    b.disturb(1.0)
    ends = {"final_norm": cut_ends(b.job, ("final_norm",))["final_norm"].float(), "head": read_new_head(b.job)}
    fitted = finish_norm(b.job, b.streams)
    factor = (fitted.double() + b.job.new.norm_offset) / (ends["final_norm"].double() + b.job.new.norm_offset)
    tokens = sample_tokens(b.job, b.streams, 10_000)
    before, after = (divergence(b, tokens, ends, f) for f in (torch.ones(32).double(), factor))
    assert after < 0.999 * before
    assert float(factor.std()) > 1e-3  # each channel has its own


@pytest.mark.parametrize("case", BIASED)
def test_a_known_gain_is_found(case: str, bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is the dense one, the stored gain is off by a factor per channel: the fit takes it back."""
    b = bench(case, WIDE)
    dense = read_head(b.job.checkpoint, b.job.old, torch.float32)
    b.streams.dense.write(0, noise(8, 32, 48, seed=2))
    b.streams.pruned.write(0, b.tokens("dense"))
    offset = b.job.new.norm_offset
    gain = dense["final_norm"] + offset
    for factor in (torch.tensor(0.6), 0.7 + 0.6 * torch.rand(48, generator=torch.Generator().manual_seed(1))):
        if factor.dim():
            monkeypatch.setattr(finish, "PULL", 0.0)
            monkeypatch.setattr(finish, "MOST_STEPS", 300)
        found = fit_final_norm(b.job, b.streams, dense, {**dense, "final_norm": gain * factor - offset})
        assert float((found + offset - gain).abs().max() / gain.abs().max()) < 0.01
    assert_near(fit_final_norm(b.job, b.streams, dense, dense), dense["final_norm"].double(), 1e-5)


@pytest.mark.parametrize("norms", ["none", "slnp", "calibrated"])
def test_the_final_norm_stays_unless_asked_for(norms: str, bench: Open) -> None:
    b = bench("llama", norms=norms, repair="lstsq")
    b.disturb()
    cut = cut_ends(b.job, ("final_norm",))["final_norm"]
    assert torch.equal(finish_norm(b.job, b.streams), cut) == (norms != "calibrated")


def test_the_final_fit_is_the_same_and_silent_where_gradients_are_on(bench: Open) -> None:
    """As in the command, which does not switch them off; the tests do (conftest.py)."""
    b = bench("llama", norms="calibrated", repair="lstsq")
    b.disturb()
    wanted = finish_norm(b.job, b.streams)
    with torch.enable_grad():
        found = finish_norm(b.job, b.streams)
    assert torch.equal(found, wanted)
    assert not found.requires_grad


@pytest.mark.parametrize("count", [1, 8, 50, 10_000])
def test_tokens_of_the_final_norm_are_spread_over_the_windows(count: int, bench: Open) -> None:
    b = bench("llama", measured=2)
    marks = torch.arange(8 * 32, dtype=torch.float32).reshape(8, 32, 1)
    b.streams.dense.write(0, marks + torch.tensor([1.0, 2.0] * 24))
    b.streams.pruned.write(0, marks.expand(-1, -1, 32))
    dense, pruned = sample_tokens(b.job, b.streams, count)
    assert torch.equal(dense[:, 0] - 1, pruned[:, 0])  # the same tokens of both streams
    spots = pruned[:, 0].long()
    assert len(spots.unique()) == len(spots) == min(count, 6 * 31)
    assert not (spots % 32 == 0).any()
    assert (spots // 32).unique().tolist() == list(range(min(count, 6)))
    assert int((spots // 32).bincount().max() - (spots // 32).bincount().min()) <= 1


# The block-wise solve


def prepare_refinement(b: Bench) -> Weights:
    """Stand both streams as they do when the first layer is refined, and return its weights."""
    b.disturb()
    b.streams.before.write(0, b.tokens("pruned"))
    cut = b.cut()[0]
    for half in (ATTENTION, MLP):
        run_dense_half(b.job, b.streams, half, b.dense(), 0)
    return cut


@pytest.mark.parametrize("case", [*BIASED, "smollm3-window"])
def test_the_block_solve_lowers_the_layers_error(case: str, bench: Open) -> None:
    b = bench(case, repair="lstsq", refine=12)
    cut, usable = prepare_refinement(b), torch.arange(8)
    kept = {role: tensor.clone() for role, tensor in cut.items()}
    refined = refine_layer(b.job, b.streams, cut, 0)
    assert equal_weights(cut, kept)
    before, after = (total_error(b.job, b.streams, weights, 0, usable) for weights in (cut, refined))
    assert after < 0.9 * before
    assert all(refined[role].dtype == torch.float32 and not refined[role].requires_grad for role in cut)
    assert not any(torch.equal(refined[role], cut[role]) for role in cut if role != "k_bias")


def test_the_error_of_a_layer_is_relative_by_token(bench: Open) -> None:
    b = bench("llama-biases", repair="lstsq", refine=1)
    cut = prepare_refinement(b)
    p, wanted = b.tokens("before").double(), b.tokens("dense")[..., list(HIDDEN)].double()
    for half in (ATTENTION, MLP):
        p = p + run_branch(b.job.new, 0, half, double(cut), p)[2]
    total = 0.0
    for group in (slice(0, 4), slice(4, 8)):
        floor = 1e-3 * wanted[group].pow(2).mean()
        for after, goal in zip(p[group].flatten(0, 1), wanted[group].flatten(0, 1), strict=True):
            total += float((after - goal).pow(2).mean() / (goal.pow(2).mean() + floor))
    found = total_error(b.job, b.streams, cut, 0, torch.arange(8))
    assert found == pytest.approx(total / (8 * 32), rel=1e-4)


def test_the_block_solve_follows_its_seed(bench: Open) -> None:
    found = []
    for seed in (0, 0, 1):
        b = bench("qwen3", repair="lstsq", refine=3, seed=seed)
        found.append(refine_layer(b.job, b.streams, prepare_refinement(b), 0))
    assert equal_weights(found[0], found[1])
    assert not torch.equal(found[0]["down"], found[2]["down"])


def test_the_block_solve_learns_from_counted_windows_only(bench: Open) -> None:
    found = []
    for value in (0.0, float("nan")):
        b = bench("gemma2", repair="lstsq", refine=6, measured=3)
        cut = prepare_refinement(b)
        for name in ("before", "dense"):
            getattr(b.streams, name).write(5, torch.full_like(b.tokens(name)[5:], value))
        found.append(refine_layer(b.job, b.streams, cut, 0))
    assert equal_weights(*found)
    assert not torch.equal(found[0]["down"], cut["down"])


def test_the_block_solve_is_for_small_models_and_the_full_repair(bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"repair": "lstsq", "target": "corrected"}
    assert bench("llama", refine=-1, **full).job.refine_steps == job.REFINE_STEPS > 0
    assert bench("llama", refine=-1, **{**full, "repair": "diagonal"}).job.refine_steps == 0
    assert bench("llama", refine=-1, **{**full, "target": "dense"}).job.refine_steps == 0
    assert bench("llama", refine=7, **full).job.refine_steps == 7
    small = bench("llama").job.old.shape.layer_parameters
    for bound, steps in ((small, job.REFINE_STEPS), (small - 1, 0)):
        monkeypatch.setattr(job, "SMALL_MODEL", bound)
        assert bench("llama", refine=-1, **full).job.refine_steps == steps


def test_no_steps_change_nothing(bench: Open) -> None:
    b = bench("llama")
    assert b.streams.before.shape[2] == 0  # nor take memory
    assert equal_weights(next(rebuild_layers(b.job, b.streams)), bench("llama").cut()[0])
    closed, refined = (bench("llama", repair="lstsq", refine=steps) for steps in (0, 2))
    one, two = (next(rebuild_layers(b.job, b.streams)) for b in (closed, refined))
    assert not torch.equal(one["down"], two["down"])


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "granite"])
def test_the_block_solve_leaves_layers_that_lost_nothing(case: str, bench: Open) -> None:
    """Steps have the size of the weights, whatever the error: rounding noise alone would shake an exact layer."""
    full = keep_everything(bench(case).job.old.shape)
    plan = replace(full, layers=(*full.layers[:3], replace(full.layers[3], ffn=tuple(range(0, 56, 2)))))
    b = bench(case, plan, repair="lstsq", refine=3)
    for place, weights in enumerate(rebuild_layers(b.job, b.streams)):
        dense, p = b.tokens("dense"), b.tokens("pruned")
        error = float((p - dense).pow(2).sum() / dense.pow(2).sum())
        if place < 3:
            assert error < 1e-9
            assert all(float((weights[role] - tensor).abs().max()) < 1e-3 for role, tensor in b.dense(place).items())
        else:
            assert error > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_stream_goes_on_from_the_refined_layer_as_it_is_written(dtype: torch.dtype, bench: Open) -> None:
    b = bench("llama-biases", dtype=dtype, repair="lstsq", refine=3)
    p = b.tokens("pruned").double()
    for place, weights in enumerate(rebuild_layers(b.job, b.streams)):
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        for half in (ATTENTION, MLP):
            p = p + run_branch(b.job.new, place, half, double(weights), p)[2]
        assert_near(b.tokens("pruned"), p, 1e-5)
