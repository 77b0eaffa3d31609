"""What the walks of docs/contributing.md write into files, done to a copy of the code."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from tests.distributed import test_models, test_topologies
from tests.documentation.pages import blocks_of

ORTHONORMALIZER, SPLIT, MODEL, TOPOLOGY = (
    block.code for block in blocks_of("docs/contributing.md") if block.language == "python"
)


def changed(name: str, place: str, code: str) -> ModuleType:
    """A module in which one statement is replaced by those of the walk."""
    text, count = re.subn(
        place,
        lambda _: "".join(f"    {line}\n" for line in code.splitlines()),
        Path(str(import_module(name).__file__)).read_text(),
        flags=re.M,
    )
    assert count == 1
    made = ModuleType(name)
    exec(compile(text, f"{name} of the walk", "exec"), made.__dict__)
    return made


def test_orthonormalizer() -> None:
    """A P of one part: its sums are what it yields."""
    branch = r'^    elif method == "cqr":\n(?:        .*\n)+'
    made = changed("megatron_dion.algorithm.orthonormalize", branch, ORTHONORMALIZER)
    p = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))
    for method, sums in (("cqr", 4), ("cqr3", 5)):
        part = made.orthonormalize_part(p, method, None, 1.25)
        total, count = next(part), 0
        while True:
            try:
                total, count = part.send(total), count + 1
            except StopIteration as end:
                q, has_broken_down = end.value
                break
        assert count + 1 == sums
        assert not has_broken_down.any()
        torch.testing.assert_close(q.mT @ q, torch.eye(6).expand(2, 6, 6))


def test_split() -> None:
    before = r"^(?=    if \"heads\" in split:)"
    made = changed("megatron_dion.optimizer.fused", before, SPLIT)
    weight = made.Weight("mlp.linear_fc2.weight", 8, 3)
    halves = made.split_weight(weight, None, frozenset({"halves"}))
    assert halves.parts == (made.Part("upper", 4), made.Part("lower", 4))
    assert made.split_weight(weight, None, frozenset()) == weight


def test_model() -> None:
    [(_, (flags, grid, matrices))] = eval(f"{{{MODEL}}}", vars(test_models)).items()
    assert flags.endswith("--dion-split qkv,gate,halves")
    assert grid in [grid for _, grid, _ in test_models.CASES.values()]
    assert matrices == {"mlp.linear_fc2.weight[upper]": "36x200"}


def test_topology() -> None:
    [case] = eval(f"{{{TOPOLOGY}}}", vars(test_topologies)).values()
    assert case.model in {known.model for known in test_topologies.CASES.values()}
    assert 12 % (case.ranks * case.micro) == 0
