"""Plan a run of a large model without starting it: memory, bytes, operations, and modelled times.

MODEL is a preset or a file of pretrain_gpt.py's flags. By default optimizers are compared at one
topology; with several --dp or --bucket-size, each of them is; --search looks for topologies.
"""

import argparse
import json
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_dion import DionConfig
from megatron_dion.algorithm import PRECISIONS
from megatron_dion.commands.errors import ToolError
from megatron_dion.local.flags import read_flags
from megatron_dion.planning import tables
from megatron_dion.planning.flags import shape_from_flags
from megatron_dion.planning.hardware import PRESETS as MACHINES
from megatron_dion.planning.hardware import Hardware, hardware
from megatron_dion.planning.models import PRESETS, GptShape
from megatron_dion.planning.prediction import Prediction, predict
from megatron_dion.planning.search import search
from megatron_dion.planning.stage import Optimizer, Run
from megatron_dion.planning.timing import assumptions
from megatron_dion.planning.topology import Batch, Topology

OPTIMIZERS = ("adamw", "muon", "muon-duplicated", "dion:1", "dion:1/4", "dion:1/16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, or a file of flags")
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    ranks.add_argument("--pp", type=int, default=1, help="pipeline stages")
    ranks.add_argument("--dp", type=int, nargs="+", default=[8], help="data-parallel sizes")
    ranks.add_argument("--cp", type=int, default=1, help="context-parallel size")
    ranks.add_argument("--ep", type=int, default=1, help="expert-parallel size")
    ranks.add_argument("--instances", type=int, default=1, help="distributed-optimizer instances")
    ranks.add_argument("--search", type=int, metavar="RANKS", help="look for the best topologies")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--optimizer",
        nargs="+",
        default=OPTIMIZERS,
        help="of adamw, muon, muon-duplicated, these with -unpadded, dion:FRACTION,"
        " dion-compressed:FRACTION",
    )
    run.add_argument(
        "--bucket-size",
        type=int,
        nargs="+",
        help="elements as --ddp-bucket-size; 0 for one bucket; Megatron's own by default",
    )
    run.add_argument("--micro-batch-size", type=int, default=1)
    run.add_argument("--global-batch-size", type=int, help="by default 8 micro batches, or 4 x PP")
    run.add_argument("--seq-length", type=int, help="by default the model's")
    run.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    run.add_argument("--fp32", action="store_true", help="weights in fp32 and not in bf16")
    run.add_argument("--dion-fp32-matmul-prec", choices=PRECISIONS, default="high")
    run.add_argument("--dion-comm-dtype", choices=("fp32", "bf16"), default="fp32")
    run.add_argument("--dion-momentum-dtype", choices=("fp32", "bf16"), default="fp32")
    run.add_argument("--dion-exchange-buffer-mib", type=float)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--hardware", default="h100", help=f"{', '.join(MACHINES)}, or a YAML file"
    )
    machine.add_argument(
        "--memory", type=float, metavar="GIB", help="limit, by default the device's"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true")
    output.add_argument("--plot", type=Path, metavar="FILE.png")


def run(args: argparse.Namespace) -> None:
    """Print tables of one kind."""
    try:
        _plan(args)
    except ValueError as error:
        raise ToolError(str(error)) from error


def _plan(args: argparse.Namespace) -> None:
    machine = hardware(args.hardware)
    limit = args.memory * 2**30 if args.memory else machine.memory
    shape = _shape(args)
    if args.search:
        _search(args, shape, machine, limit)
        return
    started = time.perf_counter()
    sizes = args.bucket_size or [None]
    found = {
        (dp, size): [_predict(args, shape, machine, dp, size, o) for o in _optimizers(args)]
        for dp in args.dp
        for size in sizes
    }
    seconds = time.perf_counter() - started
    if args.json:
        print(
            json.dumps([row for rows in found.values() for row in tables.as_json(rows)], indent=1)
        )
    elif len(found) == 1:
        [((dp, _), rows)] = found.items()
        print(f"{_headline(args, shape, dp)}\n\n{tables.describe(rows, limit)}")
    else:
        print(f"{_headline(args, shape, *args.dp)}\n\n{tables.compare(found, limit)}")
    if not args.json:
        print(f"\n{assumptions(machine)}\nPlanned in {seconds:.1f} s.")
    if args.plot:
        from megatron_dion.planning.pictures import plot

        one_size = {dp: rows for (dp, size), rows in found.items() if size == sizes[0]}
        plot(one_size, args.plot, _headline(args, shape, *args.dp))


def _shape(args: argparse.Namespace) -> GptShape:
    if args.model in PRESETS:
        shape = PRESETS[args.model]
    elif Path(args.model).is_file():
        shape = shape_from_flags(read_flags(Path(args.model)))
    else:
        raise ToolError(f"MODEL {args.model}: no file, and none of {', '.join(PRESETS)}")
    return replace(shape, sequence=args.seq_length) if args.seq_length else shape


def _optimizers(args: argparse.Namespace) -> list[Optimizer]:
    return [_optimizer(text, args) for text in args.optimizer]


def _optimizer(text: str, args: argparse.Namespace) -> Optimizer:
    name, _, fraction = text.partition(":")
    kind, *options = name.split("-")
    if kind == "dion" and set(options) <= {"compressed"}:
        try:
            rank_fraction = float(Fraction(fraction or "1/4"))
        except ValueError:
            raise ToolError(f"--optimizer {text}: write a fraction such as dion:1/4") from None
        config = DionConfig(
            rank_fraction=rank_fraction,
            fp32_matmul_prec=args.dion_fp32_matmul_prec,
            comm_dtype=args.dion_comm_dtype,
            momentum_dtype=args.dion_momentum_dtype,
            exchange_buffer_mib=args.dion_exchange_buffer_mib,
        )
        return Optimizer("dion", config, compressed_sync="compressed" in options)
    if kind == "muon" and not fraction and set(options) <= {"duplicated", "unpadded"}:
        mode = "duplicated" if "duplicated" in options else "blockwise"
        return Optimizer("muon", muon_tp_mode=mode, layer_wise_layout="unpadded" not in options)
    if text == "adamw":
        return Optimizer("adamw")
    raise ToolError(f"--optimizer {text}: write one of {', '.join(OPTIMIZERS)}")


def _batch(args: argparse.Namespace, dp: int, pp: int) -> Batch:
    share = args.micro_batch_size * dp
    return Batch(
        args.micro_batch_size, args.global_batch_size or share * max(8, 4 * pp), args.recompute
    )


def _predict(
    args: argparse.Namespace,
    shape: GptShape,
    machine: Hardware,
    dp: int,
    bucket_size: int | None,
    optimizer: Optimizer,
) -> Prediction:
    topology = Topology(
        args.tp,
        args.pp,
        dp,
        args.cp,
        args.ep,
        args.instances,
        shape.needs_ends(args.pp),
        machine.ranks_per_node,
    )
    run = Run(shape, topology, optimizer, bucket_size, 4 if args.fp32 else 2)
    return predict(run, _batch(args, dp, args.pp), machine)


def _headline(args: argparse.Namespace, shape: GptShape, *dps: int) -> str:
    sizes = {"TP": args.tp, "PP": args.pp, "CP": args.cp, "EP": args.ep}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    words.append("DP" + "/".join(map(str, dps)))
    batch = _batch(args, dps[0], args.pp)
    return (
        f"{args.model} ({shape.parameters / 1e9:.2f} B parameters), {' x '.join(words)},"
        f" {batch.global_ // (batch.micro * dps[0])} micro batches of {batch.micro} x"
        f" {shape.sequence} tokens, {args.hardware}"
    )


def _search(args: argparse.Namespace, shape: GptShape, machine: Hardware, limit: float) -> None:
    batch = Batch(args.micro_batch_size, args.global_batch_size or args.search, args.recompute)
    for optimizer in _optimizers(args):
        found = search(
            shape, args.search, batch, optimizer, machine, limit, weight_bytes=4 if args.fp32 else 2
        )
        print(
            f"{args.model} with {optimizer.label} on {args.search} ranks, batches of"
            f" {batch.global_} sequences, at most {limit / 2**30:.0f} GiB\n"
        )
        print(tables.describe_search(found))
        print()
    print(assumptions(machine))
