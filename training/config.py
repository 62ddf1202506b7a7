"""What a training is told: one definition for the YAML and the options of `curate train` and `curate distill`.

Defaults are DINOv2's ViT-L/14 on many GPUs; `configs/train/` has the others, each with its source.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from training.data.config import DataConfig
from training.model import SIZES, HeadConfig, VisionTransformerConfig

NO_EFFECT: Any = {"affects_output": False}
"""Marks what may change between a training and its continuation."""


class ModelConfig(BaseModel, extra="forbid"):
    """The backbone. `size` gives width, depth and heads; each can be given by itself."""

    size: Literal["small", "base", "large", "huge", "giant"] = Field("large", description="of the Vision Transformer")
    patch_size: int = Field(14, ge=1, description="side of a patch, pixels")
    image_size: int = Field(224, ge=1, description="side for which positions are stored; others interpolate them")
    width: int | None = Field(None, ge=1, description="in place of the size's")
    depth: int | None = Field(None, ge=1, description="blocks, in place of the size's")
    heads: int | None = Field(None, ge=1, description="attention heads, in place of the size's")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the feed-forward over the width")
    feed_forward: Literal["mlp", "swiglu"] | None = Field(None, description="in place of the size's")
    registers: int = Field(0, ge=0, description="register tokens (Darcet et al. 2023: 4)")
    layer_scale: float | None = Field(1e-5, description="initial LayerScale; null: none")
    position_interpolation: Literal["timm", "hf", "dinov2"] = Field(
        "timm", description="how positions reach other sizes: timm is antialiased"
    )
    drop_path: float = Field(0.4, ge=0, lt=1, description="share of crops that a residual branch leaves out")

    def backbone(self) -> VisionTransformerConfig:
        """The shapes in full."""
        told = self.model_dump(exclude={"size", "drop_path"})
        given = {name: value for name, value in told.items() if value is not None or name == "layer_scale"}
        return VisionTransformerConfig(**(SIZES[self.size] | given))

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        shape = self.backbone()
        if shape.image_size % shape.patch_size:
            raise ValueError(f"image_size {shape.image_size} is not a multiple of patch_size {shape.patch_size}")
        if shape.width % shape.heads:
            raise ValueError(f"width {shape.width} is not a multiple of heads {shape.heads}")
        return self


class HeadShape(BaseModel, extra="forbid"):
    """A projection head."""

    hidden: int = Field(2048, ge=1, description="width of the two hidden layers")
    bottleneck: int = Field(384, ge=1, description="width in which prototypes live")
    prototypes: int = Field(131072, ge=2, description="how many")

    def shape(self) -> HeadConfig:
        """For the model."""
        return HeadConfig(**self.model_dump())


class HeadsConfig(BaseModel, extra="forbid"):
    """DINO's head and iBOT's."""

    dino: HeadShape = Field(default_factory=HeadShape, description="for class tokens")  # type: ignore[arg-type]
    ibot: HeadShape | None = Field(
        default_factory=lambda: HeadShape(bottleneck=256),  # type: ignore[call-arg]
        description="for patches; null: the DINO head, shared",
    )


class LossConfig(BaseModel, extra="forbid"):
    """Weights and temperatures."""

    dino_weight: float = Field(1.0, ge=0, description="of the DINO loss")
    ibot_weight: float = Field(1.0, ge=0, description="of the iBOT loss")
    koleo_weight: float = Field(0.1, ge=0, description="of the KoLeo loss")
    centering: Literal["sinkhorn", "softmax", "none"] = Field(
        "sinkhorn", description="of the teacher's logits; none collapses, and is there to show it"
    )
    sinkhorn_iterations: int = Field(3, ge=1, description="with sinkhorn")
    center_momentum: float = Field(0.9, ge=0, lt=1, description="with softmax: of the moving mean")
    student_temperature: float = Field(0.1, gt=0, description="of the student's softmax")


class ScheduleConfig(BaseModel, extra="forbid"):
    """What changes over the steps. Lengths are in steps; another number of steps scales those that are not given."""

    learning_rate: float = Field(2e-4, gt=0, description="at a batch of 1024; times sqrt(batch / 1024)")
    minimum_learning_rate: float = Field(1e-6, ge=0, description="at the end of the cosine")
    warmup_steps: int = Field(100_000, ge=0, description="of the learning rate, linear from 0")
    weight_decay: tuple[float, float] = Field((0.04, 0.2), description="first and last, cosine")
    teacher_momentum: tuple[float, float] = Field((0.994, 1.0), description="of the moving average, cosine")
    teacher_temperature: tuple[float, float] = Field((0.04, 0.07), description="first and last, linear")
    teacher_temperature_steps: int = Field(37_500, ge=0, description="from the first to the last")
    freeze_last_layer_steps: int = Field(1_250, ge=0, description="steps in which the prototypes stay as they are")


LENGTHS = ("warmup_steps", "teacher_temperature_steps", "freeze_last_layer_steps")


class OptimizerConfig(BaseModel, extra="forbid"):
    """AdamW."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor of the learning rate per layer, from the top down")
    patch_embed_factor: float = Field(0.2, gt=0, description="of the learning rate of the patch embedding")
    clip: float | None = Field(3.0, gt=0, description="bound of the gradient norm, per module; null: none")


