"""A rotated model is the same function, its last channels are the ones to cut, and the passes run on it unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CASES, make_checkpoint, make_config
from torch import Tensor

from compress.checkpoint import Checkpoint, check_finite, open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.decoder import compute_logits, make_frame, rms_norm, run_layer
from compress.errors import UserError
from compress.family import NormRule
from compress.importance.findings import Findings
from compress.pipeline import Result, Task, compress_checkpoint, find_units, storage_types
from compress.plan import Plan, keep_everything
from compress.recipe import Recipe
from compress.spec import ModelSpec, resolve_model
from compress.surgery.describe import new_config
from compress.surgery.inputs import ScaleSums
from compress.surgery.norms import rescale_norm
from compress.surgery.rotate import (
    choose_rotation,
    collect_stream_gram,
    rotate_checkpoint,
    rotated_findings,
)
from compress.text import Windows
from compress.weights import embed_rows, read_head, read_layer, read_spec

WINDOWS = Windows(torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(3)), "random")
EXACT = 1e-9
SINK = int(WINDOWS.ids[1, 5])


def norms_behind(case: str) -> bool:
    """True for a case whose branches end in norms."""
    return "attn_out" in resolve_model(make_config(case), None).shape.layers[0].norms


ALLOWED = [case for case in CASES if not norms_behind(case)]
REFUSED = [case for case in CASES if norms_behind(case)]


def random_rotation(size: int, seed: int = 1) -> Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def open_tiny(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(make_checkpoint(folder / "dense", case, dtype))
    return checkpoint, read_spec(checkpoint)


def run_whole(checkpoint: Checkpoint, spec: ModelSpec, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits of a checkpoint, read the way that the passes read it."""
    x, frame = embed_rows(checkpoint, spec, ids, dtype), make_frame(spec, *ids.shape, dtype=dtype)
    for index, layer in enumerate(spec.layers):
        x, _ = run_layer(spec, layer, read_layer(checkpoint, spec, index, dtype), x, frame)
    return compute_logits(spec, read_head(checkpoint, spec, dtype), x)


def make_task(checkpoint: Checkpoint, **recipe: Any) -> Task:
    return Task(checkpoint, read_spec(checkpoint), WINDOWS, Recipe(**recipe, refine=0))


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def turned_energies(gram: Tensor, rotation: Tensor) -> Tensor:
    """Energy of each rotated channel: the diagonal of Q^T G Q."""
    return torch.stack([column @ gram @ column for column in rotation.T])


# The same function


@pytest.mark.parametrize("choice", ["random", "pca"])
@pytest.mark.parametrize("case", ALLOWED)
def test_rotated_equals_dense(case: str, choice: str, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, case)
    pca = choice == "pca"
    rotation = choose_rotation(collect_stream_gram(checkpoint, spec, WINDOWS)) if pca else random_rotation(48)
    rotated = rotate_checkpoint(checkpoint, spec, rotation)
    turned = read_spec(rotated)
    dense = run_whole(checkpoint, spec, WINDOWS.ids)
    assert largest(run_whole(rotated, turned, WINDOWS.ids) - dense) <= EXACT * largest(dense)
    streams = [embed_rows(*model, WINDOWS.ids, torch.float64) for model in ((checkpoint, spec), (rotated, turned))]
    assert largest(streams[0] @ rotation - streams[1]) <= EXACT
    assert largest(streams[0] - streams[1]) > 0.1, "it is another basis"


def test_norms_stored_less_one_become_zeros(tmp_path: Path) -> None:
    """No family without norms behind its branches stores w - 1, so one is made up."""
    checkpoint, plain = open_tiny(tmp_path, "llama-biases")
    spec = replace(plain, family=replace(plain.family, norm=NormRule(offset=1.0)))
    rotated = rotate_checkpoint(checkpoint, spec, random_rotation(48))
    dense = run_whole(checkpoint, spec, WINDOWS.ids)
    assert largest(run_whole(rotated, spec, WINDOWS.ids) - dense) <= EXACT * largest(dense)
    assert largest(rotated.read_one(spec.names["final_norm"])) == 0


