"""The student's tensors over the processes of a run, each a DTensor of which a process holds some rows.

    layers     FSDP2 (`fully_shard`): whole while they run, one after the other; gradients are scattered as they come
    ends       embedding, final norm and head, whole for one step, since logits and embeddings are taken piece by piece
               and not by a module's forward; their gradients are scattered once, at its end
    moments    like the parameters; so is the running mean of weights

Every gradient is the MEAN over the processes, which is what FSDP2 leaves. Of FSDP2: arXiv 2304.11277, and
pytorch/torchtitan for its second form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.parallel import Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_mesh(group: Group) -> DeviceMesh | None:
    """Return the processes as a line, or None for one alone."""
    if group.size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(group.device.type, (group.size,))


def shard_module(module: nn.Module, mesh: DeviceMesh | None) -> None:
    """Leave each process its rows of a module's parameters; they are whole while its forward and backward run."""
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=mesh)


def span_rows(rows: int, place: int, parts: int) -> slice:
    """Return which rows of a tensor a process holds: those that torch's own `chunk` and sharding give it."""
    step = -(-rows // parts)
    return slice(min(rows, place * step), min(rows, (place + 1) * step))


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a whole tensor, which every process has, as one of which each keeps its rows."""
    from torch.distributed.tensor import DTensor, Shard

    own = tensor[span_rows(len(tensor), mesh.get_local_rank(), mesh.size())].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def scatter_gradient(gradient: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the mean over the processes of whole gradients; each keeps its rows."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    parts = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()], run_check=False)
    return parts.redistribute(mesh, [Shard(0)])


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, not a copy: all of an ordinary one."""
    take: Any = getattr(tensor, "to_local", None)
    found: Tensor = tensor if take is None else take()
    return found


def own_rows(tensor: Tensor) -> slice:
    """Return which rows of a tensor this process holds."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return slice(0, len(tensor)) if mesh is None else span_rows(len(tensor), mesh.get_local_rank(), mesh.size())


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, in every process."""
    take: Any = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if take is None else take()
    return found


def measure_norm(gradients: list[Tensor], group: Group) -> float:
    """Return the joint norm of gradients of which each process holds a part."""
    squares = sum(float(own_part(one).square().sum(dtype=torch.float64)) for one in gradients)
    return float(group.total(squares)[0] ** 0.5)
