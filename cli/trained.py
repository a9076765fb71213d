"""Folders of trained and of merged weights: written beside, proved, moved into place. Imported by running verbs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from backends.verify import verify_folder
from cli.console import Console, RunFailure
from cli.manifest import encode_manifest
from cli.measure import Model, limit_threads
from cli.prepare import check_writable
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoint_writer import MANIFEST_NAME, CheckpointWriter, check_output, check_space
from compress.errors import UserError
from compress.recover.merge import check_mergeable, merge_step
from compress.recover.model import Frozen
from compress.report import DIFFERENT, Proof, make_plain
from compress.weights import read_spec

STALE = ("metrics", "proofs", "seconds", "graph_format")  # in a manifest, what no longer holds of changed weights
PROOF_TOKENS = 32


def open_model(source: str) -> Model:
    """Open a checkpoint."""
    checkpoint = open_checkpoint(source)
    return checkpoint, read_spec(checkpoint)


def open_writer(asked: Mapping[str, Any], checkpoint: Checkpoint) -> CheckpointWriter:
    """Return the writer of a folder with the config and the side files of a checkpoint."""
    output, overwrite = Path(asked["output"]), asked["overwrite"]
    writer = SideWriter(output, checkpoint.config, overwrite=overwrite, source=checkpoint.folder)
    writer.sides = checkpoint.side_files()
    return writer


class SideWriter(CheckpointWriter):
    """A writer that starts with the side files of the model."""

    sides: Sequence[Path] = ()

    def __enter__(self) -> Self:
        """Create the hidden folder and copy them."""
        super().__enter__()
        for path in self.sides:
            self.add_file(path)
        return self


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder without what no longer holds once its weights are trained; empty without one."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete it, or compress the model again.") from error
    return {key: value for key, value in found.items() if key not in STALE}


def prove_output(folder: Path, asked: Mapping[str, Any], console: Console) -> tuple[Proof, ...]:
    """Open the written folder in a fresh process and compare it; RunFailure where it is another model."""
    if asked["no_verify"]:
        return ()
    console.note("Verifying the output in a fresh process.")
    checkpoint, spec = open_model(str(folder))
    ids = torch.randint(spec.shape.vocab, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    model = Frozen(checkpoint, spec)
    logits = model.logits(model.streams([(ids, torch.zeros_like(ids))])[0][0])
    proofs = tuple(verify_folder(folder, ids, logits, False))
    wrong = [proof for proof in proofs if proof.status == DIFFERENT]
    if wrong:
        raise RunFailure(
            f"The output failed its verification with {wrong[0].runtime}: {wrong[0].reason}; nothing was written, but "
            "the training is kept: --resume with --no-verify writes it all the same."
        )
    return proofs


def run_merge(asked: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Write STUDENT moved towards the mean of other checkpoints of its shape; returns what was done."""
    limit_threads(asked["threads"])
    base = open_checkpoint(asked["student"])
    others = [open_checkpoint(name) for name in asked["merge"].split(",") if name]
    rate = 1.0 if asked["merge_rate"] is None else asked["merge_rate"]
    if not math.isfinite(rate):
        raise UserError(f"--merge-rate {rate:g} is no rate; give a number such as 0.5.")
    check_mergeable([base, *others])
    for other in others:
        check_output(Path(asked["output"]), other.folder, asked["overwrite"])
    check_writable(Path(asked["output"]))
    check_space(Path(asked["output"]), base.nbytes)
    facts = {
        "base": {"path": asked["student"], "sha256": base.sha256()},
        "merged": [{"path": str(other.folder), "sha256": other.sha256()} for other in others],
        "rate": rate,
    }
    with open_writer(asked, base) as writer:
        for done, (name, tensor) in enumerate(merge_step(base, others, rate), 1):
            writer.add(name, tensor)
            console.progress("merge", done, len(base.tensors))
        proofs = prove_output(writer.seal(), asked, console)
        writer.add_text(MANIFEST_NAME, encode_manifest({**read_manifest(base.folder), "merge": facts}))
        writer.finish()
    console.show(f"Merged {len(others)} checkpoints at rate {rate:g}. Written to {asked['output']}.")
    return {**facts, "proofs": make_plain(proofs)}
