"""Stand-in for torch.cuda, so that the unmodified megatron-core wheel trains on CPU with gloo.

Megatron-core 0.19.2 takes a CUDA device for granted in many small places. This module is the whole
list of what has to be different without one; comments say where megatron (MC: megatron/core, MT:
megatron/training) forces it. `install()` comes before the first import of megatron,
`install_megatron_patches()` after it. `torch.cuda.is_available()` stays false.

The patches are global to the process: for example, `Tensor.type()` names CUDA types from then on.
A process that has a GPU to use must never load them.
"""

import contextlib
import copy
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data
from torch.distributed.distributed_c10d import _world

CPU = torch.device("cpu")

# How warnings begin of which a machine without CUDA is the whole reason.
_NOT_ABOUT_THE_RUN = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine",
    "No CUDA runtime is found",
)

_installed: set[str] = set()


def install(*, hide_gpus: bool = False) -> None:
    """Replace what megatron uses of torch.cuda. Call it before megatron is imported.

    Args:
        hide_gpus: Install even where CUDA devices exist, and hide them from torch.

    Raises:
        RuntimeError: There is a CUDA device and `hide_gpus` is false, or megatron is already there.
    """
    if "torch" in _installed:
        return
    if torch.cuda.is_available() and not hide_gpus:
        raise RuntimeError(
            "the CPU platform replaces torch.cuda, and this machine has a CUDA device: "
            "use it (--device cuda), or ask for the CPU explicitly (--device cpu)"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU platform must be installed before megatron is imported")
    _replace_devices_and_streams()
    _replace_generators()
    _replace_tensor_functions()
    _silence_warnings_about_cuda()
    _installed.add("torch")


def install_megatron_patches() -> None:
    """Replace the functions of megatron that torch.cuda's stand-in cannot help. Imports megatron.

    Raises:
        RuntimeError: `install()` was not called first.
    """
    if "torch" not in _installed:
        raise RuntimeError("call megatron_dion.platforms.cpu.install() before megatron is imported")
    if "megatron" in _installed:
        return
    _replace_functions_of_megatron()
    _silence_rng_fork_warning()
    _installed.add("megatron")


# --- torch ------------------------------------------------------------------------------------


def _replace(owner: Any, **values: Any) -> None:
    """Replace attributes.

    Raises:
        RuntimeError: There is nothing to replace.
    """
    for name, value in values.items():
        if not hasattr(owner, name):
            raise RuntimeError(
                f"the CPU platform patches {owner.__name__}.{name}, which this version of torch or "
                "megatron-core does not have"
            )
        setattr(owner, name, value)


def _replace_devices_and_streams() -> None:
    properties = SimpleNamespace(
        name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=1
    )
    _replace(
        torch.cuda,
        # Real devices are hidden, where asked to.
        is_available=lambda: False,
        # MC/tensor_parallel/mappings.py:95, MT/initialize.py:282, MC/timers.py:152 and many
        current_device=lambda: CPU,
        set_device=_no_op(),
        synchronize=_no_op(),
        # MT/initialize.py:358: with 0, no parallel groups
        device_count=lambda: 1,
        # MT/arguments.py:1339, 1414: from 10 on no CUDA_DEVICE_MAX_CONNECTIONS is needed
        get_device_properties=lambda device=None: properties,
        get_device_capability=lambda device=None: (10, 0),
        # MC/tensor_parallel/random.py:120, 174: the real ones fail, or queue the call for ever
        _lazy_init=_no_op(),
        _lazy_call=lambda function, **kwargs: function(),
        # MT/utils/common_utils.py:322 reports memory
        memory_allocated=_zero(),
        max_memory_allocated=_zero(),
        memory_reserved=_zero(),
        max_memory_reserved=_zero(),
        device_memory_used=_zero(),
        reset_peak_memory_stats=_no_op(),
        empty_cache=_no_op(),
        # MC/distributed/distributed_data_parallel.py:297, MC/pipeline_parallel, MC/timers.py
        Stream=_Done,
        Event=_Done,
        current_stream=lambda device=None: _STREAM,
        default_stream=lambda device=None: _STREAM,
        set_stream=_no_op(),
        stream=lambda stream: contextlib.nullcontext(),
    )


def _replace_generators() -> None:
    """The default CPU generator is the "CUDA" generator."""
    # MC/tensor_parallel/random.py:114, 303, MT/checkpointing.py:2665
    for owner in (torch.cuda, torch.cuda.random):
        _replace(
            owner,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        )
    # MC/tensor_parallel/random.py:166, 305: generators are indexed by current_device()
    _replace(
        torch.cuda,
        manual_seed=torch.manual_seed,
        default_generators={CPU: torch.default_generator},
    )
    loader = torch.utils.data.DataLoader
    _replace(loader, __init__=_with_generator_of_its_own(loader.__init__))


def _replace_tensor_functions() -> None:
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
        record_stream=_no_op(),
    )
    _replace(dist, all_gather=_uneven_all_gather(dist.all_gather))
    # MC/jit.py:21: compiling takes longer than a test.
    _replace(torch, compile=_run_eagerly)


