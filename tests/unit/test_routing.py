"""Names and matrices of parameters that no CPU model has, made by stand-ins for its modules."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.worlds import in_host

EXPERTS = 4
HIDDEN, FFN = 6, 10
CONFIG = SimpleNamespace(
    num_moe_experts=EXPERTS,
    gated_linear_unit=True,
    moe_mlp_glu_interleave_size=None,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=3,
    attention_output_gate=False,
)
Sizes = tuple[int, int]  # expert-parallel and tensor-parallel ranks


def linear(names: dict[str, tuple[int, ...]], config: Any = CONFIG) -> torch.nn.Module:
    made = torch.nn.Module()
    made.config = config
    for name, shape in names.items():
        made.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    return made


def tree(**modules: torch.nn.Module) -> torch.nn.Module:
    made = torch.nn.Module()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def expert_linears(suffixes: list[str], tensor: int, use_expert_groups: bool) -> Any:
    """`linear_fc1` and `linear_fc2` with weights and biases, as Transformer Engine's are marked."""
    from megatron.core.extensions.transformer_engine import _set_expert_parameter_attributes

    rows, columns = 2 * FFN // tensor, FFN // tensor
    fc1 = linear({f"weight{s}": (rows, HIDDEN) for s in suffixes})
    fc2 = linear({f"weight{s}": (HIDDEN, columns) for s in suffixes})
    for suffix in suffixes:
        fc1.register_parameter(f"bias{suffix}", torch.nn.Parameter(torch.zeros(rows)))
    _set_expert_parameter_attributes(fc1, "column", use_expert_groups)
    _set_expert_parameter_attributes(fc2, "row", use_expert_groups)
    return tree(linear_fc1=fc1, linear_fc2=fc2)


def chunk_of(*mlps: torch.nn.Module) -> Any:
    """A model chunk with some layers."""
    layers = torch.nn.ModuleList([tree(mlp=mlp) for mlp in mlps])
    chunk: Any = tree(decoder=tree(layers=layers))
    chunk.config = CONFIG
    return chunk


def routes_of(chunk: Any, rank: int, sizes: Sizes) -> dict[str, Any]:
    """In a process that has imported Megatron: shape, reason and matrices of all parameters."""
    from megatron.core import parallel_state

    from megatron_dion.algorithm.config import DionConfig
    from megatron_dion.optimizer.routing import ROUTE_TAG, tag_matrices

    experts, tensor = sizes
    group = SimpleNamespace(size=lambda: tensor)
    with mock.patch.multiple(
        parallel_state,
        get_expert_model_parallel_world_size=lambda: experts,
        get_expert_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_group=lambda: group,
        get_expert_tensor_parallel_group=lambda: group,
    ):
        tag_matrices([chunk])
    routes = [getattr(parameter, ROUTE_TAG) for parameter in chunk.parameters()]
    return {
        r.parameter: (r.shape, r.reason, r.weight.matrices(DionConfig()) if r.weight else [])
        for r in routes
    }


def routes_of_experts(grouped: bool, sizes: Sizes) -> dict[str, Any]:
    """The routes of all expert-parallel ranks."""
    ranks, tensor = sizes
    found: dict[str, Any] = {}
    for rank in range(ranks):
        local = [str(number) for number in range(EXPERTS // ranks)]
        if grouped:
            experts = expert_linears(local, tensor, use_expert_groups=ranks > 1)
        else:
            each = [expert_linears([""], tensor, use_expert_groups=ranks > 1) for _ in local]
            experts = tree(local_experts=torch.nn.ModuleList(each))
        routes = routes_of(chunk_of(tree(experts=experts)), rank, sizes)
        assert not found.keys() & routes.keys()
        found |= routes
    return found


ONE = (1, 1)


@pytest.mark.parametrize("sizes", [ONE, (2, 1), (4, 2), (1, 2)])
def test_experts_are_routed_alike_however_they_are_multiplied(sizes: Sizes) -> None:
    expected = in_host(routes_of_experts, False, ONE)
    found = in_host(routes_of_experts, True, sizes)
    assert found == expected
    assert len(found) == 3 * EXPERTS
    name = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"
    *_, matrices = found[name]
    assert [(m.name, m.rows, m.columns) for m in matrices] == [
        (f"{name}[gate]", FFN, HIDDEN),
        (f"{name}[up]", FFN, HIDDEN),
    ]
    assert found[name.replace("weight", "bias")][1] == "1-D"


def matrices_of_unlike_layers() -> list[str]:
    with_gate = SimpleNamespace(**vars(CONFIG) | {"attention_output_gate": True})
    plain = tree(linear_qkv=linear({"weight": (4 * 3 * 3, 6)}))
    gated = tree(linear_qkv=linear({"weight": (4 * 4 * 3, 6)}, with_gate))
    routes = routes_of(chunk_of(plain, gated), 0, ONE)
    return [m.name.split("weight")[1] for *_, matrices in routes.values() for m in matrices]


def test_a_layer_is_split_by_its_own_config() -> None:
    found = in_host(matrices_of_unlike_layers)
    assert found == ["[query]", "[key]", "[value]", "[query]", "[gate]", "[key]", "[value]"]
