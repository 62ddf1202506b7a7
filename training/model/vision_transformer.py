"""The Vision Transformer of DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2023), in plain torch.

Parameter names are those of Meta's dinov2 release, so that its state dictionaries load as they are. Knows
nothing of training: sharding, masks' sampling, drop path schedules and compile come from outside.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionTransformerConfig:
    """Everything that decides the shapes and the arithmetic; stored beside the weights as JSON."""

    image_size: int = 224
    """Of the position embedding; other sizes interpolate it."""
    patch_size: int = 14
    channels: int = 3
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    feed_forward: Literal["mlp", "swiglu"] = "mlp"
    registers: int = 0
    layer_scale: float | None = 1e-5
    """Initial value; None: no LayerScale."""
    interpolate_antialias: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES: dict[str, dict[str, Any]] = {
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
    "giant": {"width": 1536, "depth": 40, "heads": 24, "feed_forward": "swiglu"},
}


@dataclass
class Tokens:
    """Normalised output. class_token: (b, d). registers: (b, r, d). patches: (b, n, d), row by row."""

    class_token: Tensor
    registers: Tensor
    patches: Tensor


class VisionTransformer(nn.Module):
    """Images to tokens. `forward` gives the class token, `tokens` all of them."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size or config.width % config.heads:
            raise ValueError("image_size must be a multiple of patch_size, width of heads")
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.width))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.registers, config.width)) if config.registers else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in DINOv2: truncated normal 0.02 for projections and positions, 1e-6 for the lone tokens."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, d)."""
        return self.tokens(images).class_token

    def tokens(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """images: (b, 3, h, w), sides multiples of the patch. masks: (b, n) bool, patches shown as the mask token."""
        height, width = images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(height, width)
        count = 0
        if self.register_tokens is not None:
            count = self.register_tokens.shape[1]
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1 : 1 + count], x[:, 1 + count :])

    def positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + height * width, d): bicubic from the grid that was trained, the class token's as it is."""
        if height == width == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(
            patches,
            size=(height, width),
            mode="bicubic",
            antialias=self.config.interpolate_antialias,
            align_corners=False,
        )
        resized = resized.permute(0, 2, 3, 1).reshape(1, height * width, -1).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], resized], dim=1)


class PatchEmbedding(nn.Module):
    """(b, 3, h, w) -> (b, n, d)."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each scaled per channel."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = layer_scale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = SwiGLU(config.width, hidden) if config.feed_forward == "swiglu" else Mlp(config.width, hidden)
        self.ls2 = layer_scale(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width // self.heads))
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward of DINOv2 giant: two thirds of `hidden`, rounded up to a multiple of 8."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layer_scale(config: VisionTransformerConfig) -> nn.Module:
    """LayerScale, or nothing."""
    return nn.Identity() if config.layer_scale is None else LayerScale(config.width, config.layer_scale)