@pytest.mark.parametrize("case", REFUSED)
def test_norms_behind_branches_are_refused(case: str, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, case)
    advice = "absorb them first" if "attn_in" in spec.shape.layers[0].norms else "cut hidden channels as they are"
    with pytest.raises(UserError, match=advice):
        rotate_checkpoint(checkpoint, spec, random_rotation(48))
    with pytest.raises(UserError, match=advice):
        collect_stream_gram(checkpoint, spec, WINDOWS)


def test_only_rotations_are_taken(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    for wrong in (random_rotation(48) * 1.001, random_rotation(47), torch.full((48, 48), math.nan)):
        with pytest.raises(ValueError, match="orthogonal"):
            rotate_checkpoint(checkpoint, spec, wrong)


# What is read


@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "phi3", "glm"])
def test_stored_types_stay_and_values_are_not_rounded(case: str, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, case, torch.bfloat16)
    rotated = rotate_checkpoint(checkpoint, spec, random_rotation(48))
    assert set(storage_types(rotated, read_spec(rotated)).values()) == {torch.bfloat16}
    assert {name: info.shape for name, info in rotated.tensors.items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }
    check_finite(rotated)
    for name, info in rotated.tensors.items():
        plain, exact = rotated.read_one(name), rotated.read_one(name, torch.float64)
        assert plain.shape == info.shape and plain.dtype == torch.float32
        assert rotated.read_one(name, torch.bfloat16).dtype == torch.bfloat16
        assert torch.allclose(plain.double(), exact, rtol=1e-5, atol=1e-6)
    head = checkpoint.read_one(spec.names["head"], torch.float64)
    gain = checkpoint.read_one(spec.names["final_norm"], torch.float64) + spec.norm_offset
    expected = head @ torch.diag(gain) @ random_rotation(48)
    assert torch.allclose(rotated.read_one(spec.names["head"], torch.float64), expected, rtol=0, atol=1e-12)


def test_parts_of_a_tensor_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama-biases")
    rotated = rotate_checkpoint(checkpoint, spec, random_rotation(48))
    whole = {name: rotated.read_one(name) for name in rotated.tensors}
    monkeypatch.setattr("compress.surgery.rotate.STEP", 5 * 48)  # five rows at a time
    rows = torch.tensor([7, 0, 7, 5])
    for name, tensor in whole.items():
        assert torch.allclose(rotated.read_one(name), tensor, rtol=0, atol=1e-6)
        assert torch.allclose(rotated.read_slice(name, 2, 9), tensor[2:9], rtol=0, atol=1e-6)
        assert torch.allclose(rotated.read_rows(name, rows), tensor[rows], rtol=0, atol=1e-6)
        with pytest.raises(IndexError):
            rotated.read_slice(name, 0, len(tensor) + 1)
        for outside in (-1, len(tensor)):
            with pytest.raises(IndexError):
                rotated.read_rows(name, torch.tensor([outside]))
    with pytest.raises(KeyError):
        rotated.read_one("unknown")


