"""What training would do, computed without training: pure functions of shapes and sizes.

Never imports megatron; tests compare with what Megatron does.
"""

from megatron_dion_tools.plan.layout import default_bucket_size, place
from megatron_dion_tools.plan.models import PRESETS, GptShape

__all__ = ["PRESETS", "GptShape", "default_bucket_size", "place"]
