"""AdamW and a running mean of weights, in plain operations on tensors.

`torch.optim` imports torch's compiler, seconds and tens of megabytes that nothing here uses; a test holds this equal
to it. Of parameters that a group of processes shares, each process changes its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.recover.parallel import own_part


@dataclass(frozen=True)
class AdamOptions:
    """Decay rates of the moments, what is added to the root, and the decoupled weight decay of matrices."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2); norms and biases, the vectors, do not decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: AdamOptions) -> None:
        self.parameters, self.options, self.steps = dict(parameters), options, 0
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}

    def clear_gradients(self) -> None:
        """Let go of all gradients."""
        for tensor in self.parameters.values():
            tensor.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change every parameter by its gradient; one without a gradient stays as it is."""
        self.steps += 1
        for name, tensor in self.parameters.items():
            if tensor.grad is not None:
                held = (tensor, tensor.grad, self.first[name], self.second[name])
                own, gradient, first, second = (own_part(one) for one in held)
                self._update(own, gradient, (first, second), rate)

    def _update(self, tensor: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: float) -> None:
        """Change one parameter in place; one temporary tensor of its size exists at a time."""
        (fast, slow), options, (first, second) = self.options.betas, self.options, moments
        if options.decay and tensor.ndim > 1:
            tensor.mul_(1 - rate * options.decay)
        first.lerp_(gradient, 1 - fast)
        second.mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
        root = second.sqrt().div_((1 - slow**self.steps) ** 0.5).add_(options.eps)
        tensor.addcdiv_(first, root, value=-rate / (1 - fast**self.steps))


class Average:
    """The exponential running mean of the parameters (EMA), a copy of their size."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], keep: float) -> None:
        self._keep = keep
        self.values = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move the mean towards the parameters by 1 - keep."""
        for name, tensor in parameters.items():
            own_part(self.values[name]).lerp_(own_part(tensor), 1 - self._keep)

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Exchange the mean and the parameters; a second call undoes it."""
        for name, tensor in parameters.items():
            own, mean = own_part(tensor), own_part(self.values[name])
            held = own.detach().clone()
            own.copy_(mean)
            mean.copy_(held)
