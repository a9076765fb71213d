"""Streamed gradients equal one graph through the whole model; their Fisher information predicts measured divergence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import CASES, make_checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from compress import gradients
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.decoder import (
    attention_branch,
    attention_context,
    compute_logits,
    make_frame,
    mlp_activation,
    mlp_branch,
    run_layer,
)
from compress.errors import UserError
from compress.evaluate import fill_hidden, stream_logits
from compress.gradients import (
    BackwardOptions,
    LayerGradients,
    Sensitivity,
    first_order_scores,
    measure_sensitivity,
    sensitivities,
    stream_backward,
)
from compress.hidden import HiddenStore
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import embed_rows, read_head, read_layer, read_spec

LENGTH = 40  # longer than every sliding window of the tiny models
# Rounding of float32 against float64, as a share of the largest gradient of a tensor.
TOLERANCE = 2e-5
WITH_WEIGHTS = BackwardOptions(weights=True)
BIASED, ONE_NORM_FOR_ALL_HEADS, FUSED = "llama-biases", "olmo2", "phi3"


def open_tiny(folder: Path, case: str, **changes: Any) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(make_checkpoint(folder / case, case, **changes))
    return checkpoint, read_spec(checkpoint)


def draw_windows(count: int, length: int = LENGTH, seed: int = 5) -> Windows:
    return Windows(torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed)), "random ids")


def collect(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, options: BackwardOptions
) -> list[LayerGradients]:
    """All layers, first layer first."""
    return list(stream_backward(checkpoint, spec, windows, options))[::-1]


@dataclass
class Model:
    """The whole model in float64, and what its last run left behind."""

    checkpoint: Checkpoint
    spec: ModelSpec
    streams: list[Tensor] = field(default_factory=list)
    middles: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.spec.layers)
        self.layers = [read_layer(self.checkpoint, self.spec, index, torch.float64) for index in range(count)]
        self.ends = read_head(self.checkpoint, self.spec, torch.float64)

    def run(self, ids: Tensor, place: tuple[int, str] | None = None, error: Tensor | None = None) -> Tensor:
        """Logits of the tokens that have a successor, with `error` added to the stream after one branch."""
        x = embed_rows(self.checkpoint, self.spec, ids, torch.float64)
        frame = make_frame(self.spec, *ids.shape, 0, torch.float64)
        self.streams, self.middles = [x], []
        for index, weights in enumerate(self.layers):
            context, _ = attention_context(self.spec, self.spec.layers[index], weights, x, frame)
            x = x + attention_branch(self.spec, weights, context)
            x = x + error if place == (index, "attention") else x
            self.middles.append(x)
            x = x + mlp_branch(self.spec, weights, mlp_activation(self.spec, weights, x))
            x = x + error if place == (index, "mlp") else x
            self.streams.append(x)
        return compute_logits(self.spec, self.ends, x)[:, :-1]


def differentiate_whole(model: Model, windows: Windows) -> None:
    """Leave the gradients of the summed loss in `.grad` of all streams and weights, from one graph."""
    for weights in model.layers:
        for tensor in weights.values():
            tensor.requires_grad_()
    with torch.enable_grad():
        logits = model.run(windows.ids)
        for stream in (*model.streams, *model.middles):
            stream.retain_grad() if stream.grad_fn else stream.requires_grad_()
        loss = F.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="sum")
    loss.backward()


def assert_near(found: Tensor, wanted: Tensor | None) -> None:
    assert wanted is not None
    assert not found.requires_grad
    assert found.dtype == torch.float32
    assert float(wanted.abs().max()) > 0
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE


# Gradients


@pytest.mark.parametrize("case", CASES)
def test_streamed_gradients_equal_one_graph(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "TOKENS", 2 * LENGTH)  # batches of two windows and one
    monkeypatch.setattr(gradients, "PIECE_TOKENS", 16)  # three pieces to a window
    checkpoint, spec = open_tiny(tmp_path, case)
    windows = draw_windows(3)
    model = Model(checkpoint, spec)
    differentiate_whole(model, windows)
    found = collect(checkpoint, spec, windows, WITH_WEIGHTS)
    assert [layer.index for layer in found] == list(range(len(spec.layers)))
    for layer, weights in zip(found, model.layers, strict=True):
        assert_near(layer.middle, model.middles[layer.index].grad)
        assert_near(layer.after, model.streams[layer.index + 1].grad)
        assert layer.weights.keys() == weights.keys()
        for role, tensor in weights.items():
            assert_near(layer.weights[role], tensor.grad)
            assert torch.equal(layer.values[role], tensor.detach().float())


def test_before_is_the_gradient_by_the_stream_that_enters_a_layer(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, FUSED)
    found = collect(checkpoint, spec, draw_windows(2), BackwardOptions())
    for layer, following in zip(found, found[1:], strict=False):
        assert torch.equal(layer.after, following.before)
    step = 1e-4 * torch.randn(found[0].before.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    windows, model = draw_windows(2), Model(checkpoint, spec)
    losses = [loss_from_embeddings(model, windows.ids, sign * step) for sign in (1, -1)]
    assert (losses[0] - losses[1]) / 2 == pytest.approx(float((found[0].before * step).sum()), rel=1e-3)


def loss_from_embeddings(model: Model, ids: Tensor, shift: Tensor) -> float:
    x = embed_rows(model.checkpoint, model.spec, ids, torch.float64) + shift
    frame = make_frame(model.spec, *ids.shape, 0, torch.float64)
    for layer, weights in zip(model.spec.layers, model.layers, strict=True):
        x, _ = run_layer(model.spec, layer, weights, x, frame)
    logits = compute_logits(model.spec, model.ends, x)[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


def test_weights_are_differentiated_only_when_asked_for(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, BIASED)
    plain, full = (collect(checkpoint, spec, draw_windows(2), x) for x in (BackwardOptions(), WITH_WEIGHTS))
    assert all(not layer.weights for layer in plain)
    assert all(torch.equal(one.middle, two.middle) for one, two in zip(plain, full, strict=True))


def test_streams_in_a_file_give_the_same_gradients(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "gemma2")
    options = (BackwardOptions(weights=True, spill_bytes=size) for size in (2**30, 0))
    held, spilled = (collect(checkpoint, spec, draw_windows(3), each) for each in options)
    for one, two in zip(held, spilled, strict=True):
        assert torch.equal(one.before, two.before)
        assert torch.equal(one.weights["q"], two.weights["q"])
        assert one.energy == two.energy


def test_gradients_of_a_token_do_not_shrink_with_the_text(tmp_path: Path) -> None:
    """The loss is a sum: more windows leave the gradients of the first ones as they are."""
    checkpoint, spec = open_tiny(tmp_path, "qwen3")
    windows = draw_windows(4)
    few, many = (collect(checkpoint, spec, windows.take(count), BackwardOptions()) for count in (1, 4))
    for one, two in zip(few, many, strict=True):
        torch.testing.assert_close(one.middle, two.middle[:1], rtol=1e-4, atol=1e-5)


def test_gradient_mode_and_random_state_stay_as_they_are(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    state = torch.get_rng_state()
    for layer in stream_backward(checkpoint, spec, draw_windows(1), BackwardOptions("sampled", weights=True)):
        assert not torch.is_grad_enabled()
        assert not any(tensor.requires_grad for tensor in (*layer.values.values(), *layer.weights.values()))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_labels_follow_the_seed(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    one, again, other = (
        collect(checkpoint, spec, draw_windows(2), BackwardOptions("sampled", seed=seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a.before, b.before) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0].before, other[0].before)


# Memory and cost


@dataclass(frozen=True)
class WatchedCheckpoint(Checkpoint):
    """Notes how often each layer is read, and how many tensors of layers are held in memory when one is read."""

    reads: dict[str, int] = field(default_factory=dict)
    handed: list[StorageWeakRef] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def read(self, names: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        found = super().read(names, dtype)
        if any("layers" in name for name in found):
            self.held.append(sum(not reference.expired() for reference in self.handed))
            self.handed.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in found.values())
            for name in found:
                self.reads[name] = self.reads.get(name, 0) + 1
        return found


def watch(checkpoint: Checkpoint) -> WatchedCheckpoint:
    return WatchedCheckpoint(checkpoint.folder, checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("weights", [False, True])
def test_one_layer_is_held_at_a_time_and_read_twice(weights: bool, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    watched = watch(checkpoint)
    layers = stream_backward(watched, spec, draw_windows(2), BackwardOptions(weights=weights))
    for layer in layers:
        del layer
    assert watched.held == [0] * 8
    assert {watched.reads[name] for layer in spec.layers for name in layer.names.values()} == {2}


def test_sensitivities_let_each_layer_go(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    watched = watch(checkpoint)
    sensitivities(watched, spec, draw_windows(2))
    assert watched.held == [0] * 8


@pytest.mark.parametrize(("weights", "passes"), [(False, 3), (True, 4)])
def test_cost_in_forward_passes(weights: bool, passes: int, tmp_path: Path) -> None:
    """Products with weights only: fused attention, whose backward is 2.5 times its forward, is not counted."""
    checkpoint, spec = open_tiny(tmp_path, "llama")
    windows = draw_windows(2)
    with FlopCounterMode(display=False) as backward:
        collect(checkpoint, spec, windows, BackwardOptions(weights=weights))
    with HiddenStore((*windows.ids.shape, spec.shape.hidden)) as store, FlopCounterMode(display=False) as forward:
        fill_hidden(checkpoint, spec, windows, store)
        for _ in stream_logits(checkpoint, spec, store):
            pass
    assert backward.get_total_flops() / forward.get_total_flops() == pytest.approx(passes, rel=0.1)


# First-order scores


def loop_scores(found: LayerGradients, units: int, rows: dict[str, tuple[int, int]]) -> list[float]:
    """Scores weight by weight; `rows`: role -> (dimension of the units, size of a unit along it)."""
    scores = [0.0] * units
    for role, (dim, size) in rows.items():
        if role not in found.values:
            continue
        values, slopes = found.values[role].double(), found.weights[role].double()
        if dim == 1:
            values, slopes = values.T, slopes.T
        for place, (row, slope) in enumerate(zip(values, slopes, strict=True)):
            products = [float(w) * float(g) for w, g in zip(row.reshape(-1), slope.reshape(-1), strict=True)]
            scores[place // size] += sum(map(abs, products))
    return scores


@pytest.mark.parametrize("case", [BIASED, ONE_NORM_FOR_ALL_HEADS, FUSED])
def test_scores_equal_a_loop_over_weights(case: str, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, case)
    found = collect(checkpoint, spec, draw_windows(1), WITH_WEIGHTS)[1]
    kv, ffn = first_order_scores(found.weights, found.values, spec, 1)
    query, head = 16, 8  # two query heads of 8 share a group
    attention = {"q": (0, query), "q_bias": (0, query), "o": (1, query)}
    attention |= {role: (0, head) for role in ("k", "v", "k_bias", "v_bias")}
    mlp = {"down": (1, 1)} | {role: (0, 1) for role in ("gate", "up", "gate_bias", "up_bias")}
    assert kv.tolist() == pytest.approx(loop_scores(found, 3, attention), rel=1e-5)
    assert ffn.tolist() == pytest.approx(loop_scores(found, 56, mlp), rel=1e-5)


def test_summed_products_of_up_and_down_are_equal(tmp_path: Path) -> None:
    """Both are what scaling the channel's activation does to the loss (Euler): a check that needs no second code."""
    checkpoint, spec = open_tiny(tmp_path, "llama")
    found = collect(checkpoint, spec, draw_windows(2), WITH_WEIGHTS)[2]
    products = {role: (found.weights[role] * found.values[role]).double() for role in ("up", "down")}
    one, two = products["up"].sum(1), products["down"].sum(0)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


