"""Plain `Dion` and the float64 reference side by side, fed with the same gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dion import Dion
from tests.reference import ReferenceMatrix

Shape = tuple[int, int]
SHAPES: list[Shape] = [(1, 7), (6, 1), (1, 1), (8, 8), (20, 6), (6, 20)]
LR = 0.03
# Relative. What float32 rounding leaves after ten steps is about a tenth of these; most in the
# right factor, whose columns may be small differences of large numbers. A wrong term is above 1e-2.
TOLERANCES = {"weight": 3e-6, "momentum": 3e-5, "right_factor": 3e-4}
# Rounding the operands to 10 bits, on a CPU, leaves a tenth of these.
OF_TF32 = {"weight": 2e-4, "momentum": 2e-3, "right_factor": 2e-2}


def draw(shape: Shape, seed: int, factor: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor


def parameters(shapes: Sequence[Shape]) -> list[Parameter]:
    return [Parameter(draw(shape, 1000 + i)) for i, shape in enumerate(shapes)]


class Comparison:
    """An optimizer of named parameters, and each parameter's reference.

    Args:
        groups: for each parameter group its shapes and its options.
        device: of the optimizer; the references are on the CPU.
        options: of the optimizer.
    """

    def __init__(
        self,
        groups: Iterable[tuple[Sequence[Shape], dict[str, float]]],
        device: str = "cpu",
        **options: Any,
    ) -> None:
        torch_groups: list[dict[str, Any]] = []
        self.named: dict[str, Parameter] = {}
        for number, (shapes, group_options) in enumerate(groups):
            drawn = enumerate(parameters(shapes))
            own = {f"{number}.{i}": Parameter(p.detach().to(device)) for i, p in drawn}
            torch_groups.append({"params": list(own.items()), **group_options})
            self.named.update(own)
        self.optimizer = Dion(torch_groups, **{"lr": LR, **options})
        self.references = {
            name: ReferenceMatrix.start(name, parameter.cpu(), self.optimizer.config)
            for name, parameter in self.named.items()
        }

    def gradient(self, name: str, step: int, factor: float = 1.0) -> Tensor:
        """A gradient that any two comparisons of the same shapes agree upon."""
        number = list(self.named).index(name)
        return draw(self.references[name].weight.shape, 100 * number + step, factor)  # type: ignore[arg-type]

    def step(self, gradients: dict[str, Tensor]) -> None:
        """A step of both with these gradients; parameters without one are left out."""
        for name, parameter in self.named.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for group in self.optimizer.param_groups:
            for name in group["param_names"]:
                if name in gradients:
                    self.references[name].step(
                        gradients[name], group["lr"], group["weight_decay"], self.optimizer.config
                    )
        self.optimizer.step()

    def run(self, steps: Iterable[int], after_step: Callable[[], None] = lambda: None) -> None:
        """Steps with random gradients for all parameters."""
        for step in steps:
            self.step({name: self.gradient(name, step) for name in self.named})
            after_step()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Weight, momentum and right factor as the optimizer has them."""
        parameter = self.named[name]
        return {"weight": parameter.detach(), **self.optimizer.state[parameter]}

    def copies(self) -> dict[str, Tensor]:
        return {
            f"{name} {what}": tensor.clone()
            for name in self.named
            for what, tensor in self.tensors(name).items()
        }

    def errors(self) -> dict[str, dict[str, float]]:
        """By name, how far weight, momentum and right factor are from the reference, relative."""
        return {name: self._errors(name) for name in self.named}

    def _errors(self, name: str) -> dict[str, float]:
        found, gradient = {}, self.named[name].grad
        for what, tensor in self.tensors(name).items():
            expected = getattr(self.references[name], what)
            assert tensor.shape == expected.shape, f"{name} {what}: {tuple(tensor.shape)}"
            size = expected.norm()
            if what == "momentum" and gradient is not None:
                # It is zero where the rank is full and mu is 0.
                size = torch.maximum(size, gradient.cpu().double().norm())
            found[what] = float((tensor.cpu().double() - expected).norm() / size)
        return found

    def assert_equal(self, tolerances: Mapping[str, float] = TOLERANCES) -> None:
        for name, errors in self.errors().items():
            for what, distance in errors.items():
                assert distance < tolerances[what], f"{name} {what}: {distance:.1e}"


def assert_bitwise_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different, ", ".join(different)
