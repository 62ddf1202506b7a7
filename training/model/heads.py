"""The projection heads of DINO and iBOT, and a backbone with its heads: what is trained as one network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.packing import Kept
from training.model.vision_transformer import VisionTransformer, VisionTransformerConfig

if TYPE_CHECKING:  # annotations alone need it: a machine with nothing but torch runs the model
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class HeadConfig:
    """A three-layer perceptron into a small unit sphere, and prototypes on it."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ProjectionHead(nn.Module):
    """Tokens to logits over prototypes (Caron et al. 2021; layers as in the public DINOv2 code)."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        self.last_layer = Prototypes(config.bottleneck, config.prototypes)
        self.factored = False
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n prototypes"] | Factored:
        """The logits; where `factored` is set, what they are the product of."""
        x = F.normalize(self.mlp(x), dim=-1)
        return Factored(x, self.last_layer.matrix()) if self.factored else self.last_layer(x)


class Factored(NamedTuple):
    """Logits that nobody has multiplied out: features @ prototypes.T.

    The prototypes leave the head as a tensor with a history: what multiplies them outside finds them whole, although
    the parameters they came from may be sharded again.
    """

    features: Float[Tensor, "n bottleneck"]
    prototypes: Float[Tensor, "prototypes bottleneck"]
    """float32."""

    def split(self, sizes: Sequence[int]) -> list[Factored]:
        """By rows."""
        return [Factored(part, self.prototypes) for part in self.features.split(list(sizes))]


class Prototypes(nn.Module):
    """A linear layer whose rows have a direction and a learned length, 1 at first (weight normalisation)."""

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(torch.ones(prototypes, 1))
        self.direction = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.uniform_(self.direction, -(bottleneck**-0.5), bottleneck**-0.5)  # what nn.Linear begins with

    def forward(self, x: Float[Tensor, "n bottleneck"]) -> Float[Tensor, "n prototypes"]:
        return F.linear(x, self.matrix().to(x.dtype))

    def matrix(self) -> Float[Tensor, "prototypes bottleneck"]:
        """float32."""
        return self.magnitude.float() * F.normalize(self.direction.float(), dim=1)


class Outputs(NamedTuple):
    """What the losses need of one pass."""

    class_tokens: Float[Tensor, "b d"]
    """Of the first set of crops, before the head."""
    class_logits: Float[Tensor, "crops prototypes"] | Factored
    """Of the class tokens of all sets, one set behind another."""
    ibot: Float[Tensor, "patches prototypes"] | Factored
    """Logits of the chosen patches of the first set."""
    counts: tuple[int, ...]
    """Crops per set."""

    @property
    def dino(self) -> list[Float[Tensor, "crops prototypes"]] | list[Factored]:
        """The class tokens' logits, set by set."""
        return list(self.class_logits.split(list(self.counts)))


class Network(nn.Module):
    """A backbone and its heads; without an iBOT head of its own, the patches go through the DINO head."""

    def __init__(self, backbone: VisionTransformerConfig, dino: HeadConfig, ibot: HeadConfig | None) -> None:
        super().__init__()
        self.backbone = VisionTransformer(backbone)
        self.dino_head = ProjectionHead(backbone.width, dino)
        self.ibot_head = None if ibot is None else ProjectionHead(backbone.width, ibot)

    def use_factored_logits(self) -> None:
        """Give logits as `Factored` from now on."""
        for head in (self.dino_head, self.ibot_head):
            if head is not None:
                head.factored = True

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ c _ _"]],
        patches: Int[Tensor, "patches"],
        masks: Bool[Tensor, "b n"] | None = None,
        kept: Sequence[tuple[Kept, Kept]] | None = None,
    ) -> Outputs:
        """patches: which of the first set's patches (rows of (global x n)) the iBOT loss looks at."""
        sets = self.backbone.packed(crops, masks, kept)
        class_tokens = torch.cat([tokens.class_token for tokens in sets])
        chosen = sets[0].patches.flatten(0, 1).index_select(0, patches)
        if self.ibot_head is None:
            class_logits, patch_logits = self.dino_head(torch.cat([class_tokens, chosen])).split(
                [len(class_tokens), len(chosen)]
            )
        else:
            class_logits, patch_logits = self.dino_head(class_tokens), self.ibot_head(chosen)
        return Outputs(sets[0].class_token, class_logits, patch_logits, tuple(len(images) for images in crops))