# Fisher information


@dataclass
class Fitted:
    """A model, each layer's sensitivity as the mean over draws of labels, and one Fisher matrix per token.

    `matrix` is that of the stream after the attention of layer 1, summed over the ordinary tokens of all draws.
    """

    model: Model
    windows: Windows
    rows: list[Sensitivity]
    matrix: Tensor


def fit(model: Model, windows: Windows, draws: int) -> Fitted:
    hidden = model.spec.shape.hidden
    found, matrix, tokens = [], torch.zeros(hidden, hidden, dtype=torch.float64), 0
    for seed in range(draws):
        layers = collect(model.checkpoint, model.spec, windows, BackwardOptions("sampled", seed=seed))
        found.append([measure_sensitivity(layer, windows.source) for layer in layers])
        slopes = layers[1].middle[layers[1].ordinary].double()
        matrix, tokens = matrix + slopes.T @ slopes, tokens + len(slopes)
    means = []
    for rows in zip(*found, strict=True):
        attention, mlp = sum(row.attention for row in rows), sum(row.mlp for row in rows)
        means.append(Sensitivity(rows[0].layer, attention / draws, mlp / draws))
    return Fitted(model, windows, means, matrix / tokens)


def stream_energy(fitted: Fitted, layer: int) -> float:
    """Mean over ordinary tokens of |stream after the layer|^2."""
    fitted.model.run(fitted.windows.ids)
    return float(fitted.model.streams[layer + 1][:, 1:-1].pow(2).sum(-1).mean())


