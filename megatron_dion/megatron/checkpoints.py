"""What Megatron's loading and saving of checkpoints is replaced by or gets in addition."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dion.checkpointing import errors, folders, hashes
from megatron_dion.checkpointing.agreement import gather, on_first_rank
from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad
from megatron_dion.checkpointing.folders import Choice
from megatron_dion.checkpointing.saving import Saver
from megatron_dion.megatron import patches
from megatron_dion.megatron.errors import in_one_line, say
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.checkpoint import Loading, Source
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.record import Record

_RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
_MODEL_ONLY = "--no-load-optim or --finetune takes the model's weights only"
_REINIT = "--dion-reinit-factors to keep momenta and begin the right factors anew"
_SWITCH = "--switch-optimizer to keep master weights and begin the state anew"
_ERRORS_OF_LOADING = (
    *(AssertionError, KeyError, OSError, RuntimeError),
    *(CheckpointException, CheckpointingException),
)


def choose(args: argparse.Namespace) -> Choice | None:
    """Chooses the checkpoint to load: the newest complete one, or that of `--ckpt-step`.

    The folder may hold none only if `--load` is `--save`. The choice is put into the arguments and
    in place of what Megatron reads from the tracker; without one Megatron trains random weights.
    """
    if _saves_into(args, args.load):
        folders.settle(Path(args.load))
    choice = _look_for(args, "--load", args.load)
    if choice is None:
        args.load = args.pretrained_checkpoint
        choice = _look_for(args, "--pretrained-checkpoint", args.load)
        args.finetune = args.finetune or choice is not None
    args.pretrained_checkpoint = None
    if choice is not None:
        args.ckpt_step = choice.iteration
        patches.wrap(
            "read_metadata", lambda stock, tracker: choice.read_tracker(tracker) or stock(tracker)
        )
    return choice


def _look_for(args: argparse.Namespace, flag: str, root: str | None) -> Choice | None:
    if root is None:
        return None
    try:
        choice = folders.choose(Path(root), args.ckpt_step)
    except NothingToLoad as error:
        if args.exit_on_missing_checkpoint or not _saves_into(args, root):
            raise CheckpointError(
                f"{flag} {error}: correct the path, or leave {flag} out to start from random"
                " weights"
            ) from error
        say(f"{flag} {error}: starting from iteration 0")
        return None
    for remark in choice.remarks:
        say(f"{flag}: {remark}")
    return choice


def _saves_into(args: argparse.Namespace, root: str | None) -> bool:
    return bool(args.save and root) and Path(args.save).resolve() == Path(root or "").resolve()


def check_that_ranks_agree(choice: Choice | None) -> None:
    """Refuses a choice that is not that of all ranks, each of which has looked for itself."""
    choices = set(gather(["none" if choice is None else str(choice.folder)]))
    if len(choices) > 1:
        raise CheckpointError(
            f"the ranks see other checkpoints ({', '.join(sorted(choices))}): is the folder on"
            " a filesystem that all of them share, and is another run saving into it?"
        )


def use(choice: Choice | None, args: argparse.Namespace, options: DionOptions) -> None:
    """Lets Megatron load the chosen checkpoint, and save new ones beside the old."""

    def report(folder: Path, size: int, seconds: float) -> None:
        iteration = folders.iteration_of(folder)
        say(f"{folder}: saved iteration {iteration}, {size / 1e6:.1f} MB in {seconds:.1f} s")

    if choice is not None:
        patches.wrap("load_checkpoint", Loader(choice, args, options.reinit_factors).load)
    patches.wrap("save", Saver(not args.no_checkpoint_hashes, report).save)


class Facts(NamedTuple):
    """What a checkpoint says of itself before it is loaded; None where it does not say."""

    optimizer: str  # the value of --optimizer
    record: Record | None  # of Dion
    has_state: bool  # whether the optimizer's state was saved
    sharding: str | None  # how Megatron's optimizers keep their state in it
    learning_rates: tuple[float, float] | None  # highest and lowest of the schedule
    hashes: hashes.Hashes | None  # of its files


class Loader:
    """Stands before Megatron's `load_checkpoint`: looks at the checkpoint, then lets it load."""

    def __init__(self, choice: Choice, args: argparse.Namespace, reinit_factors: bool) -> None:
        self._args = args
        self._reinit_factors = reinit_factors
        self._choice = choice
        self._folder = choice.folder

    def load(
        self, stock: Callable[..., Any], model: Any, optimizer: Any, *others: Any, **options: Any
    ) -> Any:
        """As Megatron's, after checks whose errors are raised on all ranks."""
        facts = on_first_rank(self._read_facts)
        self._verify(facts)
        args = self._args
        if optimizer is not None and not args.finetune and self._choice.iteration is not None:
            if args.no_load_optim:
                self._say("--no-load-optim: all optimizer state begins anew")
            else:
                optimizer = self._prepare(optimizer, facts)
        with explained(self._folder):
            result = stock(model, optimizer, *others, **options)
        self._say("loaded")
        return result

    def _say(self, line: str) -> None:
        say(f"{self._folder}: {line}")

    def _read_facts(self) -> Facts:
        try:
            common = Contents(self._folder).common
            scheduler = common.get("opt_param_scheduler")
            return Facts(
                optimizer=str(getattr(common.get("args"), "optimizer", "unknown")),
                record=Record.of_state(common.get("optimizer", {})),
                has_state="optimizer" in common,
                sharding=(common.get("content_metadata") or {}).get("distrib_optim_sharding_type"),
                learning_rates=scheduler and (scheduler.get("max_lr"), scheduler.get("min_lr")),
                hashes=hashes.read_manifest(self._folder),
            )
        except CheckpointError as error:
            raise self._unusable(str(error)) from error

    def _unusable(self, reason: str) -> CheckpointError:
        """Says what is wrong with the checkpoint, and which one is older."""
        complete = folders.complete_iterations(self._choice.root)
        older = [number for number in complete if number < (self._choice.iteration or 0)]
        advice = f"--ckpt-step {older[0]} takes an older one" if older else "there is no older one"
        return CheckpointError(f"{self._folder} cannot be used: {reason}: {advice}")

    def _verify(self, facts: Facts) -> None:
        """Compares the files with their hashes; each rank takes some."""
        if facts.hashes is None or self._args.no_checkpoint_hashes:
            why = "was saved without hashes" if facts.hashes is None else "--no-checkpoint-hashes"
            self._say(f"{why}: its files were not checked")
            return
        names = sorted(facts.hashes)[dist.get_rank() :: dist.get_world_size()]
        mine = list(hashes.damage(self._folder, {name: facts.hashes[name] for name in names}))
        if damage := gather(mine):
            raise self._unusable("; ".join(damage[:5]))

    def _prepare(self, optimizer: Any, facts: Facts) -> Any:
        """Returns what stands in for the optimizer while it loads what the checkpoint has for it.

        Raises:
            CheckpointError: the checkpoint is of a run that cannot go on as this one.
        """
        if not facts.has_state:
            raise CheckpointError(
                f"{self._folder} was saved without optimizer state (--no-save-optim): {_MODEL_ONLY}"
            )
        self._check_learning_rates(facts)
        here = optimizer.record if isinstance(optimizer, DionChainedOptimizer) else None
        if here is None and facts.record is None:
            return optimizer  # Megatron's own affair
        if here is not None and facts.record is not None:
            return Loading(optimizer, self._go_on(here, facts.record))
        keeps_scalars = here is not None and here.scalar_optimizer == facts.optimizer
        with in_one_line("--switch-optimizer"):
            return Loading(optimizer, self._switch(facts, keeps_scalars))

    def _check_learning_rates(self, facts: Facts) -> None:
        """Megatron would take those of the command line in spite of the flag."""
        here, saved = (self._args.lr, self._args.min_lr), facts.learning_rates
        if self._args.use_checkpoint_opt_param_scheduler and saved and saved != here:
            raise CheckpointError(
                f"--use-checkpoint-opt-param-scheduler: {self._folder} has --lr {saved[0]} --min-lr"
                f" {saved[1]}, the command line {here[0]} and {here[1]}: use the saved values, or"
                " --override-opt-param-scheduler"
            )

    def _go_on(self, here: Record, saved: Record) -> Source:
        """What a run of Dion takes from a checkpoint of Dion's."""
        reinit, switch = self._reinit_factors, self._args.switch_optimizer
        factors, routes, scalars, free = saved.differences(here).values()
        for text, is_allowed, advice in (
            (routes, False, "with other routes the state has another owner; use the saved values"),
            (factors, reinit, f"use the saved values, or {_REINIT}"),
            (scalars, switch, f"use the saved one, or {_SWITCH}"),
        ):
            if text and not is_allowed:
                raise CheckpointError(f"{self._folder}: {text}: {advice}")
        if reinit:
            cause = factors or "same hyperparameters"
            self._say(f"right factors begin anew, momenta are kept: {cause}")
        if scalars:
            self._say(f"state of scalar parameters begins anew: {scalars}")
        if free:
            self._say(f"changed since it was saved: {free}")
        return Source(saved.rules, right_factors=not reinit, scalars=not scalars)

    def _switch(self, facts: Facts, keeps_scalars: bool) -> Source:
        """What a run takes from a checkpoint of the other optimizer."""
        here, saved = self._args.optimizer, "dion" if facts.record else facts.optimizer
        if not self._args.switch_optimizer:
            raise CheckpointError(
                f"{self._folder} was saved with --optimizer {saved}, and this run has --optimizer"
                f" {here}: {_SWITCH}; {_MODEL_ONLY}"
            )
        is_other = {here, saved} != {"adam", "dion"}
        if is_other or (facts.record is None and facts.sharding not in _RESHARDABLE):
            raise CheckpointError(
                f"--switch-optimizer takes reshardable state of adam, and that of {self._folder} is"
                f" {saved}'s ({facts.sharding}): save it again with"
                f" --dist-ckpt-optim-fully-reshardable; {_MODEL_ONLY}"
            )
        scalars = ", and the state of scalar parameters," if keeps_scalars else ""
        self._say(
            f"from --optimizer {saved} to --optimizer {here}: master weights{scalars} are kept, all"
            " other optimizer state begins anew"
        )
        rules = facts.record.rules if facts.record else None
        return Source(rules, momentum=False, right_factors=False, scalars=keeps_scalars)


def explained(folder: Path | None) -> AbstractContextManager[None]:
    """Turns what goes wrong while Megatron loads into one line."""
    context = f"{folder} cannot be loaded into this run"
    return errors.in_one_line(CheckpointError, context, *_ERRORS_OF_LOADING)
