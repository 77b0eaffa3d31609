"""What training would do, computed without training: pure functions of shapes and sizes.

Never imports megatron; tests compare with what Megatron does.
"""

from megatron_dion_tools.plan.flags import PRESETS
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.stage import place

__all__ = ["PRESETS", "GptShape", "place"]
