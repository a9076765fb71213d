"""The proofs of a comparison's points: fresh processes open their folders and compute the same. With --verify only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.verify import explain_skip, verify_folder
from cli.console import RunFailure
from cli.manifest import extend_manifest
from cli.measure import pair_checkpoint
from compress.checkpoint import open_checkpoint
from compress.checkpoint_source import read_json
from compress.checkpoint_writer import MANIFEST_NAME
from compress.decoder import compute_logits
from compress.evaluate import fill_hidden
from compress.hidden import HiddenStore
from compress.pipeline import SAMPLE, Result
from compress.report import DIFFERENT, SKIPPED, Proof
from compress.text import Windows
from compress.weights import read_head


def prove_cut(folder: Path, name: str, result: Result) -> tuple[Proof, ...]:
    """Open the folder of a point in a fresh process; RunFailure where its model is not the one in memory."""
    return judge_proofs(verify_folder(folder, result.sample_ids, result.sample_logits, onnx=False), name, "")


def prove_found(folder: Path, windows: Windows) -> None:
    """Prove a point that was written without --verify, and note it in its manifest; nothing where that is done.

    What fresh processes compute is compared with our own decoder on the same files. RunFailure where it differs.
    """
    if is_proven(read_json(folder / MANIFEST_NAME)) or explain_skip(folder):
        return
    ids = windows.ids[: SAMPLE[0], : SAMPLE[1]]
    proofs = verify_folder(folder, ids, run_sample(folder, ids), onnx=False)
    again = f"; it was written without --verify: delete {folder}, and the same command makes it again"
    extend_manifest(folder, {"proofs": judge_proofs(proofs, folder.name, again)})


def is_proven(manifest: Mapping[str, Any]) -> bool:
    """Tell whether a fresh process computed what a point's model does, as it was cut or as it was trained last."""
    trained = manifest.get("recovery", ())
    own = manifest.get("proofs") or (trained[-1].get("proofs", ()) if trained else ())
    return any(proof["status"] != SKIPPED for proof in own)


def run_sample(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits `[windows, length, vocab]` of a checkpoint, one layer in memory."""
    checkpoint, spec = pair_checkpoint(open_checkpoint(folder))
    with HiddenStore((*ids.shape, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, Windows(ids, folder.name), store)
        return compute_logits(spec, read_head(checkpoint, spec, torch.float32), store.read(0, len(ids)))


def judge_proofs(proofs: Iterable[Proof], name: str, again: str) -> tuple[Proof, ...]:
    """Return the proofs; RunFailure that names a point with a different one."""
    found = tuple(proofs)
    for proof in found:
        if proof.status == DIFFERENT:
            raise RunFailure(f"{name} failed its verification with {proof.runtime}: {proof.reason}{again}.")
    return found
