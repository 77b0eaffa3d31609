from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron_dion.optimizer.rules import RoutingRules

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"
ANY = RoutingRules(include=("embedding.*", "*norm*"), exclude=("*.layers.0.*",))


def parameter(*shape: int, **tags: Any) -> Parameter:
    made = Parameter(torch.zeros(shape))
    for name, value in tags.items():
        setattr(made, name, value)
    return made


OUTPUT = parameter(4, 2, is_embedding_or_output_parameter=True)


@pytest.mark.parametrize(
    ("rules", "name", "made", "decision"),
    [
        (RoutingRules(), FC1, parameter(4, 2), (True, "linear layer")),
        (RoutingRules(), "decoder.final_layernorm.weight", parameter(4), (False, "1-D")),
        (RoutingRules(), "conv.weight", parameter(4, 2, 3), (False, "3-D")),
        (RoutingRules(), "output_layer.weight", OUTPUT, (False, "embedding or output layer")),
        (RoutingRules(), "embedding.position.weight", parameter(4, 2), (False, "embedding")),
        (RoutingRules(), "a.1.mlp.router.weight", parameter(4, 2), (False, "router of experts")),
        (
            RoutingRules(),
            "a.mlp.shared_experts.gate_weight",
            parameter(1, 2),
            (False, "gate of shared experts"),
        ),
        (
            RoutingRules(),
            "a.shared_experts.linear_fc1.weight",
            parameter(4, 2),
            (True, "linear layer"),
        ),
        (ANY, EMBEDDING, OUTPUT, (True, "included by embedding.*")),
        (ANY, FC1, parameter(4, 2), (False, "excluded by *.layers.0.*")),
        (ANY, FC1.replace("0", "10"), parameter(4, 2), (True, "linear layer")),
        (ANY, "decoder.final_layernorm.weight", parameter(4), (False, "1-D")),
    ],
)
def test_decisions(
    rules: RoutingRules, name: str, made: Parameter, decision: tuple[bool, str]
) -> None:
    assert rules.decide(name, made) == decision


def test_what_rules_refuse() -> None:
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight is included by"):
        ANY.decide(EMBEDDING, parameter(4, 2, shared_embedding=True))
    RoutingRules(include=("embed*",), exclude=("*fc1*",)).check_patterns([FC1, EMBEDDING])
    with pytest.raises(ValueError, match=r"no parameter's name matches '\*fc3\*'; they"):
        RoutingRules(exclude=("*fc3*",)).check_patterns([FC1, EMBEDDING])
    with pytest.raises(ValueError, match=r"not \['head'\]"):
        RoutingRules(split=frozenset({"head"}))
