from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron_dion.optimizer.rules import RoutingRules

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"
DEFAULT = RoutingRules()
ANY = RoutingRules(include=("embedding.*", "*norm*"), exclude=("*.layers.0.*",))
LINEAR = (True, "linear layer")


def parameter(*shape: int, **tags: Any) -> Parameter:
    made = Parameter(torch.zeros(shape or (4, 2)))
    for name, value in tags.items():
        setattr(made, name, value)
    return made


OUTPUT = parameter(is_embedding_or_output_parameter=True)


@pytest.mark.parametrize(
    ("rules", "name", "made", "decision"),
    [
        (DEFAULT, FC1, parameter(), LINEAR),
        (DEFAULT, "decoder.final_layernorm.weight", parameter(4), (False, "1-D")),
        (DEFAULT, "conv.weight", parameter(4, 2, 3), (False, "3-D")),
        (DEFAULT, "output_layer.weight", OUTPUT, (False, "embedding or output layer")),
        (DEFAULT, "embedding.position.weight", parameter(), (False, "embedding")),
        (DEFAULT, "a.1.mlp.router.weight", parameter(), (False, "router of experts")),
        (DEFAULT, "a.shared_experts.gate_weight", parameter(), (False, "gate of shared experts")),
        (DEFAULT, "a.shared_experts.linear_fc1.weight", parameter(), LINEAR),
        (ANY, EMBEDDING, OUTPUT, (True, "included by embedding.*")),
        (ANY, FC1, parameter(), (False, "excluded by *.layers.0.*")),
        (ANY, FC1.replace("0", "10"), parameter(), LINEAR),
        (ANY, "decoder.final_layernorm.weight", parameter(4), (False, "1-D")),
    ],
)
def test_decisions(
    rules: RoutingRules, name: str, made: Parameter, decision: tuple[bool, str]
) -> None:
    assert rules.decide(name, made) == decision


def test_what_rules_refuse() -> None:
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight is included by"):
        ANY.decide(EMBEDDING, parameter(shared_embedding=True))
    RoutingRules(include=("embed*",), exclude=("*fc1*",)).check_patterns([FC1, EMBEDDING])
    with pytest.raises(ValueError, match=r"no parameter's name matches '\*fc3\*'; they"):
        RoutingRules(exclude=("*fc3*",)).check_patterns([FC1, EMBEDDING])
    with pytest.raises(ValueError, match=r"split must be of qkv, gate, heads, not \['head'\]"):
        RoutingRules(split=frozenset({"head"}))
