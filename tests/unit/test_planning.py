"""Shapes and flags; tests/distributed has the comparison with Megatron."""

from pathlib import Path

import pytest

from megatron_dion import DionConfig
from megatron_dion_tools.plan import PRESETS, GptShape
from megatron_dion_tools.plan.flags import read_model, shape_from_flags
from megatron_dion_tools.plan.topology import Group, Topology

TINY = GptShape(layers=6, hidden=24, ffn=40, heads=8, query_groups=4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_logical_matrices_do_not_depend_on_tensor_parallelism(size: int) -> None:
    config = DionConfig(rank_fraction=0.5)
    alone, shared = TINY.weights(range(6)), TINY.weights(range(6), size)
    for whole, sharded in zip(alone, shared, strict=True):
        assert sharded.matrices(config) == whole.matrices(config)
        assert sharded.rows * sharded.columns * size == whole.rows * whole.columns


def test_matrices_of_a_layer() -> None:
    found = [m for weight in TINY.weights([3]) for m in weight.matrices(DionConfig())]
    layer = "decoder.layers.3"
    assert [(matrix.name, matrix.rows, matrix.columns) for matrix in found] == [
        (f"{layer}.self_attention.linear_proj.weight", 24, 24),
        (f"{layer}.self_attention.linear_qkv.weight[query]", 24, 24),
        (f"{layer}.self_attention.linear_qkv.weight[key]", 12, 24),
        (f"{layer}.self_attention.linear_qkv.weight[value]", 12, 24),
        (f"{layer}.mlp.linear_fc1.weight[gate]", 40, 24),
        (f"{layer}.mlp.linear_fc1.weight[up]", 40, 24),
        (f"{layer}.mlp.linear_fc2.weight", 24, 40),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_stages_share_the_layers(size: int) -> None:
    """At 4 and 8 the embedding and the loss count as layers."""
    stages = [TINY.stage_layers(size, stage) for stage in range(size)]
    assert [layer for stage in stages for layer in stage] == list(range(6))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    assert PRESETS[name].parameters == parameters


def test_shapes_of_flags() -> None:
    flags = (
        "--num-layers 28 --hidden-size 2048 --num-attention-heads 16 --max-position-embeddings 99"
    )
    shape = shape_from_flags([*flags.split(), "--unknown", "3", "4"])
    assert (shape.ffn, shape.gated, shape.tied, shape.vocab) == (8192, False, True, None)
    assert (shape.query_groups, shape.sequence) == (16, 99)
    gated = shape_from_flags(
        [*"--num-layers=2 --hidden-size=768 --num-attention-heads=8".split(), "--swiglu"]
    )
    assert gated.ffn == 2048


def test_settings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.args"
    flags = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 # --bf16"
    file.write_text(flags)
    sizes = {"micro-batch-size": 0, "global-batch-size": 0}
    assert read_model(str(file))[1] == {**sizes, "weight-bytes": 4}
    file.write_text(f"--fp16 --global-batch-size 12 {flags}")
    settings = {"micro-batch-size": 0, "global-batch-size": 12, "weight-bytes": 2}
    assert read_model(str(file))[1] == settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers two", "--num-layers two is no whole number"),
        ("--num-layers", "--num-layers  is no whole number"),
        ("--hidden-size 8", "need --num-layers, --num-attention-heads"),
        ("--num-layers 'two", "quotation"),
        ("--multi-latent-attention", "--multi-latent-attention is not planned"),
        ("--num-experts 2", "--num-experts is not planned: leave it out"),
        (
            "--num-layers 2 --hidden-size 10 --num-attention-heads 4",
            "--num-attention-heads 4 does not divide --hidden-size 10: take 2 or 5",
        ),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, flags: str, words: str) -> None:
    file = tmp_path / "model.args"
    file.write_text(flags)
    with pytest.raises(ValueError, match=f"MODEL {file}: .*{words}"):
        read_model(str(file))


def test_links_leave_nodes() -> None:
    """A ring over nodes leaves each of them once; of what goes to all others, most leaves."""
    topology = Topology(tp=4, pp=2, dp=16, ranks_per_node=8)
    assert topology.group("tensor") == Group("tensor", 4, 4)
    assert topology.group("tensor").leaving(to_peers=False) == 0
    assert topology.group("data") == Group("data", 16, 2)
    assert topology.group("data").leaving(to_peers=False) == 1 / 2
    assert topology.group("data").leaving(to_peers=True) == 14 / 15
    assert topology.group("pipeline").leaving(to_peers=True) == 1
