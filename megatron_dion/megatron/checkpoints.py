"""What Megatron's loading and saving of checkpoints is replaced by or gets in addition."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
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
from megatron_dion.optimizer.checkpoint import MODEL_ONLY, Loading, Source, megatron_keys
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.record import Record, changes

# What decides a group's learning rate or weight decay: in a checkpoint's schedule, and beside it.
_SCHEDULE = (
    *("lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "train_iters", "train_samples"),
)
_OF_GROUPS = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
_RATES = (
    *(*_OF_GROUPS, "dion_scalar_lr_mult", "lr_warmup_init", "weight_decay"),
    # Of these the first step takes the command line's (optimizer_param_scheduler.py:390).
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("apply_wd_to_qk_layernorm", "use_mup", "mup_base_hidden_size", "mup_base_head_dim"),
)
# What else makes a model what it is, beside the fields of Megatron's configuration of one.
_MODEL = (
    *("vocab_size", "untie_embeddings_and_output_weights", "position_embedding_type"),
    *("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling"),
    *("rope_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_correction_range_round_to_int", "relative_attention_num_buckets"),
    *("relative_attention_max_distance", "swiglu", "squared_relu", "openai_gelu", "quick_geglu"),
)
_MUON = ("muon", "adaptive_muon")
_REINIT = "--dion-reinit-factors to keep momenta and begin the right factors anew"
_SWITCH = "--switch-optimizer to keep master weights and begin the state anew"
_OVERRIDE = "use the saved values, or --override-opt-param-scheduler"
_INSTEAD = " in place of --use-checkpoint-opt-param-scheduler"
_ERRORS_OF_LOADING = (
    *(AssertionError, KeyError, OSError, RuntimeError, ValueError),
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
    args: argparse.Namespace  # of the run that saved it
    keys: dict[str, str]  # of the state of Megatron's optimizers
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
        self._check_vocabulary(facts.args)
        if changed := _changes(facts.args, self._args, _names_of_model()):
            self._say(f"the configuration of the model has changed since it was saved: {changed}")
        if _changes(facts.args, self._args, ["tokenizer_sha256"]):
            self._say("it was trained with another tokenizer: tokens mean other words here")
        args = self._args
        if optimizer is not None and not args.finetune and self._choice.iteration is not None:
            if args.no_load_optim:
                self._say("--no-load-optim: all optimizer state and the schedule begin anew")
            else:
                optimizer = self._prepare(optimizer, facts)
        # distrib_optimizer.py:2092 copies into fp32 weights, which are the model's parameters.
        with explained(self._folder), torch.no_grad():
            result = stock(model, optimizer, *others, **options)
        if isinstance(optimizer, Loading) and optimizer.lacks_scalars:
            self._say("state of scalar parameters begins anew: some of it was another optimizer's")
        self._say("loaded")
        return result

    def _say(self, line: str) -> None:
        say(f"{self._folder}: {line}")

    def _read_facts(self) -> Facts:
        try:
            contents = Contents(self._folder)
            common = contents.common
            args = common.get("args") or argparse.Namespace()
            record = Record.of_state(common.get("optimizer", {}))
            takes_state = self._args.switch_optimizer and record is None
            tensors = contents.tensors if takes_state else {}
            return Facts(
                optimizer=str(getattr(args, "optimizer", "unknown")),
                record=record,
                has_state="optimizer" in common,
                args=args,
                keys=megatron_keys({key: one.properties.dtype for key, one in tensors.items()}),
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
                f"{self._folder} was saved without optimizer state (--no-save-optim): {MODEL_ONLY}"
            )
        here = optimizer.record if isinstance(optimizer, DionChainedOptimizer) else None
        is_stock = here is None and facts.record is None
        self._check_rates(facts.args, is_stock)
        if is_stock:
            return optimizer  # Megatron's own affair
        if here is not None and facts.record is not None:
            return Loading(optimizer, self._go_on(here, facts.record))
        with in_one_line("--switch-optimizer"):
            return Loading(optimizer, self._switch(facts, here))

    def _check_rates(self, saved: argparse.Namespace, is_stock: bool) -> None:
        """Groups have the rates of the command line, whatever the scheduler takes."""
        here = self._args
        if is_stock and (flags := _differences(saved, here, _OF_GROUPS)):
            advice = f"Megatron finds groups by these: use the saved values; {MODEL_ONLY}"
            raise CheckpointError(f"{self._folder}: {flags}: {advice}")
        takes_saved = here.use_checkpoint_opt_param_scheduler
        flags = _differences(saved, here, _RATES if takes_saved else (*_RATES, *_SCHEDULE))
        if flags and not here.override_opt_param_scheduler:
            advice = f"{_OVERRIDE}{_INSTEAD if takes_saved else ''}"
            raise CheckpointError(f"{self._folder}: {flags}: {advice}")
        if flags:
            self._say(f"changed since it was saved: {flags}")

    def _check_vocabulary(self, saved: argparse.Namespace) -> None:
        """Megatron pads it to a multiple of the tensor-parallel size, and loads what fits."""
        line = _differences(saved, self._args, ["padded_vocab_size"])
        if line and not self._args.padded_vocab_size_is_given:
            raise CheckpointError(
                f"{self._folder}: {line}: add --padded-vocab-size with the saved number, or with"
                " the other, where rows may be lost or begin untrained"
            )
        if line:
            self._say(f"{line}: the rows that only one of them has are lost, or begin untrained")

    def _go_on(self, here: Record, saved: Record) -> Source:
        """What a run of Dion takes from a checkpoint of Dion's."""
        reinit, switch = self._reinit_factors, self._args.switch_optimizer
        factors, routes, scalars, rates, free = saved.differences(here).values()
        for text, is_allowed, advice in (
            (routes, False, "with other routes the state has another owner; use the saved values"),
            (factors, reinit, f"use the saved values, or {_REINIT}"),
            (scalars, switch, f"use the saved one, or {_SWITCH}"),
            (rates, self._args.override_opt_param_scheduler, _OVERRIDE),
        ):
            if text and not is_allowed:
                raise CheckpointError(f"{self._folder}: {text}: {advice}")
        if reinit:
            cause = factors or "same hyperparameters"
            self._say(f"right factors begin anew, momenta are kept: {cause}")
        if scalars:
            self._say(f"state of scalar parameters begins anew: {scalars}")
        if changed := "; ".join(filter(None, (rates, free))):
            self._say(f"changed since it was saved: {changed}")
        return Source(saved.rules, right_factors=not reinit, scalars=not scalars)

    def _switch(self, facts: Facts, dion: Record | None) -> Source:
        """What a run takes from a checkpoint of the other optimizer."""
        here, saved = self._args.optimizer, "dion" if facts.record else facts.optimizer
        if not self._args.switch_optimizer:
            raise CheckpointError(
                f"{self._folder} was saved with --optimizer {saved}, and this run has --optimizer"
                f" {here}: {_SWITCH}; {MODEL_ONLY}"
            )
        if here != "adam" if dion is None else saved not in ("adam", *_MUON):
            raise CheckpointError(
                "--switch-optimizer goes from adam or muon to dion, and from dion to adam, not from"
                f" {saved} to {here}: {MODEL_ONLY}"
            )
        momentum = 0.0
        if dion is not None and saved in _MUON:
            # Muon's momentum is a mean of gradients, Dion's a sum that has decayed once more.
            momentum = dion.config.momentum / (1 - facts.args.muon_momentum)
            saved = getattr(facts.args, "muon_scalar_optimizer", "adam")
        keeps_scalars = dion is not None and dion.scalar_optimizer == saved
        momenta = ", momenta" if momentum else ""
        scalars = ", and the state of scalar parameters," if keeps_scalars else ""
        self._say(
            f"from --optimizer {facts.optimizer} to --optimizer {here}: master weights{momenta}"
            f"{scalars} are kept, all other optimizer state begins anew"
        )
        rules = facts.record.rules if facts.record else None
        if dion is None:
            return Source(rules, momentum, False, keeps_scalars)
        has_scales = any(vars(facts.args).get(f"fp{bits}_param_gather") for bits in (4, 8))
        dtype = None if has_scales else facts.args.params_dtype
        return Source(rules, momentum, False, keeps_scalars, facts.keys, dtype)


