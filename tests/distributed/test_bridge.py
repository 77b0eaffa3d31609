"""Megatron-Bridge's own configs and `setup_optimizer` with Dion; `make test-versions` installs it.

Of Bridge's wheel, training/config.py and training/optim.py run as they are. Its other modules,
which import packages for GPUs and models of other projects, are stand-ins with empty classes.
"""

import importlib
import importlib.util
import runpy
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.project import ROOT
from tests.worlds import RankError, world

AS_THEY_ARE = ("megatron.bridge.training.config", "megatron.bridge.training.optim")


def has_bridge() -> bool:
    """`megatron` has no file of its own, so that nothing is imported."""
    spec = importlib.util.find_spec("megatron")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "bridge").is_dir() for folder in folders or ())


class StandIns(Loader):
    """Finds and makes every module of Bridge's but those that run as they are."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not f"{name}.".startswith("megatron.bridge.") or name in AS_THEY_ARE:
            return None
        spec = ModuleSpec(name, self, is_package=True)
        parents = sys.modules[name.rpartition(".")[0]].__path__
        spec.submodule_search_locations = [f"{one}/{name.rpartition('.')[2]}" for one in parents]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, "__getattr__", lambda name: class_named(name))  # noqa: B010


def class_named(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def train_with_bridge(asked: str) -> tuple[str, list[float]]:
    """On a rank: the class of the optimizer, and the losses of some steps with one batch.

    One thing more may be asked for.
    """
    sys.meta_path.insert(0, StandIns())
    made = runpy.run_path(str(ROOT / "tests/documentation/small_model.py"))
    bridge, optim = map(importlib.import_module, AS_THEY_ARE)
    from megatron.core.distributed import DistributedDataParallel

    from megatron_dion import DionConfig
    from megatron_dion import bridge as ours
    from megatron_dion.optimizer.options import DionOptions
    from megatron_dion.optimizer.routing import weight_of

    optimizer_config = bridge.OptimizerConfig(lr=4e-3, min_lr=4e-3, weight_decay=0.1)
    optimizer_config.optimizer_cpu_offload = asked == "optimizer_cpu_offload"
    made["transformer_config"].qk_clip = asked == "qk_clip"
    restart = bridge.InProcessRestartConfig(enabled=asked == "inprocess_restart")
    ddp, model = bridge.DistributedDataParallelConfig(), SimpleNamespace(pre_wrap_hooks=[])
    config = SimpleNamespace(optimizer=optimizer_config, ddp=ddp, model=model)
    config.inprocess_restart = restart
    ddp.overlap_grad_reduce, ours.LEAST_BUCKET = True, 1
    ours.use_dion(config, DionOptions(DionConfig(rank_fraction=0.25, seed=1)))
    config.optimizer.finalize()
    ddp.finalize()
    [hook] = model.pre_wrap_hooks
    chunk = DistributedDataParallel(made["transformer_config"], ddp, *hook([made["model"]]))
    matrices = sum(p.numel() for p in chunk.parameters() if weight_of(p))
    assert ddp.bucket_size == -(-matrices // 8)
    schedule = bridge.SchedulerConfig(lr_decay_iters=9, lr_warmup_iters=0)
    schedule.lr_decay_steps, schedule.lr_warmup_steps, schedule.wd_incr_steps = 9, 0, 9
    schedule.start_weight_decay = schedule.end_weight_decay = 0.1
    optimizer, scheduler = optim.setup_optimizer(config.optimizer, schedule, [chunk])
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    places, mask = torch.arange(16).expand(2, 16), torch.ones(1, 1, 16, 16).triu(1).bool()
    losses = []
    for _ in range(5):
        chunk.zero_grad_buffer()
        loss = chunk(tokens, places, mask, labels=tokens).mean()
        loss.backward()
        chunk.finish_grad_sync()
        optimizer.step()
        scheduler.step(1)
        losses.append(loss.item())
    return type(optimizer).__name__, losses


@pytest.mark.versions
@pytest.mark.skipif(not has_bridge(), reason="Megatron-Bridge is not installed")
def test_bridge_builds_dion_and_refuses_what_does_not_go_with_it() -> None:
    [(kind, losses)] = world(1).fork(train_with_bridge, "")
    assert kind == "DionChainedOptimizer"
    assert losses[-1] < losses[0] - 0.2
    for asked in ("optimizer_cpu_offload", "inprocess_restart", "qk_clip"):
        with pytest.raises(RankError, match=f"Dion does not go with {asked}=True: "):
            world(1).fork(train_with_bridge, asked)
