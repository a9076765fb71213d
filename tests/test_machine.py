"""Measuring a machine: constants are recovered from timings that they explain; the verb leaves a profile that loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from backends import machine
from backends.machine import Sample, apply_constants, draft_profile, fit_products, fit_profile, round_number
from cli.app import app
from compress.shapes import LayerShape, ModelShape
from profiles.cost import DECODE, PREFILL, Workload, estimate_cost
from profiles.loader import load_profile, write_profile
from profiles.profile import Profile

START = {name: start for name, (start, *_) in machine.FITTED.items()}
FP32 = {"weights": "fp32", "activations": "fp32", "kv": "fp32"}


def draft() -> Profile:
    return draft_profile("here", 2, (0.4, 12.0), (40.0, 90.0), (10.0, 0.4))


def list_workloads(sizes: Sequence[tuple[int, int, int, int]]) -> list[tuple[ModelShape, Workload]]:
    norms = ("attn_in", "attn_out", "mlp_in", "mlp_out")
    found = []
    for hidden, ffn, heads, layers in sizes:
        layer = LayerShape(heads, heads // 2, hidden // heads, ffn, norms=norms)
        shape = ModelShape(1024, hidden, True, (layer,) * layers)
        found += [(shape, Workload(PREFILL, prompt, 1, **FP32)) for prompt in (32, 128, 512)]
        found += [(shape, Workload(DECODE, context, 8, **FP32)) for context in (32, 512, 960)]
    return found


def make_samples(truth: Profile, sizes: Sequence[tuple[int, int, int, int]], noise: float = 0.0) -> list[Sample]:
    random = np.random.default_rng(0)
    return [
        Sample(shape, work, estimate_cost(shape, truth, work).total * float(np.exp(noise * random.standard_normal())))
        for shape, work in list_workloads(sizes)
    ]


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_machine_that_the_model_describes_is_found(noise: float) -> None:
    """Shapes that the fit has not seen are predicted, though every constant lies away from its start."""
    wanted = {
        **START, "step_us": 60.0, "vector_ops": 55.0, "matrix_op_us": 5.0, "state_passes": 4.5, "head_passes": 7.0,
        "score_passes": 2.0, "peak_share": 1.25, "bandwidth_share": 0.9, "cache_share": 0.6, "head_us": 1.5,
    }  # fmt: skip
    truth = apply_constants(draft(), wanted)
    found = fit_profile(draft(), make_samples(truth, machine.DECODERS, noise))
    unseen = list_workloads([(192, 640, 6, 5), (768, 2048, 12, 4), (896, 2048, 14, 2)])
    ratios = [estimate_cost(s, found, w).total / estimate_cost(s, truth, w).total for s, w in unseen]
    # What timings hardly tell stays near its start.
    assert max(abs(ratio - 1) for ratio in ratios) < 0.06 + 2 * noise
    assert found.compute.matrix_tflops["fp32"] == pytest.approx(0.5, rel=0.1)
    assert found.memory.bandwidth_gb_per_s == pytest.approx(36, rel=0.1)


def test_a_few_wild_timings_do_not_spoil_the_fit() -> None:
    truth = apply_constants(draft(), {**START, "peak_share": 1.2, "vector_ops": 60.0})
    samples = make_samples(truth, machine.DECODERS)
    wild = [replace(one, seconds=3 * one.seconds) if place % 9 == 4 else one for place, one in enumerate(samples)]
    found = fit_profile(draft(), wild)
    ratios = [estimate_cost(one.shape, found, one.workload).total / one.seconds for one in samples]
    assert float(np.median(np.abs(np.array(ratios) - 1))) < 0.06


def test_peak_and_half_of_products_are_recovered() -> None:
    work = 2.0 * machine.WIDE[0] * machine.WIDE[1]
    times = [(rows, (rows + 14) * work / 0.35e12) for rows in (32, 128, 512)]
    assert fit_products(times) == pytest.approx((0.35, 14.0))
    falling = [(32, 1.0), (128, 0.5), (512, 0.4)]  # nonsense of a busy machine still gives a positive peak
    peak, half = fit_products(falling)
    assert peak > 0
    assert half >= 0


def test_drafts_and_fits_are_profiles_that_can_be_written(tmp_path: Path) -> None:
    found = fit_profile(draft(), make_samples(draft(), ((128, 256, 4, 2), (256, 704, 8, 2))))
    write_profile(found, tmp_path / "here.toml")
    assert load_profile(str(tmp_path / "here.toml")) == found


@pytest.mark.parametrize(("value", "wanted"), [(0.0, 0.0), (0.123456, 0.1235), (98765.4, 98770.0), (2.0, 2.0)])
def test_numbers_are_rounded_to_four_digits(value: float, wanted: float) -> None:
    assert round_number(value) == wanted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Tiny measurements: what is timed here does not matter."""
    monkeypatch.setattr(machine, "DECODERS", ((32, 32, 2, 1), (32, 64, 2, 2)))
    monkeypatch.setattr(machine, "PROMPTS", (4, 16))
    monkeypatch.setattr(machine, "CONTEXTS", (8, 24))
    monkeypatch.setattr(machine, "STREAM", (256, 512))
    monkeypatch.setattr(machine, "WIDE", (256, 512))
    monkeypatch.setattr(machine, "CACHED", (128, 256))
    monkeypatch.setattr(machine, "ROUNDS", 1)
    real = machine.time_call
    monkeypatch.setattr(machine, "time_call", lambda call, least=0.0, rounds=1: real(call, 0.0, 1))
    monkeypatch.setenv("LIGHTPRESS_PROFILES", str(tmp_path / "own"))
    return tmp_path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_measuring_leaves_a_profile_of_the_users_own(quick: Path) -> None:
    done = run("profiles", "measure", "--threads", 1, "--quiet")
    assert done.exit_code == 0, done.stderr
    assert "this-machine" in done.stdout
    profile = load_profile("this-machine")
    assert profile.compute.cores == 1
    assert profile.memory.capacity_gib > 0
    assert "1 threads" in profile.description
    assert (quick / "own" / "this-machine.toml").is_file()
    listed = json.loads(run("profiles", "list", "--json").stdout)["profiles"]
    assert listed[0]["name"] == "this-machine"


def test_measuring_to_a_file(quick: Path) -> None:
    target = quick / "box.toml"
    done = run("profiles", "measure", "-o", target, "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["path"] == str(target)
    assert load_profile(str(target)).name == "box"
    again = run("profiles", "measure", "-o", target)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    wrong = run("profiles", "measure", "-o", quick / "box.json")
    assert wrong.exit_code == 2
    assert "box.toml" in wrong.stderr
