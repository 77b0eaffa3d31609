"""What a step would ask of a GPU, counted without one.

torch's FakeTensorMode lets tensors of device `cuda` exist without a driver: shapes, strides, types
and devices are computed, and there is no data. A grid of ranks is one rank of it, whose collectives
do nothing. What a GPU makes of the calls, their time above all, is not to be seen here.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_dion
from megatron_dion import Dion
from megatron_dion.algorithm.step import views_in
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.layout import Placement
from megatron_dion_tools.plan.dion import launches

_PACKAGE = str(Path(megatron_dion.__file__).parent)
_NO_KERNEL = set(
    "view _unsafe_view permute transpose t unsqueeze squeeze expand select slice narrow as_strided"
    " unbind split split_with_sizes diagonal detach alias lift_fresh empty empty_like new_empty"
    " empty_strided new_empty_strided device is_same_size resize_ set_ _local_scalar_dense".split()
)
_WAITS = set(
    "_local_scalar_dense nonzero masked_select _linalg_check_errors equal is_nonzero _unique2"
    " unique_dim repeat_interleave".split()
)


@dataclass
class Counts:
    """Of one step.

    Attributes:
        launches: kernels, at least; a call that ATen carries out one by one counts as so many.
        waits: where the host waits for the device.
        copies: where memory of the host is copied to the device.
        host_tensors: where an operator gets a tensor of the host, or makes one.
        peak: bytes of temporaries that live at a time; buffers of the exchange are not counted.
        planned: what the exchange says of these bytes.
        modelled: what the planner's formula says of the launches.
        lines: launches by line of the package.
    """

    launches: int = 0
    waits: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    host_tensors: list[str] = field(default_factory=list)
    peak: int = 0
    planned: int = 0
    modelled: float = 0.0
    lines: Counter[str] = field(default_factory=Counter)


class _Counting(TorchDispatchMode):
    """Sees each operator before FakeTensorMode does; answers those that need data."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, place = func._schema.name.split("::")[-1], _place()
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense":
            self._counts.waits.append(f"{name} {place}")
            return True if inputs[0].dtype == torch.bool else 1.0
        if name == "_linalg_check_errors":
            self._counts.waits.append(f"{name} {place}")
            return None
        before = {x.untyped_storage()._cdata for x in inputs}
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._note_devices(name, place, inputs, outputs)
        if name in _WAITS:
            self._counts.waits.append(f"{name} {place}")
        if name not in _NO_KERNEL:
            launches = _launches(name, args, inputs)
            self._counts.launches += launches
            self._counts.lines[place] += launches
        self._note_memory(outputs, before)
        return out

    def _note_devices(
        self, name: str, place: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        devices = [x.device.type for x in (*inputs, *outputs)]
        if "cpu" in devices and name not in ("device", "lift_fresh"):
            self._counts.host_tensors.append(f"{name} {place}")
        if name in ("_to_copy", "copy_") and len(set(devices)) > 1:
            source = inputs[-1].device.type
            into = self._counts.copies if source == "cpu" else self._counts.waits
            into.append(f"{name} {place}")

    def _note_memory(self, outputs: Sequence[Tensor], before: set[int]) -> None:
        for x in outputs:
            storage = x.untyped_storage()
            if x.device.type == "cuda" and storage._cdata not in before:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: (r, n) for k, (r, n) in self._alive.items() if not r.expired()}
        self._counts.peak = max(self._counts.peak, sum(n for _, n in self._alive.values()))


def _launches(name: str, args: Any, inputs: Sequence[Tensor]) -> int:
    if name.startswith(("_foreach_", "_fused_")):
        return _foreach_launches(name, args)
    if name.startswith("addbmm"):  # a loop over the batch
        return int(args[1].shape[0])
    if name == "linalg_solve_triangular":  # cuBLAS one by one, where matrices are few and large
        batch = max(x.shape[:-2].numel() for x in inputs)
        return batch if batch <= 8 and inputs[0].shape[-1] >= 64 else 1
    return 1


