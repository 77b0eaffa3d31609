"""Dion in Megatron-Bridge, by the hook that its optimizer configs have: `provide`."""

from dataclasses import dataclass, field, fields
from typing import Any

from megatron.bridge.training.config import OptimizerConfig
from megatron.core.utils import get_model_config

from megatron_dion.megatron.capabilities import begin_with_megatron
from megatron_dion.megatron.validation import REFUSED_WITH_DION
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.routing import tag_matrices, weight_of
from megatron_dion.sharding.layout import LEAST_BUCKET, dion_bucket_size


@dataclass
class DionOptimizerConfig(OptimizerConfig):
    """Bridge's optimizer config, of which Bridge builds Dion; `use_dion` puts it into a run."""

    dion: DionOptions = field(default_factory=DionOptions)

    def provide(self, model_chunks: list[Any], **options: Any) -> DionChainedOptimizer:
        """Called by Bridge's `setup_optimizer` in place of Megatron's factory.

        Raises:
            ValueError: a config asks for something that does not go with Dion.
        """
        for part in (self, model_chunks[0].ddp_config, get_model_config(model_chunks[0])):
            _refuse(part)
        return get_megatron_dion_optimizer(self, model_chunks, self.dion, **options)


def use_dion(config: Any, dion: DionOptions) -> None:
    """Let a run of Bridge train with Dion; the scalar optimizer keeps what its config says.

    With `overlap_grad_reduce`, a `bucket_size` that is None becomes one that cuts few matrices.

    Args:
        config: Bridge's `ConfigContainer`, before it is given to `pretrain`.
        dion: What the run chooses about Dion.

    Raises:
        ConfigurationError: megatron-core lacks something.
        ValueError: the container asks for something that does not go with Dion.
    """
    begin_with_megatron()
    _refuse(config)
    old = config.optimizer
    same = {one.name: getattr(old, one.name) for one in fields(old) if one.init}
    config.optimizer = DionOptimizerConfig(**same, dion=dion)
    config.optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True

    def tag(model_chunks: Any) -> Any:
        tagged, ddp = tag_matrices(model_chunks, rules=dion.rules), config.ddp
        if ddp.overlap_grad_reduce and ddp.bucket_size is None:  # DDP, made next, reads it
            matrices = (p for chunk in tagged for p in chunk.parameters() if weight_of(p))
            size = dion_bucket_size(sum(each.numel() for each in matrices), LEAST_BUCKET)
            ddp.bucket_size = size if size > LEAST_BUCKET else None
        return tagged

    if hasattr(config.model, "register_pre_wrap_hook"):
        config.model.register_pre_wrap_hook(tag)
    else:  # a config of the model, not a provider
        config.model.pre_wrap_hooks.append(tag)


def _refuse(part: Any) -> None:
    for name, advice in REFUSED_WITH_DION.items():
        value = getattr(part, name, None)
        value = getattr(value, "enabled", value)  # `inprocess_restart` is a config of its own
        if value:
            raise ValueError(f"Dion does not go with {name}={value}: {advice}")
