"""The model that is trained; imports torch and nothing of ours."""

from training.model.heads import Factored, HeadConfig, Network, Outputs, ProjectionHead
from training.model.packing import Attend, Kept, Layout, attend_per_length
from training.model.vision_transformer import (
    SIZES,
    Block,
    Compute,
    Tokens,
    VisionTransformer,
    VisionTransformerConfig,
    compute_block,
)

__all__ = [
    "SIZES",
    "Attend",
    "Block",
    "Compute",
    "Factored",
    "HeadConfig",
    "Kept",
    "Layout",
    "Network",
    "Outputs",
    "ProjectionHead",
    "Tokens",
    "VisionTransformer",
    "VisionTransformerConfig",
    "attend_per_length",
    "compute_block",
]