def measure_divergence(model: Model, windows: Windows, place: tuple[int, str], root: Tensor, draws: int) -> float:
    """Mean KL(dense || perturbed) over ordinary tokens, with errors root @ noise on all of them."""
    random, total = torch.Generator().manual_seed(11), 0.0
    dense = model.run(windows.ids).log_softmax(-1)
    for _ in range(draws):
        noise = torch.randn(*windows.ids.shape, root.shape[1], generator=random, dtype=torch.float64)
        error = noise @ root.T
        error[:, [0, -1]] = 0
        other = model.run(windows.ids, place, error).log_softmax(-1)
        total += float(F.kl_div(other, dense, reduction="sum", log_target=True))
    return total / draws / windows.ids[:, 1:-1].numel()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A sandwich model with soft caps, 240 tokens, 24 draws of labels."""
    checkpoint, spec = open_tiny(tmp_path_factory.mktemp("fisher"), "gemma2", num_hidden_layers=3)
    return fit(Model(checkpoint, spec), draw_windows(6), 24)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_isotropic_errors_cost_what_their_energy_predicts(layer: int, branch: str, fitted: Fitted) -> None:
    model, hidden = fitted.model, fitted.model.spec.shape.hidden
    root = (1e-6 * stream_energy(fitted, layer) / hidden) ** 0.5 * torch.eye(hidden, dtype=torch.float64)
    measured = measure_divergence(model, fitted.windows, (layer, branch), root, 4)
    assert 1e-6 * getattr(fitted.rows[layer], branch) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("end", [0, -1], ids=["flattest", "steepest"])
def test_directed_errors_cost_what_their_covariance_predicts(end: int, fitted: Fitted) -> None:
    """Along single directions of the Fisher matrix, where its trace and the energy alone are wrong by far."""
    energy = 1e-6 * stream_energy(fitted, 1)
    axes = torch.linalg.eigh(fitted.matrix).eigenvectors
    root = (energy / 4) ** 0.5 * (axes[:, :4] if end == 0 else axes[:, -4:])
    measured = measure_divergence(fitted.model, fitted.windows, (1, "attention"), root, 4)
    assert 0.5 * float((fitted.matrix * (root @ root.T)).sum()) == pytest.approx(measured, rel=0.3)
    assert 1e-6 * fitted.rows[1].attention != pytest.approx(measured, rel=0.6)


def test_sensitivities_equal_a_loop_over_tokens(tmp_path: Path) -> None:
    """Loss of an isotropic error as large as the stream: half the mean |g|^2 times the mean |stream|^2 per channel."""
    checkpoint, spec = open_tiny(tmp_path, "qwen2")
    options, windows = BackwardOptions("sampled", seed=2), draw_windows(2)
    layers = collect(checkpoint, spec, windows, options)
    model = Model(checkpoint, spec)
    model.run(windows.ids)
    rows = sensitivities(checkpoint, spec, windows, options)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    for found, row in zip(layers, rows, strict=True):
        attention, mlp, energy, tokens = 0.0, 0.0, 0.0, 0
        for window in range(2):
            for token in range(1, LENGTH - 1):
                attention += sum(float(g) ** 2 for g in found.middle[window, token])
                mlp += sum(float(g) ** 2 for g in found.after[window, token])
                energy += sum(float(x) ** 2 for x in model.streams[found.index + 1][window, token])
                tokens += 1
        scale = 0.5 * energy / tokens / 48 / tokens
        assert row.attention == pytest.approx(scale * attention, rel=1e-5)
        assert row.mlp == pytest.approx(scale * mlp, rel=1e-5)


def test_labels_are_sampled_unless_asked_for(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    given = (None, BackwardOptions("sampled"), BackwardOptions("text"))
    plain, sampled, text = (sensitivities(checkpoint, spec, draw_windows(1), each) for each in given)
    assert plain == sampled
    assert plain[-1].mlp != pytest.approx(text[-1].mlp, rel=1e-3)


def test_sinks_do_not_count(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sinks", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = 3000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    windows = draw_windows(2)
    windows.ids[windows.ids == 7] = 8
    windows.ids[1, 9] = 7
    for found in stream_backward(checkpoint, read_spec(checkpoint), windows, BackwardOptions("sampled")):
        skipped = (~found.ordinary).nonzero().tolist()
        assert skipped == [[0, 0], [0, LENGTH - 1], [1, 0], [1, 9], [1, LENGTH - 1]]
        quiet = replace(found, middle=torch.where(found.ordinary[..., None], found.middle, 0.0))
        assert measure_sensitivity(quiet, "text") == measure_sensitivity(found, "text")
        assert 0 < found.energy < 3000.0**2  # less than the sink's alone


# Mistakes


def test_mistakes_are_named(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    with pytest.raises(UserError, match="labels 'gold'"):
        BackwardOptions("gold")
    with pytest.raises(UserError, match="at least 2 tokens"):
        collect(checkpoint, spec, draw_windows(3, 1), BackwardOptions())
    with pytest.raises(UserError, match="longer windows"):
        sensitivities(checkpoint, spec, draw_windows(3, 2))