def _changes(saved: argparse.Namespace, here: argparse.Namespace, names: Sequence[str]) -> str:
    """A line of `changes`, of the arguments that both runs have."""
    runs = vars(saved), vars(here)
    return changes(*({name: run[name] for name in names if name in run} for run in runs))


def _differences(saved: argparse.Namespace, here: argparse.Namespace, names: Sequence[str]) -> str:
    """As `_changes`, by flags.

    Megatron's scheduler counts samples: with another batch size, so does the line.
    """
    batches = [vars(args).get("global_batch_size") for args in (saved, here)]
    is_by_samples = None not in batches and batches[0] != batches[1]
    return changes(*(_flags(args, names, is_by_samples) for args in (saved, here)))


def _flags(
    args: argparse.Namespace, names: Sequence[str], is_by_samples: bool
) -> dict[str, object]:
    """Values of the arguments that there are, by flag; of iterations perhaps in samples."""
    flags = {f"--{n.replace('_', '-')}": vars(args)[n] for n in names if n in vars(args)}
    if vars(args).get("train_samples"):
        flags.pop("--train-iters", None)  # which follow from them
    for flag in [flag for flag in flags if is_by_samples and flag.endswith("-iters")]:
        iterations = flags.pop(flag)
        flags[f"{flag} x --global-batch-size"] = iterations and iterations * args.global_batch_size
    return flags


def _names_of_model() -> list[str]:
    """Arguments that make a model what it is, on every topology."""
    of_model, of_topology = fields(MLATransformerConfig), fields(ModelParallelConfig)
    names = {one.name for one in of_model} - {one.name for one in of_topology}
    names.discard("num_query_groups")  # which training.py:554 changes during a run
    return [*_MODEL, *sorted(name for name in names if "pipeline" not in name)]


def explained(folder: Path | None) -> AbstractContextManager[None]:
    """Turns what goes wrong while Megatron loads into one line."""
    context = f"{folder} cannot be loaded into this run"
    return errors.in_one_line(CheckpointError, context, *_ERRORS_OF_LOADING)
