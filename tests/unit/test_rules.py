from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron_dion.optimizer.rules import RoutingRules

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def parameter(*shape: int, **tags: Any) -> Parameter:
    made = Parameter(torch.zeros(shape))
    for name, value in tags.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("name", "made", "reason"),
    [
        (FC1, parameter(4, 2), None),
        ("decoder.final_layernorm.weight", parameter(4), "1-D"),
        ("conv.weight", parameter(4, 2, 3), "3-D"),
        (
            "output_layer.weight",
            parameter(4, 2, is_embedding_or_output_parameter=True),
            "embedding or output layer",
        ),
        ("embedding.position_embeddings.weight", parameter(4, 2), "embedding"),
        ("decoder.layers.1.mlp.router.weight", parameter(4, 2), "router of experts"),
        ("a.mlp.shared_experts.gate_weight", parameter(1, 2), "gate of shared experts"),
        ("a.mlp.shared_experts.linear_fc1.weight", parameter(4, 2), None),
    ],
)
def test_linear_layers_go_to_dion(name: str, made: Parameter, reason: str | None) -> None:
    assert RoutingRules().decide(name, made) == (reason is None, reason or "linear layer")


def test_patterns_overrule_the_default() -> None:
    rules = RoutingRules(include=("embedding.*",), exclude=("*.layers.0.*",))
    assert rules.decide(EMBEDDING, parameter(4, 2)) == (True, "included by embedding.*")
    other = "decoder.layers.1.mlp.linear_fc1.weight"
    assert rules.decide(other, parameter(4, 2)) == (True, "linear layer")
    assert rules.decide(FC1, parameter(4, 2)) == (False, "excluded by *.layers.0.*")


def test_a_vector_cannot_be_included() -> None:
    rules = RoutingRules(include=("*",))
    assert rules.decide("decoder.final_layernorm.weight", parameter(4)) == (False, "1-D")


def test_an_embedding_on_two_stages_cannot_be_included() -> None:
    rules = RoutingRules(include=("embedding.*",))
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight is included by"):
        rules.decide(EMBEDDING, parameter(4, 2, shared_embedding=True))


def test_a_pattern_without_a_match_is_refused() -> None:
    RoutingRules(include=("embed*",), exclude=("*fc1*",)).check_patterns([FC1, EMBEDDING])
    with pytest.raises(ValueError, match=r"no parameter's name matches '\*fc3\*'; they"):
        RoutingRules(exclude=("*fc3*",)).check_patterns([FC1, EMBEDDING])


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not \['head'\]"):
        RoutingRules(split=frozenset({"head"}))
