"""The join with Megatron's loading and saving of checkpoints."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.agreement import gathered, on_first_rank
from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad, told
from megatron_dion.checkpointing.folders import Choice
from megatron_dion.checkpointing.saving import Saver
from megatron_dion.megatron import patches
from megatron_dion.megatron.recorder import say
from megatron_dion.megatron.validation import check_checkpoint_exists
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.checkpoint import MastersOnly, Source
from megatron_dion.optimizer.record import Record

_RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
_MODEL_ONLY = "--no-load-optim or --finetune takes the model's weights only"


def choose(args: argparse.Namespace) -> Choice | None:
    """Chooses the checkpoint to load: the newest complete one, or that of `--ckpt-step`.

    Where `--load` is `--save` and holds none, the run starts from `--pretrained-checkpoint` or from
    random weights. The choice is put on the command line and in Megatron's reading of the tracker:
    it believes that, whatever stands beside it, and without one that there is no checkpoint.

    Raises:
        CheckpointError: there is none elsewhere, or the chosen one is not complete.
    """
    if args.ckpt_format != "torch_dist":
        check_checkpoint_exists(args)
        return None
    if _saves_there(args, args.load):
        folders.settle(Path(args.load))
    choice = _chosen(args, "--load", args.load)
    if choice is None:
        args.load = args.pretrained_checkpoint
        choice = _chosen(args, "--pretrained-checkpoint", args.load)
        args.finetune = args.finetune or choice is not None
    args.pretrained_checkpoint = None
    if choice is not None:
        args.ckpt_step = choice.iteration
        patches.read_tracker_with(choice.tracked)
    return choice


def _chosen(args: argparse.Namespace, flag: str, given: str | None) -> Choice | None:
    if given is None:
        return None
    try:
        choice = folders.choose(Path(given), args.ckpt_step)
    except NothingToLoad as error:
        if not _may_be_empty(args, given):
            raise CheckpointError(
                f"{flag} {error}: correct the path, or leave {flag} out to start from random"
                " weights"
            ) from error
        _say(args, f"{flag} {error}: starting from iteration 0")
        return None
    for remark in choice.remarks:
        _say(args, f"{flag}: {remark}")
    return choice


def _may_be_empty(args: argparse.Namespace, given: str) -> bool:
    """Whether a folder of checkpoints is one that the run itself is to fill."""
    return _saves_there(args, given) and not args.exit_on_missing_checkpoint


def _saves_there(args: argparse.Namespace, given: str | None) -> bool:
    if args.save is None or given is None:
        return False
    return Path(args.save).resolve() == Path(given).resolve()


def _say(args: argparse.Namespace, line: str) -> None:
    if args.rank == 0:
        say(line)


def use(choice: Choice | None, args: argparse.Namespace) -> None:
    """From now on Megatron loads the chosen checkpoint, and saves new ones beside the old.

    Args:
        choice: as `choose` returned it.
        args: the command line.
    """
    if args.ckpt_format != "torch_dist":
        return
    patches.when_optimizer_is_built(lambda _: _agree_on(choice))
    if choice is not None:

        def load(stock: Callable[..., Any], *positional: Any, **options: Any) -> Any:
            return Loader(choice).load(stock, *positional, **options)

        patches.load_checkpoint_with(load)
    patches.save_checkpoint_with(Saver(not args.no_checkpoint_hashes, _say_saved).save)


def _say_saved(folder: Path, size: int, seconds: float) -> None:
    say(f"{folder}: saved iteration {_iteration(folder)}, {size / 1e6:.1f} MB in {seconds:.1f} s")


@dataclass(frozen=True)
class Facts:
    """What has to be known of a checkpoint before it is loaded.

    Attributes:
        optimizer: the value of `--optimizer` that wrote it.
        record: of Dion, as it stands in the checkpoint; None if its optimizer is another.
        has_state: whether the optimizer's state was saved.
        sharding: how Megatron's optimizers keep their state in it.
        learning_rates: the highest and the lowest of the schedule; None if it was not saved.
        hashes: of its files, if they were saved.
    """

    optimizer: str
    record: Record | None
    has_state: bool
    sharding: str | None
    learning_rates: tuple[float, float] | None
    hashes: hashes.Hashes | None


def read_facts(folder: Path) -> Facts:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: it is damaged, or a newer version wrote it.
    """
    try:
        return _facts(folder)
    except CheckpointError as error:
        raise _refusal(folder, str(error)) from error


