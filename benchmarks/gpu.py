"""Is the step right on a GPU, does the host wait, and what takes how long?

One run on one GPU, of at most ten minutes, with torch alone. Each table is printed, and written to
`--output`, as soon as it is measured. A part that raises leaves a table with its error, the others
go on, and the exit status is 1; so it is where a row says `right: False`. Nothing new is measured
after nine minutes. `--tiny --device cpu` leaves out what only CUDA can tell.
"""

import argparse
import gc
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._common import Row, interleaved, make_parser, parse, report, summary
from benchmarks._models import LR, WEIGHT_DECAY, Topology, dion_on_pieces, gpt, with_gradient
from benchmarks.step import Alike, floor_rows
from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm import counter_random
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.products import matmul_precision
from megatron_dion.sharding.collectives import Groups
from tests.unit.dion_cases import OF_TF32, TOLERANCES, Comparison

Tables = Iterator[tuple[str, list[Row]]]
NEEDS_CUDA: list[Row] = [{"not measured": "needs CUDA"}]
COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
SENT_AS = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """What is measured; `--tiny` makes it small."""

    shapes: Sequence[tuple[int, int]] = ((1024, 256), (256, 1024), (512, 512))  # of part 1
    rows: int = 4096  # n of P (n, r), and of the square B, of single operations
    ranks: Sequence[int] = (256, 1024)  # r
    batches: Sequence[int] = (1, 4, 16, 64)  # numbers of P
    calls: int = 8  # of an operation in a row, so that the host's part of each does not show
    alike: Alike = Alike(32, 4096)  # noqa: RUF009  (frozen)
    hidden: int = 1024  # width of the GPT in Megatron's layout


TINY = Sizes(((24, 16), (16, 24)), 96, (80,), (1, 2), 1, Alike(2, 32), 64)
FRACTIONS = (Fraction(1, 4), Fraction(1, 16))
RESIDUALS = ("none", "rows")
SECONDS = 540
"""After these no table is begun."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of all parts; returns 1 if a part raised or found something wrong."""
    start = time.monotonic()
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program")
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 8), help="or all")
    args = parse(parser, argv)
    if not (torch.cuda.is_available() if args.device == "cuda" else args.tiny):
        parser.error(f"--device {args.device}: torch sees no GPU; a CPU takes --device cpu --tiny")
    if args.output is None and not args.tiny:
        args.output = Path(__file__).parent / "results" / "gpu.json"
    torch.manual_seed(0)
    wrong: list[str] = []
    report(args, _tables(args, wrong, start))
    print(f"\nwrong: {'; '.join(wrong) or 'nothing'}", flush=True)
    return int(bool(wrong))


