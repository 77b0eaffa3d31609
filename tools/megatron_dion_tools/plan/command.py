"""Plan a run of a large model without starting it: memory, bytes, operations, and modelled times.

MODEL is a preset or a file of pretrain_gpt.py's flags: of these the shape of the model, batch sizes
and the type of the weights are taken, unless options say otherwise. Optimizers are compared at one
topology; with several --dp or --bucket-size, at each of them; --search looks for topologies.
Defaults are in brackets.
"""

import argparse
import json
from dataclasses import asdict, fields, replace
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin

from megatron_dion import DionConfig
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.plan.flags import PRESETS, read_model
from megatron_dion_tools.plan.hardware import MACHINES, hardware
from megatron_dion_tools.plan.prediction import ASSUMPTIONS, predict, search
from megatron_dion_tools.plan.stage import Optimizer, Run
from megatron_dion_tools.plan.tables import details, overview, quantity
from megatron_dion_tools.plan.topology import Topology

OPTIMIZERS = ("adamw", "muon", "muon-duplicated", "dion:1", "dion:1/4", "dion:1/16")
_DION = (
    *("residual", "fp32_matmul_prec", "comm_dtype", "momentum_dtype", "factor_dtype"),
    "exchange_sets",
)
SIZES = {
    "tp": "tensor-parallel size",
    "pp": "pipeline stages",
    "cp": "context-parallel size",
    "instances": "distributed-optimizer instances",
}
_BEST = 10
"""Topologies that `--search` shows for each optimizer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    files = "or a file of flags such as examples/quick_start.args"
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, {files}")
    add = parser.add_argument_group("ranks").add_argument
    for name, what in SIZES.items():
        add(f"--{name}", type=positive, default=1, help=f"{what} (1)")
    add("--dp", type=positive, nargs="+", default=[8], help="data-parallel sizes (8)")
    what = "look for the fastest topologies of so many ranks that fit (off)"
    add("--search", type=positive, metavar="RANKS", help=what)
    add = parser.add_argument_group("run").add_argument
    what = "adamw, muon, muon-duplicated, dion:FRACTION, dion-compressed:FRACTION, where FRACTION"
    what += f" is --dion-rank-fraction of training ({' '.join(OPTIMIZERS)})"
    default: list[Any] = list(map(optimizer, OPTIMIZERS))
    add("--optimizer", nargs="+", type=optimizer, default=default, help=what)
    what = "elements of a gradient bucket, as --ddp-bucket-size; 0 for one bucket (Megatron's: 40"
    what += " million, or a million for each data-parallel rank if that is more; Dion's matrices:"
    what += " an eighth of a rank's if that is more still)"
    add("--bucket-size", type=positive_or_0, nargs="+", default=[None], help=what)
    add("--micro-batch-size", type=positive, help="sequences of a micro batch (the file's, or 1)")
    what = "sequences of a step (the file's, or on each data-parallel rank 8 micro batches, or 4 x"
    add("--global-batch-size", type=positive, help=f"{what} --pp; with --search one for each rank)")
    add("--seq-length", type=positive, help="tokens of a sequence (the model's)")
    what = "activations that are computed again; `selective` is attention (selective)"
    add("--recompute", choices=("none", "selective", "full"), default="selective", help=what)
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights (the file's)")
    for each in (each for each in fields(DionConfig) if each.name in _DION):
        choices = get_args(each.type) if get_origin(each.type) is Literal else None
        name, what = each.name.replace("_", "-"), f"as in training ({each.default or 'off'})"
        kind = str if choices else positive
        add(f"--dion-{name}", type=kind, choices=choices, default=each.default, help=what)
    add = parser.add_argument_group("machine").add_argument
    add("--hardware", default="h100", help=f"{', '.join(MACHINES)}, or a TOML file (h100)")
    add("--memory", type=positive, metavar="GIB", help="limit of a rank's memory (the machine's)")
    add("--json", action="store_true", help="print all figures as JSON (off)")


def positive(text: str) -> int:
    """A size on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def positive_or_0(text: str) -> int:
    """A size, or 0."""
    return 0 if text == "0" else positive(text)


def optimizer(text: str) -> Optimizer:
    """An optimizer on the command line."""
    name, _, fraction = text.partition(":")
    if name in ("dion", "dion-compressed"):
        try:
            rank_fraction = float(Fraction(fraction or "1/4"))
            return Optimizer("dion", DionConfig(rank_fraction=rank_fraction), name != "dion")
        except (ValueError, ZeroDivisionError) as error:
            fault = f"{text}: {error}: write dion:FRACTION, such as dion:1/4"
            raise argparse.ArgumentTypeError(fault) from error
    known = {
        "adam": Optimizer("adamw"),
        "adamw": Optimizer("adamw"),
        "muon": Optimizer("muon"),
        "muon-duplicated": Optimizer("muon", muon_tp_mode="duplicated"),
    }
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text}: write {', '.join(known)} or dion:FRACTION")
    return known[text]


def run(args: argparse.Namespace) -> None:
    """Print tables, or JSON."""
    try:
        _plan(args)
    except ValueError as error:
        raise ToolError(str(error)) from error


def _plan(args: argparse.Namespace) -> None:
    if args.search and (given := [name for name in SIZES if getattr(args, name) > 1]):
        raise ValueError(f"--{given[0]}: --search tries all sizes: leave it out")
    machine = hardware(args.hardware)
    limit = args.memory * 2**30 if args.memory else machine.memory
    shape, settings = read_model(args.model)
    if args.seq_length:
        shape = replace(shape, sequence=args.seq_length)
    micro = args.micro_batch_size or settings["micro-batch-size"] or 1
    global_ = args.global_batch_size or settings["global-batch-size"]
    weight_bytes = {"fp32": 4, None: settings["weight-bytes"]}.get(args.dtype, 2)
    dion = {name: getattr(args, f"dion_{name}") for name in _DION}
    optimizers = [replace(one, dion=replace(one.dion, **dion)) for one in args.optimizer]
    title = f"{args.model}, {quantity(shape.parameters, 'parameters')},"
    title += f" micro batches of {micro} x {shape.sequence} tokens, {args.hardware}"
    common: dict[str, Any] = {"weight_bytes": weight_bytes, "micro_batch": micro}
    common["recompute"] = args.recompute
    predictions = []
    if args.search:
        for one in optimizers:
            batch = global_ or args.search * micro
            run = Run(shape, Topology(), one, global_batch=batch, **common)
            predictions += search(run, args.search, machine, limit)[:_BEST]
    for dp in [] if args.search else args.dp:
        own = {name: getattr(args, name) for name in SIZES}
        topology = Topology(dp=dp, ranks_per_node=machine.ranks_per_node, **own)
        batch = global_ or micro * dp * max(8, 4 * args.pp)
        for size in args.bucket_size:
            for one in optimizers:
                run = Run(shape, topology, one, size, global_batch=batch, **common)
                predictions.append(predict(run, machine))
    if args.json:
        print(json.dumps([asdict(prediction) for prediction in predictions], indent=1))
        return
    print(f"{title}\n")
    if shape.vocab is None:
        print("Without --vocab-size in the file the embedding and output layer are left out.\n")
    if len(predictions) == len(optimizers) and not args.search:
        print(f"{details(predictions)}\n")
    print(f"{overview(predictions, limit)}\n\n{ASSUMPTIONS.format(**vars(machine))}")