def _facts(folder: Path) -> Facts:
    contents = Contents(folder)
    damage = contents.damaged_files()
    if damage:
        raise CheckpointError("; ".join(damage[:5]))
    common = contents.common
    metadata = common.get("content_metadata") or {}
    scheduler = common.get("opt_param_scheduler")
    return Facts(
        optimizer=str(getattr(common.get("args"), "optimizer", "unknown")),
        record=Record.of_checkpoint(common),
        has_state="optimizer" in common,
        sharding=metadata.get("distrib_optim_sharding_type"),
        learning_rates=scheduler and (scheduler.get("max_lr"), scheduler.get("min_lr")),
        hashes=hashes.read_manifest(folder),
    )


def _refusal(folder: Path, reason: str) -> CheckpointError:
    """Says what is wrong with a checkpoint, and which one is older."""
    older = [n for n in folders.complete_iterations(folder.parent) if n < _iteration(folder)]
    advice = f"--ckpt-step {older[0]} takes an older one" if older else "there is no older one"
    return CheckpointError(f"{folder} cannot be used: {reason}: {advice}")


def _iteration(folder: Path) -> int:
    digits = folder.name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


def _is_of_old_format(folder: Path) -> bool:
    """Whether it is of Megatron's format `torch`, which it recognizes by itself."""
    return not (folder / folders.MARKER).exists()


