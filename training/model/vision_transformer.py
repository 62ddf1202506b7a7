"""The Vision Transformer of DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2023), in plain torch.

Parameter names are those of Meta's dinov2 release, so that its state dictionaries load as they are. Knows
nothing of training: sharding, the choice of masks and of what stochastic depth drops, and compile come from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.packing import Attend, Kept, Layout, add_branch, attend_per_length

if TYPE_CHECKING:  # annotations alone need it: a machine with nothing but torch runs the model
    from jaxtyping import Bool, Float


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
    position_interpolation: Literal["timm", "hf", "dinov2"] = "timm"
    """How positions reach other sizes. timm, and Hugging Face's models with registers: bicubic, antialiased; hf: not
    antialiased; dinov2: not antialiased, and the scale computed from a side longer by `position_offset` patches."""
    position_offset: float = 0.1

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

    def use_attention(self, attend: Attend) -> None:
        """Compute attention with `attend` in all blocks, in place of `attend_per_length`."""
        for block in self.blocks:
            block.attn.attend = attend

    def use_blocks(self, compute: Compute) -> None:
        """Compute all blocks with `compute`, in place of `compute_block`."""
        for block in self.blocks:
            block.compute = compute

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The class tokens."""
        return self.tokens(images).class_token

    def tokens(self, images: Float[Tensor, "b c h w"], masks: Bool[Tensor, "b n"] | None = None) -> Tokens:
        """All tokens. Sides are multiples of the patch; masks: patches shown as the mask token."""
        return self.packed([images], masks)[0]

    def packed(
        self,
        crops: Sequence[Float[Tensor, "_ c _ _"]],
        masks: Bool[Tensor, "b n"] | None = None,
        kept: Sequence[tuple[Kept, Kept]] | None = None,
    ) -> list[Tokens]:
        """Sets of crops of one size each, all in one pass; `masks` belong to the first set.

        kept: for every block the sequences that its attention and its feed-forward compute; None: all.
        """
        sets = [self.embed(images, masks if i == 0 else None) for i, images in enumerate(crops)]
        layout = Layout(tuple(len(x) for x in sets), tuple(x.shape[1] for x in sets))
        x = torch.cat([x.flatten(0, 1) for x in sets]) if len(sets) > 1 else sets[0].flatten(0, 1)
        for i, block in enumerate(self.blocks):
            x = block(x, layout, *(kept[i] if kept is not None else ()))
        first = 1 + self.config.registers
        return [Tokens(y[:, 0], y[:, 1:first], y[:, first:]) for y in layout.unpack(self.norm(x))]

    def embed(self, images: Float[Tensor, "b c h w"], masks: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b length d"]:
        """Patches, masked where told, with positions; the class token and the registers before them."""
        height, width = images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(height, width)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self, height: int, width: int) -> Float[Tensor, "1 _ d"]:
        """Bicubic from the grid that was trained; the class token's as it is."""
        if height == width == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        target: dict[str, Any] = {"size": (height, width)}
        if self.config.position_interpolation == "dinov2" and self.config.position_offset:
            target = {"scale_factor": tuple((n + self.config.position_offset) / self.grid for n in (height, width))}
        antialias = self.config.position_interpolation == "timm"
        resized = F.interpolate(patches, **target, mode="bicubic", antialias=antialias, align_corners=False)
        resized = resized.permute(0, 2, 3, 1).reshape(1, height * width, -1).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], resized], dim=1)


class PatchEmbedding(nn.Module):
    """A linear map of every patch."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each scaled per channel, on packed sequences."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = layer_scale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = SwiGLU(config.width, hidden) if config.feed_forward == "swiglu" else Mlp(config.width, hidden)
        self.ls2 = layer_scale(config)
        self.compute: Compute = compute_block

    def forward(
        self,
        x: Float[Tensor, "tokens d"],
        layout: Layout,
        kept_attention: Kept | None = None,
        kept_feed_forward: Kept | None = None,
    ) -> Float[Tensor, "tokens d"]:
        return self.compute(self, x, layout, kept_attention, kept_feed_forward)


Compute = Callable[[Block, Tensor, Layout, Kept | None, Kept | None], Tensor]
"""A block, (tokens, d), their layout, what its attention and its feed-forward keep -> (tokens, d)"""


def compute_block(
    block: Block,
    x: Float[Tensor, "tokens d"],
    layout: Layout,
    kept_attention: Kept | None = None,
    kept_feed_forward: Kept | None = None,
) -> Float[Tensor, "tokens d"]:
    """One branch after the other, each step a pass of its own: the reference of kernels that fuse them."""
    x = add_branch(x, lambda y, part: block.ls1(block.attn(block.norm1(y), part)), layout, kept_attention)
    return add_branch(x, lambda y, _: block.ls2(block.mlp(block.norm2(y))), layout, kept_feed_forward)


class Attention(nn.Module):
    """Multi-head self-attention of every sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attend: Attend = attend_per_length

    def forward(self, x: Float[Tensor, "tokens d"], layout: Layout) -> Float[Tensor, "tokens d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.proj(self.attend(qkv, layout).flatten(1))


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