def _foreach_launches(name: str, args: Any) -> int:
    """By ATen's rule for its fast path; the slow one is a kernel for each tensor."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    lists = lists[:4]  # a fifth, of a fused optimizer, counts steps
    first = lists[0][0]
    is_fast = all(
        torch.ops.aten.is_non_overlapping_and_dense(t) and t.device == first.device
        for tensors in lists
        for t in tensors
    )
    for tensors in lists:
        kind = tensors[0].dtype if "copy" in name else first.dtype
        is_fast &= all(t.dtype == kind for t in tensors)
        is_fast &= all(
            a.shape == b.shape and a.stride() == b.stride()
            for a, b in zip(lists[0], tensors, strict=True)
        )
    if not is_fast:
        return len(lists[0])
    chunks = sum(-(-t.numel() // 65536) for t in lists[0])
    # Tensors of a kernel; it has 320 chunks at most.
    most = {1: 110, 2: 64, 3: 48, 4: 36}[len(lists)]
    return max(-(-chunks // 320), -(-len(lists[0]) // most))


def _place() -> str:
    frame = sys._getframe(2)
    while frame.f_back and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Group:
    """A process group that exists in one process only."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def _nothing(*_: Any, **__: Any) -> mock.Mock:
    """A collective that is done; unlike a mock, it keeps no tensor alive."""
    return mock.Mock()


@contextmanager
def _silent_collectives() -> Iterator[None]:
    names = ("all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches = [mock.patch.object(dist, name, _nothing) for name in names]
        patches.append(
            mock.patch.object(torch.UntypedStorage, "data_ptr", lambda self: self._cdata)
        )
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def with_gradients(
    shapes: Sequence[tuple[int, ...]], in_one_buffer: bool = False
) -> list[torch.nn.Parameter]:
    """Parameters of fake CUDA memory, to be made within a call that is counted.

    Their gradients may be views of one tensor, as Megatron's are.
    """
    parameters = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    if in_one_buffer:
        buffer = torch.empty(sum(map(torch.numel, gradients)), device="cuda")
        gradients = views_in(buffer, shapes)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def whole(shapes: Sequence[tuple[int, int]], **options: Any) -> Callable[[], Dion]:
    """Plain Dion of whole matrices."""
    return lambda: Dion(with_gradients(shapes), weight_decay=0.1, **options)


def sharded(
    placements: Sequence[Placement],
    tensor: tuple[int, int],
    data: tuple[int, int],
    replicas: int = 1,
    **options: Any,
) -> Callable[[], Dion]:
    """Dion on one rank of a grid.

    Args:
        placements: of the weights.
        tensor: size and rank of the tensor-parallel group.
        data: of the data-parallel group.
        replicas: number of replicas with gradients of their own.
        **options: of Dion.
    """

    def build() -> Dion:
        pieces = {i: p.piece(data[1], data[0]) for i, p in enumerate(placements)}
        sizes = {i: stop - start for i, (start, stop) in pieces.items() if stop > start}
        tensors = dict(
            zip(sizes, with_gradients([(n,) for n in sizes.values()], True), strict=True)
        )
        groups: Any = [Group(*g) if g[0] > 1 else None for g in (tensor, data, (replicas, 0))]
        dion = Dion(list(tensors.values()), weight_decay=0.1, **options)
        dion.distribute(Distribution(placements, tensors, torch.device("cuda:0"), Groups(*groups)))
        return dion

    return build


def count(run: Callable[[], object]) -> Counts:
    """What is asked of a GPU in a call."""
    counts = Counts()
    with FakeTensorMode(), torch.no_grad(), _Counting(counts):
        run()
    return counts


def count_step(build: Callable[[], Dion]) -> Counts:
    """A step of the optimizer that `build` makes."""
    counts = Counts()
    with FakeTensorMode(), _silent_collectives(), torch.no_grad():
        dion = build()
        sets = dion.bind().sets
        counts.planned = max(each.exchange.temporary_bytes for each in sets)
        counts.modelled = sum(launches(each.plan, each.exchange.has_residual) for each in sets)
        with _Counting(counts):
            dion.step()
    return counts