class ParallelConfig(BaseModel, extra="forbid"):
    """How the work is spread; nothing here changes what is computed but rounding."""

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward and backward pass; masters, reductions and losses are float32"
    )
    replicate: int = Field(1, ge=1, description="HSDP: copies of the sharded model, usually the number of machines")
    compile: bool = Field(False, description="torch.compile, block by block")
    activation_checkpointing: bool = Field(False, description="recompute blocks backward instead of keeping them")


class KernelConfig(BaseModel, extra="forbid"):
    """What computes where plain torch is not the fastest; nothing here changes what is computed but rounding."""

    attention: Literal["auto", "sdpa", "varlen", "triton"] = Field(
        "sdpa",
        description="sdpa: torch's, one call per length of crop; varlen: torch's for packed crops; triton: ours, not "
        "measured on a GPU yet; auto: the fastest on the first start, which a continuation keeps",
    )
    branches: Literal["auto", "reference", "triton"] = Field(
        "reference",
        description="what lies between a block's products; triton: one pass each, not measured on a GPU yet; auto: the "
        "faster on the first start, which a continuation keeps",
    )
    losses: Literal["reference", "triton"] = Field(
        "reference", description="Sinkhorn-Knopp and cross-entropies; triton: streamed, no matrix of targets is stored"
    )
    student_logits: Literal["stored", "chunked"] = Field(
        "stored", description="chunked: a few rows at a time, with their gradients, never all: saves memory"
    )
    augmentation: Literal["reference", "triton"] = Field(
        "reference", description="with data.augment_on: device; triton: two passes over all crops of a size"
    )


class CheckpointConfig(BaseModel, extra="forbid"):
    """When and how many."""

    every: int = Field(5_000, ge=1, description="steps")
    keep: int = Field(3, ge=1, description="newest that stay")
    asynchronous: bool = Field(True, description="write while training goes on")


class LogConfig(BaseModel, extra="forbid"):
    """Where figures go beside log.jsonl."""

    every: int = Field(10, ge=1, description="steps that a line sums up")
    tensorboard: bool = Field(False, description="write TensorBoard's event files into the stage's folder")
    wandb: str | None = Field(None, description="project of Weights & Biases; null: none")


class KnnConfig(BaseModel, extra="forbid"):
    """k-NN on frozen features while training goes on."""

    train: str = Field(description="labelled images: a folder of folders, or a manifest")
    test: str = Field(description="labelled images to be told")
    every: int = Field(5_000, ge=1, description="steps")
    neighbours: int = Field(10, ge=1, description="k")


class DistillConfig(BaseModel, extra="forbid"):
    """A frozen teacher and the students that learn from one pass of it."""

    teacher: str = Field(description="folder `model` of a checkpoint of ours, heads included, or a stage's name")
    students: dict[str, ModelConfig] = Field(min_length=1, description="by name: each a block like `model`")


