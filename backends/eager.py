"""Run a checkpoint with torch, all layers in memory, on the CPU or on an Ascend NPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import npu
from backends.runtime import Ids, Logits, Runtime, generate_greedily
from compress.checkpoint import Checkpoint
from compress.decoder import HALVES, PLAIN, Frame, Kernels, Past, compute_logits, make_frame, run_layer
from compress.errors import UserError
from compress.evaluate import Quality, compare_logits
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import Weights, read_layer, read_spec

__all__ = [
    "EagerCache", "EagerModel", "Place", "compare_placed", "load_eager", "load_placed", "measure_placed", "open_place",
    "read_peak_memory",
]  # fmt: skip

CPU, NPU = "cpu", "npu"
DEVICES = (CPU, NPU)
RESERVE = 1.1  # bytes that a device needs free, over those of the weights: the cache, a layer's values, fragments


def wait_for_nothing() -> None:
    """Return at once: the CPU has done what it was told when the call returns."""


@dataclass(frozen=True)
class Place:
    """Where models run: torch device, number format, kernels, how to wait for them, its name, and notes on both."""

    device: torch.device = torch.device(CPU)
    dtype: torch.dtype = torch.float32
    kernels: Kernels = PLAIN
    wait: Callable[[], None] = wait_for_nothing
    name: str = CPU
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EagerCache:
    """Keys and values of every layer, and the number of tokens in them."""

    layers: tuple[Past, ...]
    length: int


@dataclass(frozen=True)
class EagerModel:
    """A model whose weights are all in memory; a tied head is the embedding itself."""

    spec: ModelSpec
    embedding: Tensor
    layers: tuple[Weights, ...]
    head: Weights
    place: Place = Place()

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.spec.shape.vocab

    def prefill(self, ids: Ids, mask: Ids | None = None, every: bool = True) -> tuple[Logits, EagerCache]:
        """Run prompts `[batch, sequence]` of equal length; return logits `[batch, sequence, vocab]` and the cache.

        Without `every` there are logits of the last position only.

        Raises ValueError for a mask with padding, which the decoder does not know: run rows of unequal length apart.
        """
        if mask is not None and not mask.all():
            raise ValueError("the eager runtime takes no padding: run prompts of unequal length one by one")
        return self._run(ids, None, every)

    def decode(self, ids: Ids, cache: EagerCache) -> tuple[Logits, EagerCache]:
        """Run further tokens `[batch, new]` after a cache, which stays valid; return logits and the longer cache."""
        return self._run(ids, cache)

    def generate(self, ids: Ids | Sequence[int], count: int, stop: Collection[int] = frozenset()) -> list[int]:
        """Return up to `count` greedy new ids after one prompt; a stop id is the last one returned."""
        return generate_greedily(self, ids, count, stop)

    @torch.inference_mode()
    def _run(self, ids: Ids, cache: EagerCache | None, every: bool = True) -> tuple[Logits, EagerCache]:
        start = cache.length if cache else 0
        frame = self._frame(len(ids), ids.shape[1], start)
        x = self.embedding[torch.tensor(ids).to(self.place.device)] * self.spec.embedding_multiplier
        present = []
        for index, (layer, weights) in enumerate(zip(self.spec.layers, self.layers, strict=True)):
            x, own = run_layer(self.spec, layer, weights, x, frame, cache.layers[index] if cache else None)
            present.append(own)
        logits = compute_logits(self.spec, self.head, x if every else x[:, -1:], self.place.kernels)
        self.place.wait()  # callers time what lies between two returns
        found: Logits = (logits.float() if logits.dtype in HALVES else logits).cpu().numpy()
        return found, EagerCache(tuple(present), start + ids.shape[1])

    def _frame(self, batch: int, length: int, start: int) -> Frame:
        """Return positions, rotary tables and kernels where the model is; angles are computed on the CPU, exactly."""
        frame = make_frame(self.spec, batch, length, start, self.embedding.dtype)
        device = self.place.device
        tables = {rope: (cos.to(device), sin.to(device)) for rope, (cos, sin) in frame.tables.items()}
        return Frame(frame.positions, tables, self.place.kernels)


def open_place(device: str, specs: Sequence[ModelSpec], dtype: torch.dtype | None = None) -> Place:
    """Return the device for these models, in memory together; UserError says what an NPU lacks, and what to do.

    `dtype` is float32 on the CPU unless given, and on an NPU bfloat16, or float16 where the chip has no bfloat16.
    """
    if device == CPU:
        return Place(dtype=dtype or torch.float32)
    if device != NPU:
        raise UserError(f"--device {device} is unknown; it is one of {', '.join(DEVICES)}.")
    found = npu.open_npu(specs, dtype)
    needed = sum(spec.shape.parameters for spec in specs) * found.dtype.itemsize * RESERVE
    if needed > found.free:
        raise UserError(
            f"{found.chip} has {found.free / 2**30:.1f} GiB free and the weights need {needed / 2**30:.1f} GiB; "
            "free its memory, compress the model further, or use --device cpu."
        )
    return Place(found.device, found.dtype, found.kernels, npu.synchronise, found.chip, found.notes)


def read_peak_memory(place: Place) -> int | None:
    """Return the most bytes that tensors have held on a device in this process; None for the CPU, which counts none."""
    return None if place.device.type == CPU else npu.read_peak_bytes()


def load_eager(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = CPU) -> EagerModel:
    """Load all weights of a checkpoint onto a device; UserError when config.json and tensors do not fit.

    See `open_place` for the number format. Models that share a device are opened together: `load_placed`.
    """
    spec = read_spec(checkpoint)
    return load_placed(checkpoint, spec, open_place(device, [spec], dtype))


def load_placed(checkpoint: Checkpoint, spec: ModelSpec, place: Place) -> EagerModel:
    """Load all weights of a checkpoint to a place; UserError for a weight above the range of its number format."""
    tied = spec.shares_ends
    names = ("embed", "final_norm", *(() if tied else ("head",)))
    read = {name: checkpoint.read_one(spec.names[name], place.dtype) for name in names}
    ends = put_weights(checkpoint, read, place)
    layers = tuple(
        put_weights(checkpoint, read_layer(checkpoint, spec, index, place.dtype), place, f" of layer {index}")
        for index in range(len(spec.layers))
    )
    head = {"final_norm": ends["final_norm"], "head": ends["embed" if tied else "head"]}
    return EagerModel(spec, ends["embed"], layers, head, place)


def put_weights(checkpoint: Checkpoint, weights: Weights, place: Place, where: str = "") -> Weights:
    """Move weights to a place; UserError for one that float16 cannot hold."""
    for role, tensor in weights.items():
        if place.dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{checkpoint.folder}: {role}{where} has values above 65504, which float16 cannot hold, and "
                f"{place.name} is run in float16; use a device with bfloat16, or --device cpu."
            )
    return {role: tensor.to(place.device) for role, tensor in weights.items()}


def measure_placed(model: Runtime, windows: Windows) -> Quality:
    """Return the perplexity of a loaded model on the windows, as its runtime and device compute it."""
    losses = [float(F.cross_entropy(run_window(model, ids), ids[1:], reduction="sum")) for ids in windows.ids]
    count = windows.ids[:, 1:].numel()
    return Quality(math.exp(sum(losses) / count), count)


def compare_placed(dense: Runtime, other: Runtime, windows: Windows) -> tuple[Quality, Quality]:
    """Return the quality of two loaded models on the same windows, the second with agreement and KL(dense || other)."""
    sums = torch.zeros(4, dtype=torch.float64)
    for ids in windows.ids:
        sums += compare_logits(run_window(dense, ids), run_window(other, ids), ids[1:])
    count = windows.ids[:, 1:].numel()
    first, second, divergence, agreed = (sums / count).tolist()
    return Quality(math.exp(first), count), Quality(math.exp(second), count, agreed, divergence)


def run_window(model: Runtime, ids: Tensor) -> Tensor:
    """Return float logits `[length - 1, vocab]` of one window; UserError when values left the number format's range."""
    logits = torch.from_numpy(model.prefill(ids[None].numpy())[0][0, :-1])
    if not bool(torch.isfinite(logits).all()):
        if not isinstance(model, EagerModel):
            raise UserError("The graph's logits are not finite: its weights are damaged; export it again.")
        name = str(model.place.dtype).removeprefix("torch.")
        raise UserError(
            f"The model's values leave the range of {name} on {model.place.name}; use a device with bfloat16, or "
            "--device cpu."
        )
    return logits