class Loader:
    """Stands before Megatron's `load_checkpoint`: looks at the checkpoint, then lets it load.

    Args:
        choice: the checkpoint.
    """

    def __init__(self, choice: Choice) -> None:
        self._args = get_args()
        self._choice = choice

    def load(
        self, stock: Callable[..., Any], model: Any, optimizer: Any, *others: Any, **options: Any
    ) -> Any:
        """As `megatron.training.checkpointing.load_checkpoint`.

        Raises:
            CheckpointError: on all ranks, before anything has been loaded where it can be known.
        """
        folder = self._choice.folder
        if self._args.optimizer != "dion" and _is_of_old_format(folder):
            return stock(model, optimizer, *others, **options)
        facts = on_first_rank(lambda: read_facts(folder))
        self._verify(folder, facts)
        if optimizer is not None and self._takes_optimizer():
            optimizer = self._prepared(optimizer, folder, facts)
        with explained(folder):
            found = stock(model, optimizer, *others, **options)
        self._say(f"{folder}: loaded")
        return found

    def _verify(self, folder: Path, facts: Facts) -> None:
        """Compares the files with their hashes; each rank takes some."""
        if facts.hashes is None or self._args.no_checkpoint_hashes:
            why = "was saved without hashes" if facts.hashes is None else "--no-checkpoint-hashes"
            self._say(f"{folder}: {why}: only the sizes of its files were checked")
            return
        names = sorted(facts.hashes)[dist.get_rank() :: dist.get_world_size()]
        found = hashes.damage(folder, {name: facts.hashes[name] for name in names})
        damage = gathered(found)
        if damage:
            raise _refusal(folder, "; ".join(damage[:5]))

    def _takes_optimizer(self) -> bool:
        args = self._args
        if args.finetune or self._choice.iteration is None:
            return False
        if args.no_load_optim:
            self._say(f"{self._choice.folder}: --no-load-optim: all optimizer state begins anew")
        return not args.no_load_optim

    def _prepared(self, optimizer: Any, folder: Path, facts: Facts) -> Any:
        """The optimizer, told what the checkpoint has for it.

        Raises:
            CheckpointError: the checkpoint is of a run that cannot go on as this one.
        """
        if not facts.has_state:
            raise CheckpointError(
                f"{folder} was saved without optimizer state (--no-save-optim): {_MODEL_ONLY}"
            )
        self._check_learning_rates(folder, facts)
        if isinstance(optimizer, DionChainedOptimizer):
            if facts.record is None:
                kept = optimizer.record.scalar_optimizer == facts.optimizer
                source = self._switched(folder, facts, keeps_scalars=kept)
            else:
                source = self._same_optimizer(folder, optimizer.record, facts.record)
            optimizer.load_from(source)
            return optimizer
        if facts.record is None:
            return optimizer  # Megatron's own affair
        source = self._switched(folder, facts, keeps_scalars=False)
        try:
            return MastersOnly(optimizer, source)
        except ValueError as error:
            raise CheckpointError(f"--switch-optimizer: {error}") from error

    def _same_optimizer(self, folder: Path, here: Record, saved: Record) -> Source:
        found = saved.differences(here)
        if found.routes:
            raise CheckpointError(
                f"{folder}: {_listed(found.routes)}: with other routes the state has another owner;"
                " use the saved values"
            )
        if found.factors and not self._args.dion_reinit_factors:
            raise CheckpointError(
                f"{folder}: {_listed(found.factors)}: use the saved values, or"
                " --dion-reinit-factors to keep momenta and begin the right factors anew"
            )
        if found.scalars and not self._args.switch_optimizer:
            raise CheckpointError(
                f"{folder}: {_listed(found.scalars)}: use the saved one, or --switch-optimizer to"
                " begin the state of these parameters anew"
            )
        if self._args.dion_reinit_factors:
            cause = _listed(found.factors) or "same hyperparameters"
            self._say(f"{folder}: right factors begin anew, momenta are kept: {cause}")
        if found.scalars:
            self._say(f"{folder}: state of scalar parameters begins anew: {_listed(found.scalars)}")
        if found.free:
            self._say(f"{folder}: changed since it was saved: {_listed(found.free)}")
        return Source(
            saved.rules,
            momentum=True,
            right_factors=not self._args.dion_reinit_factors,
            scalars=not found.scalars,
        )

    def _switched(self, folder: Path, facts: Facts, keeps_scalars: bool) -> Source:
        here, saved = self._args.optimizer, "dion" if facts.record else facts.optimizer
        if not self._args.switch_optimizer:
            raise CheckpointError(
                f"{folder} was saved with --optimizer {saved}, and this run has --optimizer {here}:"
                " --switch-optimizer keeps its master weights and begins the optimizer's state"
                f" anew; {_MODEL_ONLY}"
            )
        if {here, saved} != {"adam", "dion"}:
            raise CheckpointError(
                f"--switch-optimizer goes between adam and dion, and {folder} was saved with"
                f" --optimizer {saved}: {_MODEL_ONLY}"
            )
        if facts.record is None and facts.sharding not in _RESHARDABLE:
            raise CheckpointError(
                f"{folder} keeps master weights in the layout of one run ({facts.sharding}): save"
                f" it again with --dist-ckpt-optim-fully-reshardable; {_MODEL_ONLY}"
            )
        scalars = ", and the state of scalar parameters," if keeps_scalars else ""
        self._say(
            f"{folder}: from --optimizer {saved} to --optimizer {here}: master weights{scalars} are"
            " kept, all other optimizer state begins anew"
        )
        rules = facts.record.rules if facts.record else None
        return Source(rules, momentum=False, right_factors=False, scalars=keeps_scalars)

    def _check_learning_rates(self, folder: Path, facts: Facts) -> None:
        """Megatron would take those of the command line in spite of the flag."""
        here = (self._args.lr, self._args.min_lr)
        saved = facts.learning_rates
        if self._args.use_checkpoint_opt_param_scheduler and saved and saved != here:
            raise CheckpointError(
                f"--use-checkpoint-opt-param-scheduler: {folder} has --lr {saved[0]} --min-lr"
                f" {saved[1]}, the command line {here[0]} and {here[1]}: use the saved values, or"
                " --override-opt-param-scheduler"
            )

    def _say(self, line: str) -> None:
        _say(self._args, line)


def _agree_on(choice: Choice | None) -> None:
    """Each rank has looked into the folder of all checkpoints on its own."""
    mine = "none" if choice is None else str(choice.folder)
    chosen = sorted(set(gathered([mine])))
    if len(chosen) > 1:
        raise CheckpointError(
            f"the ranks see other checkpoints ({', '.join(chosen)}): is the folder on a filesystem"
            " that all of them share, and is another run saving into it?"
        )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what goes wrong while Megatron loads into one line."""
    try:
        yield
    except (
        AssertionError,
        CheckpointException,
        CheckpointingException,
        KeyError,
        OSError,
        RuntimeError,
    ) as error:
        hint = (
            ": --override-opt-param-scheduler takes the command line's, "
            "--use-checkpoint-opt-param-scheduler the checkpoint's"
            if "OptimizerParamScheduler" in str(error)
            else ""
        )
        raise CheckpointError(
            f"{folder} cannot be loaded into this run: {told(error)}{hint}"
        ) from error


def _listed(differences: tuple[str, ...]) -> str:
    return "; ".join(differences)
