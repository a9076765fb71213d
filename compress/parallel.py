"""The processes of a distributed run, as torchrun starts them: who this one is, and the few sums that they share.

Everything below is torch.distributed's: gloo on the CPU, nccl on CUDA devices, hccl on Ascend NPUs. A run of one
process needs no group, and every function here is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Group:
    """One process among `size`, counted from 0; the first one speaks and writes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` things are this process's; the first processes take what is over."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank, in every process (plain values: torch pickles them)."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def tell(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()


ALONE = Group()


@contextmanager
def join_group(kind: str = "cpu") -> Iterator[Group]:
    """Join the group that torchrun started, for the block; alone where it did not.

    Raises UserError where torch was built without what the device (cpu, cuda, npu) needs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch.distributed as group

    if not group.is_available():
        raise UserError("This build of torch has no torch.distributed; run without torchrun, or install another.")
    group.init_process_group(BACKENDS[kind])
    try:
        yield Group(group.get_rank(), group.get_world_size())
    finally:
        group.destroy_process_group()