@pytest.mark.parametrize("stored", ["embed", "head", "both"])
def test_tied_models_become_untied(stored: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama-tied")
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors = load_file(folder / "model.safetensors")
    if stored != "embed":
        tensors[head] = tensors[embed].clone()
    if stored == "head":
        del tensors[embed]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    rotated = rotate_checkpoint(checkpoint, spec, random_rotation(48))
    turned = read_spec(rotated)
    assert spec.shape.tied and checkpoint.config["tie_word_embeddings"] is True
    assert not turned.shape.tied and turned.names["embed"] == embed and turned.names["head"] == head
    dense = run_whole(checkpoint, spec, WINDOWS.ids)
    assert largest(run_whole(rotated, turned, WINDOWS.ids) - dense) <= EXACT * largest(dense)


@dataclass(frozen=True, eq=False)
class Watched(Checkpoint):
    """A checkpoint that notes which tensors were read."""

    seen: set[str]

    def read(self, names: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        wanted = list(names)
        self.seen.update(wanted)
        return super().read(wanted, dtype)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        self.seen.add(name)
        return super().read_slice(name, start, stop, dtype)


def test_a_layer_is_read_without_the_others(tmp_path: Path) -> None:
    plain, spec = open_tiny(tmp_path, "phi3")
    seen: set[str] = set()
    rotated = rotate_checkpoint(Watched(plain.folder, plain.config, plain.tensors, seen), spec, random_rotation(48))
    assert not seen
    read_layer(rotated, read_spec(rotated), 2, torch.float32)
    assert seen == set(spec.layers[2].names.values())


# The choice of the rotation


def place_sink(folder: Path) -> None:
    """Give one token a massive activation in channel 4."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][SINK, 4] = 5000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def twin_gram(checkpoint: Checkpoint, spec: ModelSpec, ids: Tensor) -> tuple[Tensor, int]:
    """Token by token: the mean of u u^T over the inputs of all norms, and how many later tokens were sinks."""
    gram, count, sinks = torch.zeros(spec.shape.hidden, spec.shape.hidden, dtype=torch.float64), 0, 0
    for window in ids:
        x = embed_rows(checkpoint, spec, window[None], torch.float64)
        frame = make_frame(spec, 1, len(window), dtype=torch.float64)
        inputs = []
        for index, layer in enumerate(spec.layers):
            weights = read_layer(checkpoint, spec, index, torch.float64)
            after, _ = run_layer(spec, layer, weights, x, frame)
            silent = {**weights, "down": weights["down"] * 0}
            if "down_bias" in weights:
                silent["down_bias"] = weights["down_bias"] * 0
            middle, _ = run_layer(spec, layer, silent, x, frame)
            inputs += [(x, x), (x, middle)]
            x = after
        for before, entering in [*inputs, (x, x)]:
            for place, (token, vector) in enumerate(zip(before[0], entering[0], strict=True)):
                size = sorted(abs(value) for value in token.tolist())
                sink = size[-1] > 100 * size[(len(size) - 1) // 2]
                sinks += sink and place > 0
                if place == 0 or sink:
                    continue
                unit = vector / math.sqrt(float(vector @ vector) / len(vector) + spec.eps)
                gram += torch.outer(unit, unit)
                count += 1
    return gram / count, sinks


@pytest.mark.parametrize("case", ["llama-biases", "granite"])
def test_gram_equals_its_slow_twin(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", case)
    place_sink(folder)
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    ids = WINDOWS.ids[:3]
    fast = collect_stream_gram(checkpoint, spec, Windows(ids, "random"), spill_bytes=0)
    slow, sinks = twin_gram(checkpoint, spec, ids)
    assert sinks > 0 and fast.dtype == torch.float64
    assert torch.allclose(fast, slow, rtol=0, atol=2e-6)
    assert 0.99 * 48 < float(fast.trace()) <= 48  # each input has unit mean square but for eps


def test_gram_needs_a_token(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    with pytest.raises(UserError, match="more text"):
        collect_stream_gram(checkpoint, spec, Windows(WINDOWS.ids[:0], "text.txt"))


def test_rotation_is_the_principal_basis() -> None:
    truth, energies = random_rotation(20, 7), torch.linspace(3, 0.1, 20, dtype=torch.float64)
    gram = truth @ torch.diag(energies) @ truth.T
    rotation = choose_rotation(gram)
    assert largest(rotation.T @ rotation - torch.eye(20, dtype=torch.float64)) <= 1e-12
    assert largest(turned_energies(gram, rotation) - energies) <= 1e-12
    assert largest((rotation * truth).sum(0).abs() - 1) <= 1e-9, "each column is the wanted one but for its sign"
    for column in rotation.T.tolist():
        assert max(column, key=abs) > 0
    assert torch.equal(rotation, choose_rotation(gram))


def test_pinned_channels_stay_and_come_first() -> None:
    truth, energies = random_rotation(20, 7), torch.linspace(3, 0.1, 20, dtype=torch.float64)
    gram = truth @ torch.diag(energies) @ truth.T
    rotation = choose_rotation(gram, (11, 4))
    unit = torch.eye(20, dtype=torch.float64)
    assert torch.equal(rotation[:, :2], unit[:, [4, 11]])
    assert largest(rotation.T @ rotation - unit) <= 1e-12
    rest = [channel for channel in range(20) if channel not in (4, 11)]
    found = turned_energies(gram, rotation)
    assert torch.equal(found[:2], gram.diagonal()[[4, 11]])
    assert largest(found[2:] - torch.linalg.eigvalsh(gram[rest][:, rest]).flip(0)) <= 1e-12


def test_sinks_are_found_in_the_rotated_stream_when_pinned(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    place_sink(folder)
    dense = make_task(open_checkpoint(folder), score="activation")
    plain = find_units(dense)
    assert plain.pinned == (4,) and all(layer.sinks > 0 for layer in plain.layers)
    gram = collect_stream_gram(dense.checkpoint, dense.spec, WINDOWS)
    for pinned, seen in ((plain.pinned, [layer.sinks for layer in plain.layers]), ((), [0] * 4)):
        rotated = rotate_checkpoint(dense.checkpoint, dense.spec, choose_rotation(gram, pinned))
        found = find_units(make_task(rotated, score="activation"))
        assert [layer.sinks for layer in found.layers] == seen
        assert found.pinned == ((0,) if pinned else ())


def test_rotation_refuses_broken_statistics() -> None:
    with pytest.raises(UserError, match="NaN"):
        choose_rotation(torch.tensor([[1.0, math.nan], [math.nan, 1.0]]))


# Cutting


def cut_plan(task: Task, hidden: tuple[int, ...]) -> Plan:
    return Plan(hidden, keep_everything(task.spec.shape).layers)


def write_cut(task: Task, hidden: tuple[int, ...], out: Path) -> Result:
    plan = cut_plan(task, hidden)
    with CheckpointWriter(out, new_config(task.spec, plan)) as writer:
        result = compress_checkpoint(task, plan, writer)
        writer.finish()
    return result


@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "phi3", "granite", "qwen3"])
@pytest.mark.parametrize("repair", ["none", "lstsq"])
def test_passes_run_on_the_view(case: str, repair: str, tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, case, torch.bfloat16)
    gram = collect_stream_gram(checkpoint, spec, WINDOWS)
    rotation = choose_rotation(gram)
    task = make_task(rotate_checkpoint(checkpoint, spec, rotation), repair=repair, score="activation")
    findings = rotated_findings(find_units(task), turned_energies(gram, rotation))
    result = write_cut(task, findings.keep_hidden(36), tmp_path / "cut")
    written = open_checkpoint(tmp_path / "cut")
    assert {info.dtype for info in written.tensors.values()} == {torch.bfloat16}
    assert written.config["tie_word_embeddings"] is False and written.config["hidden_size"] == 36
    again = run_whole(written, read_spec(written), result.sample_ids, torch.float32)
    assert largest(again - result.sample_logits) <= 1e-4 * largest(again)


def flatten_streams(folder: Path, rank: int) -> None:
    """Let everything that writes to the stream of a tiny model stay in a random subspace of `rank` dimensions."""
    tensors = load_file(folder / "model.safetensors")
    basis = random_rotation(48, 11)[:, :rank]
    onto = (basis @ basis.T).float()
    for name, tensor in tensors.items():
        if "embed" in name:
            tensors[name] = tensor @ onto
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = onto @ tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "granite", "qwen3"])
def test_a_stream_of_low_rank_is_cut_without_loss(case: str, tmp_path: Path) -> None:
    """All energy is in 36 directions: cutting to them is exact, which no choice of 36 channels comes near."""
    folder = make_checkpoint(tmp_path / "dense", case)
    flatten_streams(folder, 36)
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    gram = collect_stream_gram(checkpoint, spec, WINDOWS)
    rotation = choose_rotation(gram)
    energies = turned_energies(gram, rotation)
    assert float(energies[36:].sum()) <= 1e-9 * float(energies.sum())
    channels = make_task(checkpoint, repair="none", score="activation")
    rotated = make_task(rotate_checkpoint(checkpoint, spec, rotation), repair="none", norms="slnp")
    plain = find_units(channels)
    kept = rotated_findings(plain, energies).keep_hidden(36)
    ids = write_cut(rotated, kept, tmp_path / "rotated").sample_ids
    write_cut(channels, plain.keep_hidden(36), tmp_path / "channels")
    dense = run_whole(checkpoint, spec, ids)
    errors = {}
    for name in ("rotated", "channels"):
        written = open_checkpoint(tmp_path / name)
        errors[name] = largest(run_whole(written, read_spec(written), ids) - dense) / largest(dense)
    assert errors["rotated"] <= 2e-5
    assert errors["channels"] >= 0.05


def make_findings(norms: int, hidden: int, pinned: tuple[int, ...]) -> Findings:
    energy = torch.rand(norms, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    score = energy.sum(0)
    return Findings(
        layers=(), hidden_score=score, hidden_energy=energy, drop_order=(), pinned=pinned, tokens=100, sinks=3
    )


def test_findings_of_rotated_channels() -> None:
    energies = torch.tensor([5.0, 2.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    plain = make_findings(norms=9, hidden=6, pinned=(5,))
    found = rotated_findings(plain, energies)
    assert (found.pinned, found.tokens, found.sinks) == ((), 100, 3)
    for count in range(1, 7):
        assert found.keep_hidden(count) == tuple(range(count))
        assert found.hidden_damage(count) == pytest.approx(9 * float(energies[count:].sum()) / 10)
    assert plain.keep_hidden(1) == (5,)


def test_damage_of_the_view_is_what_pass_one_measures_on_it(tmp_path: Path) -> None:
    checkpoint, spec = open_tiny(tmp_path, "llama")
    gram = collect_stream_gram(checkpoint, spec, WINDOWS)
    rotation = choose_rotation(gram)
    task = make_task(rotate_checkpoint(checkpoint, spec, rotation), score="activation")
    measured = find_units(task)
    ours = rotated_findings(measured, turned_energies(gram, rotation))
    energy = measured.hidden_energy / measured.hidden_energy.sum(1, keepdim=True)
    for count in (12, 24, 36, 47):
        tail = sum(float(row[count:].sum()) for row in energy)
        assert ours.hidden_damage(count) == pytest.approx(tail, rel=1e-3)


# The gain after a cut


def fit_scale(full: Tensor, cut: Tensor) -> float:
    """The factor of the `calibrated` norm rule."""
    sums = ScaleSums()
    sums.update(full, cut)
    return sums.constant


def test_the_calibrated_gain_restores_the_norm() -> None:
    """Every token holds the same share of its energy in the first 30 of 40 channels: sqrt(e d / d') is exact."""
    random, offset = torch.Generator().manual_seed(4), 1.0
    x = torch.randn(50, 40, dtype=torch.float64, generator=random)
    for share in (0.2, 0.75, 0.99, 1.0):
        head, tail = (part / part.norm(dim=1, keepdim=True) for part in (x[:, :30], x[:, 30:]))
        token = 3 * torch.cat((head * share**0.5, tail * (1 - share) ** 0.5), 1)
        stored = torch.full((40,), 1 - offset, dtype=torch.float64)
        full, bare = (rms_norm(part, stored[: part.shape[1]], 0.0, offset) for part in (token, token[:, :30]))
        gain = fit_scale(full[:, :30], bare)
        assert gain == pytest.approx(math.sqrt(share * 40 / 30), rel=1e-6)
        assert largest(full[:, :30] - rms_norm(token[:, :30], torch.tensor(gain - offset), 0.0, offset)) <= 1e-6
    # SLNP takes the share for 1.
    assert largest(rescale_norm(stored, stored[:30], offset) + offset - gain) <= 1e-6


def test_the_calibrated_gain_is_bounded_by_that_of_the_mean_share() -> None:
    """Over tokens of unlike shares, least squares gives mean(sqrt(e)) sqrt(d/d'), just below sqrt(mean(e) d/d')."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(400, 40, dtype=torch.float64, generator=random) * torch.linspace(3, 0.3, 40, dtype=torch.float64)
    full, cut = (rms_norm(part, torch.tensor(1.0), 0.0, 0.0) for part in (x, x[:, :25]))
    shares = x[:, :25].pow(2).sum(1) / x.pow(2).sum(1)
    fitted, slnp = fit_scale(full[:, :25], cut), math.sqrt(40 / 25)
    bound = math.sqrt(float(shares.mean())) * slnp
    assert fitted == pytest.approx(float(shares.sqrt().mean()) * slnp)
    assert bound * (1 - float(shares.var() / shares.mean() ** 2)) <= fitted < bound < slnp
