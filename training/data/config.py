"""What the data of a training is and how it is drawn: the block `data:` of a training's configuration."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class DataConfig(BaseModel, extra="forbid"):
    """Defaults are the numbers of DINOv2's ViT-L/14 and g/14 (RECIPE: 2 x 224 and 8 x 98 crops)."""

    source: str = Field(
        description="a run directory, a manifest (a Parquet file or a folder of them), a folder of images, or shards "
        "written by `curate pack`"
    )
    sampling: Literal["weight", "uniform", "seed_set", "cluster"] = Field(
        "weight",
        description="how often an image is drawn: as the manifest's `weight` says, each once per epoch, the seed sets "
        "in equal shares (or `shares`), or the clusters equally",
    )
    shares: dict[str, float] = Field(
        {},
        description="with seed_set: draws per seed set (`balance` for what balancing brought), relative to each other",
    )
    cluster_level: int = Field(1, ge=1, description="with cluster: level of the cluster path, 1 the leaves")
    global_size: int = Field(224, ge=8, description="side of the two global crops, pixels")
    local_size: int = Field(98, ge=8, description="side of the local crops, pixels")
    local_crops: int = Field(8, ge=0, description="local crops per image")
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="share of the image's area a global crop covers")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="share of the image's area a local crop covers")
    blur: tuple[float, float, float] = Field(
        (0.0, 0.9, 0.5),
        description="probability of a Gaussian blur of global crop 1, global crop 2, the local crops; the released "
        "models saw these (the public code inverts what it says: 1, .1, .5)",
    )
    augment_on: Literal["cpu", "device"] = Field(
        "cpu",
        description="who colours, blurs and normalises the crops: the loader's workers, or the training's device, with "
        "the same drawn numbers; nothing changes but a level of some blurred pixels",
    )
    mask_probability: float = Field(0.5, ge=0, le=1, description="share of a group's global crops that are masked")
    mask_ratio: tuple[float, float] = Field(
        (0.1, 0.5), description="share of a masked crop's patches, stratified over the masked crops of a group"
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="subtracted from pixels in [0, 1]")
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="what they are then divided by")
    workers: int = Field(
        0, ge=0, description="processes that read, decode and augment; 0: in the training's own process"
    )
    prefetch: int = Field(2, ge=1, description="micro-batches each worker makes ahead")
    reads_in_flight: int = Field(32, ge=1, description="reads of images that a worker keeps under way")
    index_folder: str | None = Field(
        None,
        description="local folder for the row index of the source (28 bytes per image, made once); default: "
        "$XDG_CACHE_HOME/lvd-curate, else ~/.cache/lvd-curate",
    )
    chunk_images: int = Field(256, ge=1, description="with packed shards: images fetched by one sequential read")
    shuffle_chunks: int = Field(4, ge=1, description="with packed shards: chunks whose images are shuffled together")

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        for name in ("global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}: {low}, {high} is not a range within (0, 1]")
        if any(not 0 <= p <= 1 for p in self.blur):
            raise ValueError(f"blur: {self.blur} are not probabilities")
        if any(share <= 0 for share in self.shares.values()):
            raise ValueError("shares: every share must be above 0; leave out what is not to be drawn")
        return self
