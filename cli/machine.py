"""What `lightpress profiles measure` does: measure, write the profile, say how well it fits. Imported when running."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from backends.machine import Sample, measure_machine
from cli.budget import THIS_MACHINE
from cli.console import Console, align_table
from cli.prepare import require_file
from compress.errors import UserError
from compress.report import make_plain
from profiles.cost import estimate_cost
from profiles.loader import user_folder, write_profile
from profiles.profile import Profile

ROUGH = 0.2  # median misfit from which the machine was too busy to be measured


def run_measure(name: str, output: Path | None, threads: int | None, overwrite: bool, console: Console) -> None:
    """Measure this machine and write its profile into the user's folder, or to a file."""
    path = output or user_folder() / f"{name}.toml"
    if path.suffix != ".toml":
        raise UserError(f"{path}: a profile's file ends in .toml; name it {path.with_suffix('.toml').name}.")
    if output is not None:
        require_file(output, overwrite)
    elif name != THIS_MACHINE and path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --name, or add --overwrite.")
    console.note("Measuring; leave the machine alone for about half a minute.")
    profile, samples = measure_machine(path.stem, threads, console.progress)
    misfit = find_misfit(profile, samples)
    if misfit > ROUGH:
        console.warn(
            f"the predictions miss the measured times by {misfit:.0%} at the median, as on a busy machine; measure "
            "again when nothing else runs."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_profile(profile, path)
    console.show(render_measured(profile, misfit, len(samples)))
    console.show(f"Written to {path}; use it with --profile {path.stem if output is None else path}.")
    console.finish({"path": str(path), "misfit": misfit, "profile": make_plain(profile)})


def find_misfit(profile: Profile, samples: Sequence[Sample]) -> float:
    """Return the median share by which predictions miss the timings that they were fitted to."""
    ratios = [estimate_cost(one.shape, profile, one.workload).total / one.seconds for one in samples]
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def render_measured(profile: Profile, misfit: float, count: int) -> str:
    """Return what was found in a few rows."""
    compute, memory = profile.compute, profile.memory
    rows = [
        ("float32 products", f"{1e3 * compute.matrix_tflops['fp32'] * compute.matrix_efficiency:.0f} GFLOP/s"),
        ("reading weights", f"{memory.bandwidth_gb_per_s * memory.weight_efficiency:.1f} GB/s"),
        ("from the cache", f"{memory.cache_gb_per_s * memory.weight_efficiency:.1f} GB/s, {memory.cache_mib:g} MiB"),
        ("vector operations", f"{compute.vector_gelements_per_s:.1f} G elements/s"),
        ("one layer's fixed cost", f"{profile.overhead.vector_op_us * profile.runtime.vector_ops:.0f} us"),
        ("one pass's fixed cost", f"{profile.overhead.step_us:.0f} us"),
        ("fit", f"median error {misfit:.1%} on {count} timings of small decoders"),
    ]
    return align_table(rows)
