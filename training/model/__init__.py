"""The model that is trained; imports torch and nothing of ours."""

from training.model.vision_transformer import SIZES, Tokens, VisionTransformer, VisionTransformerConfig

__all__ = ["SIZES", "Tokens", "VisionTransformer", "VisionTransformerConfig"]
