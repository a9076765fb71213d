"""A model seen without its post-norms, so that what needs a plain pre-norm model, such as a rotation, runs on it.

Behind a branch with a norm of gain g the projections o and down are read as diag(c g) W, their biases as c g b, with
the calibrated constant c in the place of 1 / rms (surgery/absorb.py; Pangu Light, arXiv 2505.20155; methods 1.5). A
model that loses all its post-norms is a member of its pre-norm relative, whose names its tensors then carry. Absorbing
before rotating is ours: SliceGPT (arXiv 2401.15024; methods 8.5) knows pre-norm models only, and a gain that stands
where the stream is turned does not commute with the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UserError
from compress.family import PER_LAYER, POST_NORMS, check_absorbable
from compress.recipe import Recipe
from compress.spec import LayerSpec, ModelSpec
from compress.spec_change import resolve_absorbed
from compress.spec_writer import view_absorbed
from compress.surgery.rotate import require_rotatable, work_type

# Layer -> post-norm role -> the constant that takes the place of its 1 / rms.
Constants = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Origin:
    """What one tensor of the view is made of: the stored tensor, and the stored norm that scales its rows, if any."""

    source: str
    norm: str = ""
    constant: float = 1.0


@dataclass(frozen=True, eq=False)
class AbsorbedCheckpoint(Checkpoint):
    """A checkpoint whose projections take in the norms behind them as they are read; made by `absorb_checkpoint`.

    `tensors` keeps the stored types (what the output is written in), but reading without a type gives float32: values
    are rounded once, when they are written. Asking for float64 computes in float64.
    """

    source: Checkpoint
    norm_offset: float
    origins: Mapping[str, Origin]

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the named tensors, float32 unless asked otherwise; KeyError for an unknown name."""
        return {name: self._read_whole(self.origins[name], dtype or torch.float32) for name in names}

    def read_rows(self, name: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return `tensor[rows]`, `[len(rows), ...]`, reading only those rows; IndexError outside it."""
        origin, final = self.origins[name], dtype or torch.float32
        stored = self.source.read_rows(origin.source, rows, load_type(origin, final))
        return self._scale(origin, stored, rows.to("cpu", torch.int64)).to(final)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return `tensor[start:stop]`, `[stop - start, ...]`, reading only those rows; IndexError outside it."""
        origin, final = self.origins[name], dtype or torch.float32
        stored = self.source.read_slice(origin.source, start, stop, load_type(origin, final))
        return self._scale(origin, stored, slice(start, stop)).to(final)

    def _read_whole(self, origin: Origin, final: torch.dtype) -> Tensor:
        stored = self.source.read_one(origin.source, load_type(origin, final))
        return self._scale(origin, stored, slice(None)).to(final)

    def _scale(self, origin: Origin, stored: Tensor, rows: slice | Tensor) -> Tensor:
        """Multiply rows as they came from the source, which gives fresh memory, by what their norm leaves of itself."""
        if not origin.norm:
            return stored
        gain = self.source.read_one(origin.norm, torch.float64) + self.norm_offset
        scale = (gain * origin.constant)[rows].to(stored.dtype)
        return stored.mul_(scale[:, None] if stored.dim() > 1 else scale)


def load_type(origin: Origin, final: torch.dtype) -> torch.dtype:
    """Return the type a tensor is taken from the source in: the wanted one, or that in which it is scaled."""
    return work_type(final) if origin.norm else final


def absorb_checkpoint(source: Checkpoint, spec: ModelSpec, constants: Constants) -> AbsorbedCheckpoint:
    """Return the model of `source` without the post-norms in `constants`: layer -> role -> what replaces 1 / rms.

    With none left it belongs to the family's pre-norm relative, where there is one, under whose names it is read.
    Raises UserError for a norm that cannot be absorbed or is gone, and for a constant that is no number above 0.
    """
    check_constants(spec, constants)
    viewed = describe_view(spec, constants)
    origins = list_origins(spec, viewed, constants)
    tensors = {name: replace(source.tensors[origin.source], name=name) for name, origin in origins.items()}
    config = dict(viewed.config)
    return AbsorbedCheckpoint(source.folder, config, tensors, source, spec.norm_offset, origins)


def check_constants(spec: ModelSpec, constants: Constants) -> None:
    """Raise UserError for the first layer, norm or constant with which nothing can be absorbed."""
    for index, own in constants.items():
        if not 0 <= index < len(spec.layers):
            raise UserError(
                f"Norms of layer {index} should be absorbed, but the model has layers 0 to {len(spec.layers) - 1}; "
                "take that entry out of the plan."
            )
        for role, constant in own.items():
            check_absorbable(spec.family, role)
            if role not in spec.layers[index].names:
                raise UserError(f"The norm '{role}' is gone from layer {index} already; leave it out of the plan.")
            if not 0 < constant < math.inf:
                raise UserError(
                    f"The constant of '{role}' in layer {index} must be a number above 0, got {constant!r}; "
                    "correct it in the plan."
                )


def describe_view(spec: ModelSpec, constants: Constants) -> ModelSpec:
    """Return the dense model's description without the norms in `constants`, as a member of the family it then has."""
    absorbed = resolve_absorbed(spec, constants)
    viewed = view_absorbed(absorbed, absorbed.shape)
    layers = {index: own for index, own in (viewed.config.get(PER_LAYER) or {}).items() if own}
    config = {key: value for key, value in viewed.config.items() if key != PER_LAYER}
    return replace(viewed, config=config | ({PER_LAYER: layers} if layers else {}))


def list_origins(spec: ModelSpec, viewed: ModelSpec, constants: Constants) -> dict[str, Origin]:
    """Return what each tensor is made of by the name that it has in the view (left-over buffers are not in it)."""
    origins: dict[str, Origin] = {}
    for role, name in viewed.names.items():
        origins.setdefault(name, Origin(spec.names[role]))  # a tied head goes by the embedding's name
    for index, (old, new) in enumerate(zip(spec.layers, viewed.layers, strict=True)):
        own = constants.get(index, {})
        origins |= {name: find_origin(old, role, own) for role, name in new.names.items()}
    return origins


def find_origin(layer: LayerSpec, role: str, constants: Mapping[str, float]) -> Origin:
    """Return what one tensor of a layer is made of; a role has other names in other families, but is the same."""
    behind = {POST_NORMS[norm][0]: norm for norm in constants}
    norm = behind.get(role.removesuffix("_bias"))
    return Origin(layer.names[role], layer.names[norm], constants[norm]) if norm else Origin(layer.names[role])


def check_rotation(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UserError, before any work is done, where a recipe rotates a model whose post-norms it does not absorb."""
    found = [(index, role) for index, layer in enumerate(spec.layers) for role in POST_NORMS if role in layer.names]
    if recipe.rotate == "none" or "hidden" not in recipe.axes or not found:
        return
    if any(POST_NORMS[role][1] not in spec.family.layer for _, role in found):
        require_rotatable(spec)  # absorbing cannot help: says so
    if recipe.absorb != "all":
        first = found[0][0]
        behind = ", ".join(role for index, role in found if index == first)
        raise UserError(
            f"--rotate {recipe.rotate}: family '{spec.family.name}' has norms behind its branches ({behind} in layer "
            f"{first}), which a rotated stream cannot pass; add --absorb all, or leave --rotate out."
        )
