"""The processes of a distributed run, as torchrun starts them: who this one is, and the few sums that they share.

Everything below is torch.distributed's: gloo on the CPU, nccl on CUDA devices, hccl on Ascend NPUs. A run of one
process needs no group, and every function here is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError

# With a device, sums of what lies in the machine's memory still go by gloo.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
PATIENCE = timedelta(days=1)  # the others wait while the first process writes and proves; torchrun ends a dead run
CLAIM = "lightpress/claimed"


@dataclass(frozen=True)
class Group:
    """One process among `size`, counted from 0, of which `local` run on this machine; its `device`.

    The first process speaks and writes. `store` is what the group met through.
    """

    rank: int = 0
    size: int = 1
    local: int = 1
    device: torch.device = torch.device("cpu")
    store: Any = field(default=None, compare=False, repr=False)

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

    def total(self, *values: float) -> list[float]:
        """Return the sums of plain numbers over all processes."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.add([sums])
        found: list[float] = sums.tolist()
        return found

    def any(self, *wishes: bool) -> list[bool]:
        """Return for each wish whether some process has it."""
        return [count > 0 for count in self.total(*wishes)]

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
        self.total(0.0)

    def claim(self, word: str) -> str:
        """Return the word of the process that came here first; nothing where it cannot be known.

        No process waits for another here, so that it may be asked wherever a run breaks.
        """
        if self.store is None:
            return word
        try:
            found: bytes = self.store.compare_set(CLAIM, "", word)
        except RuntimeError:  # the process that held the store is gone
            return ""
        return found.decode()


ALONE = Group()


@contextmanager
def join_group(kind: str = "cpu") -> Iterator[Group]:
    """Join the group that torchrun started, for the block; alone where it did not.

    Raises UserError where torch was built without what the device (cpu, cuda, npu) needs. A block that fails does not
    leave the group: with others in the middle of a sum that would wait for them, and the process ends anyway.
    """
    place = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, place)
    if device.index is not None:
        getattr(torch, kind).set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group(device=device)
        return
    import torch.distributed as group

    if not group.is_available():
        raise UserError("This build of torch has no torch.distributed; run without torchrun, or install another.")
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    group.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=size, timeout=PATIENCE)
    yield Group(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, store)
    group.destroy_process_group()
