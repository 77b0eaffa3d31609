"""What the walks of docs/contributing.md write into files, done to a copy of the code."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tests.distributed import test_topologies
from tests.documentation.pages import blocks_of

SPLIT, OPTION, TOPOLOGY = (
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


def test_split() -> None:
    before = r"^(?=    if \"heads\" in split:)"
    made = changed("megatron_dion.optimizer.fused", before, SPLIT)
    weight = made.Weight("mlp.linear_fc2.weight", 8, 3)
    halves = made.split_weight(weight, None, frozenset({"halves"}))
    assert halves.parts == (made.Part("upper", 4), made.Part("lower", 4))
    assert made.split_weight(weight, None, frozenset()) == weight


def test_cases() -> None:
    """They are complete, and their samples divide by the ranks that share them."""
    names = dict(vars(test_topologies))
    for table in ("OPTIONS", "CASES", "SIZES"):
        names[table] = dict(names[table])
    exec(f"{OPTION}\n{TOPOLOGY}", names)
    assert names["OPTIONS"].keys() - test_topologies.OPTIONS.keys() == {"halves"}
    assert names["SIZES"].keys() - test_topologies.SIZES.keys() == {"dense halves"}
    new = names["CASES"].keys() - test_topologies.CASES.keys()
    assert new == {"halves-tp2-pp2", "dp6"}
    for case in (names["CASES"][name] for name in new):
        assert case.model in test_topologies.MODELS
        assert case.option in names["OPTIONS"]
    assert test_topologies.SAMPLES % (6 * names["CASES"]["dp6"].micro) == 0
