"""Stand-in for torch.cuda, so that the unmodified megatron-core wheel trains on CPU with gloo.

Megatron-core 0.19.2 takes a CUDA device for granted in many small places. This module is the whole
list of what has to be different without one; comments say where megatron (MC: megatron/core, MT:
megatron/training) forces it. `torch.cuda.is_available()` stays false.

The patches are global to the process: for example, `Tensor.type()` names CUDA types from then on.
A process that has a GPU to use must never load them.
"""

import contextlib
import copy
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data

CPU = torch.device("cpu")

_is_installed = False


def install(*, hide_gpus: bool = False) -> None:
    """Replace what megatron uses of torch.cuda, and some of megatron's functions; imports megatron.

    Call it before anything else imports megatron. A second call does nothing. CUDA devices are an
    error unless `hide_gpus` asks to hide them from torch.
    """
    global _is_installed
    if _is_installed:
        return
    if torch.cuda.is_available() and not hide_gpus:
        raise RuntimeError(
            "the CPU platform replaces torch.cuda, and this machine has a CUDA device: "
            "use it (--device cuda), or ask for the CPU explicitly (--device cpu)"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU platform must be installed before megatron is imported")
    # Of missing packages that need CUDA, and that a fork moved the CPU's random numbers; it must.
    about_cuda = "Transformer Engine and Apex|Apex is not|Only transformer-engine|No CUDA runtime"
    warnings.filterwarnings("ignore", message=about_cuda)
    for logger in ("torch.utils.cpp_extension", "megatron.core.tensor_parallel.random"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _replace_functions_of_torch()
    _replace_functions_of_megatron()
    _is_installed = True


def _replace(owner: Any, **values: Any) -> None:
    """Replace attributes, all of which must be there."""
    for name, value in values.items():
        if not hasattr(owner, name):
            raise RuntimeError(f"there is no {owner.__name__}.{name} that could be replaced")
        setattr(owner, name, value)


def _always(answer: Any = None) -> Callable[..., Any]:
    """Make a new function each time: torch._dynamo refuses one object under two torch names."""
    return lambda *args, **kwargs: answer


def _replace_functions_of_torch() -> None:
    properties = SimpleNamespace(name="cpu", major=10, total_memory=0, multi_processor_count=1)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        _replace(torch.cuda, **{name: _always()})
    # MT/utils/common_utils.py:322 reports memory
    for name in ("memory_allocated", "memory_reserved"):
        _replace(torch.cuda, **{name: _always(0), f"max_{name}": _always(0)})
    _replace(
        torch.cuda,
        # Real devices are hidden, where asked to.
        is_available=_always(False),
        # MC/tensor_parallel/mappings.py:95, MT/initialize.py:282, MC/timers.py:152 and many
        current_device=_always(CPU),
        # MT/initialize.py:358: with 0, no parallel groups
        device_count=_always(1),
        # MT/arguments.py:1339, 1414: below 10 CUDA_DEVICE_MAX_CONNECTIONS has to be 1 with TP
        get_device_properties=_always(properties),
        get_device_capability=_always((10, 0)),
        # MC/tensor_parallel/random.py:120, 174: the real ones fail, or queue the call for ever
        _lazy_init=_always(),
        _lazy_call=lambda function, **kwargs: function(),
        device_memory_used=_always(0),
        # MC/distributed/distributed_data_parallel.py:297, MC/pipeline_parallel, MC/timers.py
        Stream=_Done,
        Event=_Done,
        current_stream=_always(_Done()),
        default_stream=_always(_Done()),
        set_stream=_always(),
        stream=lambda stream: contextlib.nullcontext(),
        # MC/tensor_parallel/random.py:166, 305: generators are indexed by current_device()
        manual_seed=torch.manual_seed,
        default_generators={CPU: torch.default_generator},
    )
    # The default CPU generator is the "CUDA" generator: MC/tensor_parallel/random.py:114, 303
    for owner in (torch.cuda, torch.cuda.random):
        _replace(
            owner,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        )
    # device="cuda" in MC/optimizer/optimizer.py:690, MT/training.py:1131 and many
    for name in ("tensor", "zeros", "ones", "full", "empty", "empty_like"):
        _replace(torch, **{name: _on_cpu(getattr(torch, name))})
    _replace(
        torch.Tensor,
        # MC/models/common/embeddings/rope_utils.py:64, MT/models/dist_utils.py
        cuda=lambda self, *args, **kwargs: self,
        # MC/optimizer/distrib_optimizer.py:401, 466, clip_grads.py:174 compare type names.
        type=_cuda_type_names(torch.Tensor.type),
        # MC/distributed
        record_stream=_always(),
    )
    # MC/optimizer/layer_wise_optimizer.py:772 (stock Muon) gathers shards of unequal size.
    _replace(dist, all_gather=_uneven_all_gather(dist.all_gather))
    # MC/jit.py:21: compiling takes longer than a test. Used plain, and with arguments.
    _replace(torch, compile=lambda model=None, **options: model or (lambda function: function))
    loader = torch.utils.data.DataLoader
    _replace(loader, __init__=_with_generator_of_its_own(loader.__init__))


class _Done:
    """A stream or an event: work on CPU is done when the call returns, whatever the call."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _do_nothing(self, *args: Any) -> "_Done":
        return self

    record = synchronize = wait = wait_stream = wait_event = query = record_event = _do_nothing


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a tensor factory understand device='cuda' as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        # MC/models/common/embeddings/rope_utils.py:63 pins memory, which needs a CUDA driver.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _cuda_type_names(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Make Tensor.type() answer 'torch.cuda.FloatTensor' where it says 'torch.FloatTensor'."""

    @functools.wraps(type_of)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return named


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Let all_gather take shards of unequal size, as NCCL's does; they travel padded."""

    @functools.wraps(all_gather)
    def gather(
        shards: list[torch.Tensor], mine: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        largest = max(shard.numel() for shard in shards)
        if all(shard.numel() == largest for shard in shards):
            return all_gather(shards, mine, group=group, async_op=async_op)
        padded = [shard.new_empty(largest) for shard in shards]
        padding = mine.new_zeros(largest - mine.numel())
        all_gather(padded, torch.cat([mine.flatten(), padding]), group=group)
        for shard, received in zip(shards, padded, strict=True):
            shard.copy_(received[: shard.numel()].view_as(shard))
        return None

    return gather


def _with_generator_of_its_own(init: Callable[..., None]) -> Callable[..., None]:
    """Keep data loaders from drawing their seed from the generator that dropout draws from.

    MT/training.py:4513 makes them after the checkpoint has restored that generator, so a resumed
    run would see other dropout than an uninterrupted one.
    """

    @functools.wraps(init)
    def new_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.generator is None:
            self.generator = torch.Generator()

    return new_init


def _replace_functions_of_megatron() -> None:
    from megatron.core import optimizer as optimizers
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.training import training

    from megatron_dion.platforms.cpu_adam import CpuAdam
    from megatron_dion.platforms.cpu_attention import GatheringDotProductAttention

    # torch's Adam cannot load a distributed checkpoint, see CpuAdam.
    _replace(optimizers, Adam=CpuAdam, USING_PYTORCH_OPTIMIZER=False)
    _replace(distrib_optimizer, Adam=CpuAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)
    _replace(
        training,
        # MT/initialize.py:64 asserts that CUDA is available.
        initialize_megatron=functools.partial(training.initialize_megatron, allow_no_cuda=True),
        # MT/initialize.py:473: its warm-up of fused kernels draws random numbers.
        set_jit_fusion_options=_always(),
    )
    # MC/transformer/torch_norm.py:50 refuses sequence parallelism.
    _replace(WrappedTorchNorm, __new__=_norm_with_sequence_parallelism(WrappedTorchNorm.__new__))
    # MC/transformer/dot_product_attention.py:43 knows no v_channels, and line 58 no CP.
    _replace(LocalSpecProvider, core_attention=lambda self: GatheringDotProductAttention)
    # MC/transformer/moe/moe_utils.py:1184 converts only tensors that are on a GPU.
    _replace(
        token_dispatcher,
        maybe_move_tensor_to_cpu=lambda tensor, as_numpy=False, record_stream=False: (
            tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
        ),
    )


def _norm_with_sequence_parallelism(new_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch's norms see a part of the sequence, with the mark by which gradients are summed."""

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = new_norm(cls, accepted, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    return new