def _tables(args: argparse.Namespace, wrong: list[str], start: float) -> Tables:
    sizes = TINY if args.tiny else Sizes()
    for number, part in enumerate(PARTS, 1):
        if args.parts and number not in args.parts:
            continue
        begin = time.monotonic()
        try:
            tables = part(sizes, args.repeats, args.device)
            while time.monotonic() - start < SECONDS:
                if (table := next(tables, None)) is None:
                    break
                name, rows = f"{number} {table[0]}", table[1]
                yield name, rows
                wrong += [name] if any(row.get("right") == "False" for row in rows) else []
            else:
                yield f"{number} skipped", [{"not measured": f"{SECONDS} s are over"}]
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{number} failed")
            error_line = f"{type(error).__name__}: {error}".splitlines()[0]
            yield f"{number} failed", [{"error": error_line}]
        print(f"part {number}: {time.monotonic() - begin:.0f} s", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def numbers(sizes: Sizes, _: int, device: str) -> Tables:
    """Part 1: the algorithm beside float64 references, and the bits of random numbers."""
    rows: list[Row] = []
    for rank, condition in product(sizes.ranks, (30.0, 1e4)):
        case: dict[str, Any] = {"rows": sizes.rows, "rank": rank, "condition": condition}
        errors = orthonormalize_errors(2, **case, device=device)
        is_right = max(errors.values()) < (2e-5 if condition < 100 else 2e-3)
        rows.append({**case, **errors, "right": str(is_right)})
    yield "orthonormalize", rows
    rows = []
    for residual, precision in product(RESIDUALS, ("highest", "high", "medium")):
        options: Row = {"residual": residual, "fp32_matmul_prec": precision}
        comparison = Comparison([(sizes.shapes, {})], device, weight_decay=0.1, **options)
        for steps_between in (range(1), range(1, 10)):
            comparison.run(steps_between)
            found = list(comparison.errors().values())
            largest = {what: max(e[what] for e in found) for what in found[0]}
            tolerances = TOLERANCES if precision == "highest" else OF_TF32
            is_right = all(largest[what] < tolerances[what] for what in largest)
            row = {**options, "steps": steps_between.stop, **largest}
            rows.append({**row, "right": str(is_right)})
    yield "errors of steps", rows
    rows = [
        {"numbers": kind, "right": str(same_bits(kind, device))} for kind in ("normal", "signs")
    ]
    yield "random numbers: bits of the CPU", rows


def orthonormalize_errors(
    batch: int, rows: int, rank: int, condition: float, device: str
) -> dict[str, float]:
    """The largest errors of Q, beside Householder's QR in float64, and of Q^T Q."""
    left, right = (torch.linalg.qr(torch.randn(batch, n, rank)).Q for n in (rows, rank))
    p = left * torch.logspace(0, -math.log10(condition), rank) @ right
    q, u = torch.linalg.qr(p.double())
    q *= u.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    p = p.to(device)
    with matmul_precision("highest"):
        orthonormalize([p], lambda tensor, operation: None)
    found = p.cpu().double()
    errors = {"of_Q": found - q, "of_QTQ": found.mT @ found - torch.eye(rank)}
    return {name: float(error.abs().max()) for name, error in errors.items()}


def same_bits(name: str, device: str) -> bool:
    """Whether random numbers, `normal` or `signs`, are those that the CPU draws."""
    rows = torch.tensor([0, 7, 2**33, *range(100, 1000)])
    generate = getattr(counter_random, name)
    here = generate(1234, "layer.weight", rows.to(device), 200).cpu()
    return torch.equal(here, generate(1234, "layer.weight", rows, 200))


def waits(sizes: Sizes, _: int, device: str) -> Tables:
    """Part 2: where the host waits for the GPU in a step."""
    if device == "cpu":
        yield "host waits", NEEDS_CUDA
        return
    for residual in RESIDUALS:
        whole = _dion(_weights(sizes.alike, device), FRACTIONS[0], residual)
        pieces = _on_pieces(sizes.hidden, residual, device)
        for name, dion, most in (("whole matrices", whole, 1), ("Megatron's layout", pieces, 0)):
            dion.step()  # allocates the state and makes the views of a step
            places = host_waits(dion.step)
            is_right = str(len(places) <= most)
            rows: list[Row] = [{"waits at": at, "right": is_right} for at in places or ["nowhere"]]
            yield f"host waits: {name}, residual {residual}", rows
        with sync_debug_mode("error"):
            pieces.step()


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """As `torch.cuda.set_sync_debug_mode`: what makes the host wait is a warning, or an error."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_waits(run: Callable[[], object]) -> list[str]:
    """The lines at which the host waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        run()
    caught = [one for one in caught if "called a synchronizing" in str(one.message)]
    return [f"{one.filename}:{one.lineno}" for one in caught]


def operations(sizes: Sizes, repeats: int, device: str) -> Tables:
    """Part 3: what an orthonormalization is made of, and the products of a step, by themselves."""
    rows: list[Row] = []
    for rank, batch in product(sizes.ranks, sizes.batches):
        runs = _operations(batch, sizes.rows, rank, device)
        cases = {name: partial(_repeat, *run, sizes.calls) for name, run in runs.items()}
        times = interleaved(cases, repeats, device)
        ms = {f"{name}_ms": summary(t).median / sizes.calls for name, t in times.items()}
        rows.append({"rank": rank, "batch": batch, **ms})
    yield f"operations, P of {sizes.rows} rows, B square", rows


def _operations(
    batch: int, size: int, rank: int, device: str
) -> dict[str, tuple[str, Callable[[], object]]]:
    """By name their precision, and what to run."""
    p = torch.randn(batch, size, rank, device=device) / size**0.5
    total = torch.randn(batch, size, size, device=device)
    identity = torch.eye(rank, device=device)
    gram = p.mT @ p + identity
    upper = torch.linalg.cholesky_ex(gram, upper=True).L
    return {
        "cholesky": ("highest", lambda: torch.linalg.cholesky_ex(gram, upper=True)),
        "solve": ("highest", lambda: torch.linalg.solve_triangular(upper, identity, upper=True)),
        "halves": ("highest", lambda: _inverse_by_halves(upper)),
        "gram_fp32": ("highest", lambda: p.mT @ p),
        "gram_tf32": ("high", lambda: p.mT @ p),
        "apply_fp32": ("highest", lambda: p @ gram),
        "apply_tf32": ("high", lambda: p @ gram),
        "BP_fp32": ("highest", lambda: total @ p),
        "BP_tf32": ("high", lambda: total @ p),
        "BtQ_tf32": ("high", lambda: total.mT @ p),
        "orthonormalize": ("highest", lambda: orthonormalize([p.clone()], lambda *_: None)),
    }


def _repeat(precision: str, run: Callable[[], object], calls: int) -> None:
    with matmul_precision(precision):
        for _ in range(calls):
            run()


def _inverse_by_halves(upper: Tensor) -> Tensor:
    """The inverse of (batch, r, r): of the halves of its diagonal, and products."""
    size = upper.shape[1]
    if size <= 64:
        identity = torch.eye(size, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half, inverse = size // 2, torch.zeros_like(upper)
    first = inverse[:, :half, :half] = _inverse_by_halves(upper[:, :half, :half])
    last = inverse[:, half:, half:] = _inverse_by_halves(upper[:, half:, half:])
    inverse[:, :half, half:] = -first @ upper[:, :half, half:] @ last
    return inverse


def steps(sizes: Sizes, repeats: int, device: str) -> Tables:
    """Part 4: the step beside its floor, its memory, and its kernels."""
    for precision, fraction in product(("high", "highest"), FRACTIONS):  # each takes gigabytes
        rows = floor_rows(sizes.alike, [fraction], precision, repeats, device)
        yield f"step, {precision}, {fraction}", rows
    if device == "cpu":
        yield "memory and kernels", NEEDS_CUDA
        return
    for fraction, residual in product(FRACTIONS, RESIDUALS):
        dion = _dion(_weights(sizes.alike, device), fraction, residual)
        dion.step()
        used = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dion.step()
        more = torch.cuda.max_memory_allocated() - used
        gigabytes: Row = {"allocated_GB": used / 1e9, "more_in_a_step_GB": more / 1e9}
        yield f"memory, {fraction}, residual {residual}", [gigabytes]
        yield f"kernels, {fraction}, residual {residual}", _kernels(dion.step)


def _kernels(run: Callable[[], object]) -> list[Row]:
    """What a run starts on the GPU: all, and those that take longest together."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:15]
    if not times:
        return [{"not measured": "the profiler saw no kernel"}]
    longest.insert(0, ("all", [t for each in times.values() for t in each]))
    return [{"kernel": name[:80], "launches": len(t), "ms": sum(t)} for name, t in longest]


def first_steps(sizes: Sizes, _: int, device: str) -> Tables:
    """Part 5: the first steps of a run, whose P are worse conditioned than later."""
    rows: list[Row] = []
    dion = _dion(_weights(sizes.alike, device), FRACTIONS[0], "none")
    for number in range(1, 6):
        start = time.perf_counter()
        dion.step()
        started = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter() - start
        rows.append({"step": number, "host_ms": 1e3 * started, "step_ms": 1e3 * done})
    yield "first steps", rows


def other_optimizers(sizes: Sizes, repeats: int, device: str) -> Tables:
    """Part 6: steps of all optimizers on the same matrices."""
    weights = _weights(sizes.alike, device)
    options: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    cases = {"AdamW, fused": torch.optim.AdamW(weights, fused=True, **options).step}
    if hasattr(torch.optim, "Muon"):
        cases["Muon, bf16"] = torch.optim.Muon(weights, **options).step
    else:
        yield "Muon", [{"not measured": "needs torch 2.9"}]
    for fraction, residual in product(FRACTIONS, RESIDUALS):
        cases[f"Dion {fraction}, residual {residual}"] = _dion(weights, fraction, residual).step
    times = interleaved(cases, repeats, device)
    rows: list[Row] = [{"optimizer": k, "step_ms": summary(t).median} for k, t in times.items()]
    yield f"optimizers, {sizes.alike.count} x {sizes.alike.size}", rows


def sharded(sizes: Sizes, repeats: int, device: str) -> Tables:
    """Part 7: the step in Megatron's layout in a world of one, and what its exchange calls."""
    with world_of_one(device) as group:
        both = Groups(group, group)
        alone, grouped = (_on_pieces(sizes.hidden, "none", device, g) for g in (None, both))
        times = interleaved({"alone": alone.step, "group": grouped.step}, repeats, device)
        pieces = zip(*(o.param_groups[0]["params"] for o in (alone, grouped)), strict=True)
        equal = all(torch.equal(one, other) for one, other in pieces)
        ms = {f"{name}_ms": summary(t).median for name, t in times.items()}
        yield (
            "step, without a group and in a group of one: equal weights",
            [{**ms, "right": str(equal)}],
        )
        calls = [_collective(*case, repeats, device) for case in product(COLLECTIVES, SENT_AS)]
        yield "collectives of the exchange, in a group of one", calls


@contextmanager
def world_of_one(device: str) -> Iterator[Any]:
    """The process group of this process alone, of NCCL on a GPU and of gloo on a CPU."""
    backend, gpu = ("nccl", torch.device("cuda:0")) if device == "cuda" else ("gloo", None)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=gpu)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _collective(name: str, dtype: torch.dtype, repeats: int, device: str) -> Row:
    sent = torch.arange(1 << 10, device=device).to(dtype)
    received = torch.zeros_like(sent)
    sizes = ([len(sent)], [len(sent)]) if name == "all_to_all_single" else ()

    def call() -> None:
        given = (received.copy_(sent),) if name == "all_reduce" else (received, sent, *sizes)
        getattr(dist, name)(*given, async_op=True).wait()

    [times] = interleaved({name: call}, repeats, device).values()
    equal = torch.equal(received, sent)
    return {"call": name, "dtype": str(dtype), "right": str(equal), "ms": summary(times).median}


def _weights(alike: Alike, device: str) -> list[Tensor]:
    shape = (alike.size, alike.size)
    return [with_gradient(0.02 * torch.randn(shape, device=device)) for _ in range(alike.count)]


def _dion(weights: Sequence[Tensor], fraction: Fraction, residual: Any) -> Dion:
    config = DionConfig(rank_fraction=float(fraction), residual=residual)
    return Dion(weights, lr=LR, weight_decay=WEIGHT_DECAY, config=config)


def _on_pieces(hidden: int, residual: Any, device: str, groups: Groups | None = None) -> Dion:
    """Dion on a GPT of two layers as Megatron lays it out, the same at each call."""
    torch.manual_seed(0)
    config = DionConfig(residual=residual)
    return dion_on_pieces(gpt(hidden, 2), Topology(), config, groups, device)


PARTS = (numbers, waits, operations, steps, first_steps, other_optimizers, sharded)
if __name__ == "__main__":
    sys.exit(main())