class StageConfig(BaseModel, extra="allow"):
    """A stage's name, and what it changes in the configuration."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="of its folder")


class TrainConfig(BaseModel, extra="forbid"):
    """A training, or one stage of it."""

    output: str = Field("training-run", description="folder for checkpoints and logs", json_schema_extra=NO_EFFECT)
    seed: int = Field(0, ge=0, description="of every random choice")
    steps: int = Field(625_000, ge=1, description="updates")
    batch_size: int = Field(3072, ge=1, description="images of one update, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches of one update; Sinkhorn sees one at a time")
    group_size: int = Field(
        32, ge=2, description="images within which KoLeo, stochastic depth and masks are defined (the recipe: a GPU's)"
    )
    initial: str | None = Field(None, description="folder `model` of a checkpoint to start from; null: random weights")
    model: ModelConfig = Field(default_factory=ModelConfig, description="backbone")  # type: ignore[arg-type]
    heads: HeadsConfig = Field(default_factory=HeadsConfig, description="projection heads")  # type: ignore[arg-type]
    losses: LossConfig = Field(default_factory=LossConfig, description="losses")  # type: ignore[arg-type]
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="schedules")  # type: ignore[arg-type]
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")  # type: ignore[arg-type]
    data: DataConfig = Field(description="what is trained on")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,  # type: ignore[arg-type]
        description="processes",
        json_schema_extra=NO_EFFECT,
    )
    kernels: KernelConfig = Field(
        default_factory=KernelConfig,  # type: ignore[arg-type]
        description="kernels",
        json_schema_extra=NO_EFFECT,
    )
    checkpoints: CheckpointConfig = Field(
        default_factory=CheckpointConfig,  # type: ignore[arg-type]
        description="checkpoints",
        json_schema_extra=NO_EFFECT,
    )
    logging: LogConfig = Field(default_factory=LogConfig, description="logs", json_schema_extra=NO_EFFECT)  # type: ignore[arg-type]
    knn: KnnConfig | None = Field(None, description="evaluation while training", json_schema_extra=NO_EFFECT)
    distill: DistillConfig | None = Field(None, description="distillation in place of self-distillation")
    stages: list[StageConfig] = Field([], description="one after another; each what it changes; none: one stage")

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        patch = self.model.patch_size
        if "://" in self.output:
            raise ValueError(
                f"output {self.output} is not a folder; checkpoints need a file system that all machines see"
            )
        for name in ("global_size", "local_size"):
            if getattr(self.data, name) % patch:
                raise ValueError(f"data.{name} {getattr(self.data, name)} is not a multiple of patch_size {patch}")
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} is not below steps {self.steps}")
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: a name stands twice in {', '.join(names)}")
        return self


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `change` says; mappings are merged, all else replaced."""
    merged = dict(base)
    for key, value in change.items():
        below = base.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def compressed(document: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`document` with what `change` says; other `steps` scale the schedule's lengths that `change` does not give."""
    if "steps" in change:
        complete = ScheduleConfig(**document.get("schedule", {}))  # with the defaults that are scaled, too
        share = change["steps"] / document.get("steps", TrainConfig.model_fields["steps"].default)
        given = change.get("schedule", {})
        scaled = {name: round(getattr(complete, name) * share) for name in LENGTHS if name not in given}
        change = merge(change, {"schedule": scaled})
    return merge(document, change)


def stages(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """(name, complete configuration) of every stage, in order. A stage without changes is the configuration itself."""
    document = config.model_dump(mode="json", exclude={"stages"})
    if not config.stages:
        return [("distill" if config.distill else "pretrain", config)]
    return [
        (stage.name, TrainConfig.model_validate(compressed(document, stage.model_dump(exclude={"name"}))))
        for stage in config.stages
    ]


def identity(config: TrainConfig) -> dict[str, Any]:
    """What a continuation must not change."""
    out = {
        name
        for name, field in TrainConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("affects_output") is False
    }
    document = config.model_dump(mode="json", exclude=out | {"stages"})
    for name in ("workers", "prefetch", "reads_in_flight", "index_folder", "augment_on"):
        document["data"].pop(name, None)
    return document


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted names under which two documents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)]
    return [] if one == other else [path]