class _Done:
    """A stream or an event: work on CPU is done when the call returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        """Do nothing."""

    record = synchronize = wait_stream = wait_event = wait

    def query(self) -> bool:
        """Everything is done."""
        return True

    def record_event(self, event: Any = None) -> Any:
        """Return an event that has happened."""
        return event or self


_STREAM = _Done()


def _silence_warnings_about_cuda() -> None:
    """Importing megatron says a dozen times that packages are missing which need CUDA."""
    for beginning in _NOT_ABOUT_THE_RUN:
        warnings.filterwarnings("ignore", message=beginning)
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: not record.getMessage().startswith(_NOT_ABOUT_THE_RUN)
    )


def _no_op() -> Callable[..., None]:
    """Make a new function each time: torch._dynamo refuses one object under two torch names."""
    return lambda *args, **kwargs: None


def _zero() -> Callable[..., int]:
    return lambda *args, **kwargs: 0


def _run_eagerly(model: Any = None, **options: Any) -> Any:
    """Take the place of torch.compile, plain and with arguments."""
    return (lambda function: function) if model is None else model


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
    """Let all_gather take shards of unequal size, as NCCL's does.

    MC/optimizer/layer_wise_optimizer.py:772 (stock Muon) relies on it. Shards travel padded to the
    largest.
    """

    @functools.wraps(all_gather)
    def gather(
        shards: list[torch.Tensor], mine: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        largest = max(shard.numel() for shard in shards)
        if all(shard.numel() == largest for shard in shards):
            return all_gather(shards, mine, group=group, async_op=async_op)
        if async_op:
            raise NotImplementedError("on CPU, all_gather of unequal shards is synchronous only")
        padded = [shard.new_empty(largest) for shard in shards]
        padded_mine = mine.new_zeros(largest)
        padded_mine[: mine.numel()] = mine.flatten()
        all_gather(padded, padded_mine, group=group)
        for shard, received in zip(shards, padded, strict=True):
            shard.copy_(received[: shard.numel()].view_as(shard))
        return None

    return gather


# --- megatron ---------------------------------------------------------------------------------


def _replace_functions_of_megatron() -> None:
    from megatron.core import optimizer as optimizers
    from megatron.core.distributed import param_and_grad_buffer
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
        set_jit_fusion_options=_no_op(),
    )
    # MC/transformer/torch_norm.py:50 refuses sequence parallelism.
    _replace(WrappedTorchNorm, __new__=_norm_with_sequence_parallelism(WrappedTorchNorm.__new__))
    # MC/transformer/dot_product_attention.py:43 knows no v_channels, and line 58 no CP.
    _replace(LocalSpecProvider, core_attention=lambda self: GatheringDotProductAttention)
    buffers = param_and_grad_buffer
    _replace(buffers, _coalescing_manager=_one_type_at_a_time(buffers._coalescing_manager))
    # MC/transformer/moe/moe_utils.py:1184 converts only tensors that are on a GPU.
    _replace(token_dispatcher, maybe_move_tensor_to_cpu=_to_numpy_if_asked)


def _norm_with_sequence_parallelism(new_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch's norms run on a part of the sequence.

    They only need the mark by which finalize_model_grads finds the gradients that have to be summed
    over the tensor-parallel group.
    """

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = new_norm(cls, accepted, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    return new


def _one_type_at_a_time(coalescing: Callable[..., Any]) -> Callable[..., Any]:
    """Let gloo see only tensors of one type in one coalesced collective.

    It gathers tensors of several types into each other's memory without a word. With FP8 weights
    Megatron gathers bytes and bf16 together (MC/distributed/param_and_grad_buffer.py:504).
    """

    @contextlib.contextmanager
    def manage(group: Any, async_ops: bool = False) -> Iterator[Any]:
        with coalescing(group, async_ops=async_ops) as works:
            yield works
            recorded = list(_world.pg_coalesce_state[group])
            _world.pg_coalesce_state[group].clear()
        for dtype in dict.fromkeys(operation.tensor.dtype for operation in recorded):
            with coalescing(group, async_ops=async_ops) as of_one_type:
                alike = [operation for operation in recorded if operation.tensor.dtype == dtype]
                _world.pg_coalesce_state[group].extend(alike)
            works.works.extend(of_one_type.works)

    return manage


def _to_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _silence_rng_fork_warning() -> None:
    """MC/tensor_parallel/random.py warns at each fork that the CPU generator moved; it must."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
