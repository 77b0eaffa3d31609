"""Plan a run of a large model without starting it: memory, bytes, operations, and modelled times.

MODEL is a preset or a file of pretrain_gpt.py's flags: of these the shape of the model, batch sizes
and the type of the weights are taken, unless options say otherwise. Optimizers are compared at one
topology; with several --dp or --bucket-size, at each of them; --search looks for topologies.
Defaults are in brackets.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_dion import DionConfig
from megatron_dion.algorithm import PRECISIONS
from megatron_dion.algorithm.config import DTYPES
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import read_flags
from megatron_dion_tools.plan import tables
from megatron_dion_tools.plan.flags import positive, run_from_flags, shape_from_flags
from megatron_dion_tools.plan.hardware import PRESETS as MACHINES
from megatron_dion_tools.plan.hardware import Hardware, hardware
from megatron_dion_tools.plan.models import PRESETS, GptShape
from megatron_dion_tools.plan.prediction import Prediction, predict
from megatron_dion_tools.plan.search import search
from megatron_dion_tools.plan.stage import Optimizer, Run
from megatron_dion_tools.plan.timing import assumptions
from megatron_dion_tools.plan.topology import Batch, Topology

OPTIMIZERS = ("adamw", "muon", "muon-duplicated", "dion:1", "dion:1/4", "dion:1/16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(PRESETS)}, or a file of flags such as examples/quick_start.args",
    )
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--tp", type=positive, default=1, help="tensor-parallel size (1)")
    ranks.add_argument("--pp", type=positive, default=1, help="pipeline stages (1)")
    ranks.add_argument(
        "--dp",
        type=positive,
        nargs="+",
        help="data-parallel sizes (8, or the most below that divide a global batch that is given)",
    )
    ranks.add_argument("--cp", type=positive, default=1, help="context-parallel size (1)")
    ranks.add_argument("--ep", type=positive, default=1, help="expert-parallel size (1)")
    ranks.add_argument(
        "--instances", type=positive, default=1, help="distributed-optimizer instances (1)"
    )
    ranks.add_argument(
        "--search",
        type=positive,
        metavar="RANKS",
        help="look for the fastest topologies of so many ranks that fit (off)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--optimizer",
        nargs="+",
        default=OPTIMIZERS,
        help="any of adam or adamw, muon, muon-duplicated, these two with -unpadded, dion:FRACTION,"
        f" dion-compressed:FRACTION; the rank fraction is in (0, 1] ({' '.join(OPTIMIZERS)})",
    )
    run.add_argument(
        "--bucket-size",
        type=_bucket_size,
        nargs="+",
        help="elements of a gradient bucket, as --ddp-bucket-size; 0 for one bucket (Megatron's:"
        " 40 million, or a million for each data-parallel rank if that is more)",
    )
    run.add_argument(
        "--micro-batch-size", type=positive, help="sequences of a micro batch (the file's, or 1)"
    )
    run.add_argument(
        "--global-batch-size",
        type=positive,
        help="sequences of a step (the file's, or on each data-parallel rank 8 micro batches, or"
        " 4 x --pp; with --search one for each rank)",
    )
    run.add_argument("--seq-length", type=positive, help="tokens of a sequence (the model's)")
    run.add_argument(
        "--recompute",
        choices=("none", "selective", "full"),
        default="selective",
        help="activations that are computed again; `selective` is attention (selective)",
    )
    run.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="type of the weights (the file's, which is fp32 without --bf16 and --fp16; a preset's"
        " is bf16)",
    )
    run.add_argument(
        "--dion-fp32-matmul-prec",
        choices=PRECISIONS,
        default="high",
        help="precision of Dion's products: float32, TF32 or bf16 (high)",
    )
    run.add_argument(
        "--dion-comm-dtype",
        choices=DTYPES,
        default="fp32",
        help="type in which Dion's factors travel (fp32)",
    )
    run.add_argument(
        "--dion-momentum-dtype",
        choices=DTYPES,
        default="fp32",
        help="type in which Dion keeps momenta (fp32)",
    )
    run.add_argument(
        "--dion-exchange-buffer-mib",
        type=_positive_number,
        metavar="MIB",
        help="limit of Dion's exchange buffers on a rank (none)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--hardware",
        default="h100",
        help=f"{', '.join(MACHINES)}, or a YAML file of rates (h100)",
    )
    machine.add_argument(
        "--memory",
        type=_positive_number,
        metavar="GIB",
        help="limit of a rank's memory (the machine's)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print all figures as JSON (off)")
    output.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw a picture too; needs matplotlib (off)"
    )


def _bucket_size(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


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
    of_file = _take_from_file(args, shape)
    if args.search:
        print(of_file, end="")
        _search(args, shape, machine, limit)
        return
    started = time.perf_counter()
    sizes = args.bucket_size or [None]
    dps = _data_parallel_sizes(args)
    headline = f"{_headline(args, shape, *dps)}\n{of_file}"
    found = {
        (dp, size): [_predict(args, shape, machine, dp, size, o) for o in _optimizers(args)]
        for dp in dps
        for size in sizes
    }
    seconds = time.perf_counter() - started
    if args.json:
        print(
            json.dumps([row for rows in found.values() for row in tables.as_json(rows)], indent=1)
        )
    elif len(found) == 1:
        [rows] = found.values()
        print(f"{headline}\n{tables.describe(rows, limit)}")
    else:
        print(f"{headline}\n{tables.compare(found, limit)}")
    if not args.json:
        print(f"\n{assumptions(machine)}\nPlanned in {seconds:.1f} s.")
    if args.plot:
        from megatron_dion_tools.plan.pictures import plot

        one_size = {dp: rows for (dp, size), rows in found.items() if size == sizes[0]}
        try:
            plot(one_size, args.plot, _headline(args, shape, *dps))
        except ValueError as error:
            raise ToolError(f"--plot {args.plot}: {error}: take another name") from error


def _shape(args: argparse.Namespace) -> GptShape:
    if args.model in PRESETS:
        shape = PRESETS[args.model]
    elif Path(args.model).is_file():
        shape = _of_file(args.model, shape_from_flags)
    else:
        raise ToolError(
            f"MODEL {args.model}: no file of flags, and no preset ({', '.join(PRESETS)})"
        )
    return replace(shape, sequence=args.seq_length) if args.seq_length else shape


def _of_file[Found](name: str, read: Callable[[Sequence[str]], Found]) -> Found:
    """What the flags of a file say; mistakes in it name it."""
    try:
        return read(read_flags(Path(name)))
    except ValueError as error:
        raise ToolError(f"MODEL {name}: {error}") from error


def _take_from_file(args: argparse.Namespace, shape: GptShape) -> str:
    """Completes options by what the file of flags says, and else by defaults; says the former."""
    defaults = {"micro_batch_size": 1, "global_batch_size": None, "dtype": "bf16"}
    found = {} if args.model in PRESETS else _of_file(args.model, run_from_flags)
    taken = {name: value for name, value in found.items() if getattr(args, name) is None}
    for name, value in {**defaults, **taken}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in taken.items()]
    said = f"From {args.model}: {', '.join(words)}.\n" if words else ""
    if shape.vocab is None:
        said += "It has no --vocab-size: the embedding and the output layer are left out; add it to"
        said += " the file to count them.\n"
    return said


def _data_parallel_sizes(args: argparse.Namespace) -> list[int]:
    if args.dp:
        return list(args.dp)
    batch, micro = args.global_batch_size, args.micro_batch_size
    fitting = [
        dp
        for dp in range(1, 9)
        if (batch is None or batch % (micro * dp) == 0)
        and dp % args.instances == 0
        and dp * args.cp % (args.ep * args.instances) == 0
    ]
    return fitting[-1:] or [8]


def _optimizers(args: argparse.Namespace) -> list[Optimizer]:
    return [_optimizer(text, args) for text in args.optimizer]


def _optimizer(text: str, args: argparse.Namespace) -> Optimizer:
    name, _, fraction = text.partition(":")
    kind, *options = name.split("-")
    if kind == "dion" and set(options) <= {"compressed"}:
        config = DionConfig(
            rank_fraction=_rank_fraction(text, fraction or "1/4"),
            fp32_matmul_prec=args.dion_fp32_matmul_prec,
            comm_dtype=args.dion_comm_dtype,
            momentum_dtype=args.dion_momentum_dtype,
            exchange_buffer_mib=args.dion_exchange_buffer_mib,
        )
        return Optimizer("dion", config, compressed_sync="compressed" in options)
    if kind == "muon" and not fraction and set(options) <= {"duplicated", "unpadded"}:
        mode = "duplicated" if "duplicated" in options else "blockwise"
        return Optimizer("muon", muon_tp_mode=mode, layer_wise_layout="unpadded" not in options)
    if text in ("adam", "adamw"):
        return Optimizer("adamw")
    raise ToolError(
        f"--optimizer {text}: write adam, muon, muon-duplicated, muon-unpadded,"
        " muon-duplicated-unpadded, dion:FRACTION or dion-compressed:FRACTION"
    )


def _rank_fraction(text: str, written: str) -> float:
    try:
        found = float(Fraction(written))
    except (ValueError, ZeroDivisionError):
        found = 0
    if not 0 < found <= 1:
        raise ToolError(
            f"--optimizer {text}: a rank fraction is in (0, 1], and written dion:FRACTION,"
            " such as dion:1/4"
        )
    return found


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
    run = Run(shape, topology, optimizer, bucket_size, _weight_bytes(args))
    return predict(run, _batch(args, dp, args.pp), machine)


def _weight_bytes(args: argparse.Namespace) -> int:
    return 4 if args.dtype == "fp32" else 2


def _headline(args: argparse.Namespace, shape: GptShape, *dps: int) -> str:
    sizes = {"TP": args.tp, "PP": args.pp, "CP": args.cp, "EP": args.ep}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    words.append("DP" + "/".join(map(str, dps)))
    batch = _batch(args, dps[0], args.pp)
    count = batch.global_ // (batch.micro * dps[0])
    return (
        f"{args.model} ({tables.parameters(shape.parameters)}), {' x '.join(words)},"
        f" {count} micro batch{'es' * (count != 1)} of {batch.micro} x"
        f" {shape.sequence} tokens, {args.hardware}"
    )


def _search(args: argparse.Namespace, shape: GptShape, machine: Hardware, limit: float) -> None:
    ignored = [name for name in ("tp", "pp", "cp", "ep", "instances") if getattr(args, name) > 1]
    ignored += [name for name in ("dp", "bucket_size", "json", "plot") if getattr(args, name)]
    if ignored:
        raise ToolError(
            f"--{ignored[0].replace('_', '-')}: --search has no use for it: leave it out"
        )
    batch = Batch(args.micro_batch_size, args.global_batch_size or args.search, args.recompute)
    for optimizer in _optimizers(args):
        found = search(
            *(shape, args.search, batch, optimizer, machine, limit),
            weight_bytes=_weight_bytes(args),
        )
        print(
            f"{args.model} with {optimizer.label} on {args.search} ranks, batches of"
            f" {batch.global_} sequences, at most {limit / 2**30:.0f} GiB\n"
        )
        print(tables.describe_search(found))
        print()
    print(assumptions(machine))
