"""The machines a plan can be made for, what is assumed of them and of web images, and the rates that were measured.

A number is measured by this project only where its origin says so: the others are there to be replaced by yours.
"""

import dataclasses
import difflib
import glob
from dataclasses import dataclass

from curation.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """A machine, or several of one kind. The rates are sustained, not peak, and assumed."""

    name: str
    nodes: int
    cores_per_node: int
    gpus_per_node: int
    memory_per_node: int
    core_flop_s: float
    gpu_flop_s: float
    disk_bytes_s: float
    network_bytes_s: float

    @property
    def cores(self) -> int:
        return self.nodes * self.cores_per_node

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def flop_s(self) -> float:
        """Of all GPUs, or of all cores where there is none."""
        return self.gpus * self.gpu_flop_s if self.gpus else self.cores * self.core_flop_s

    def describe(self) -> str:
        """`20 nodes of 40 cores and 8 GPUs (v100x160)`."""
        each = f"{self.cores_per_node} cores" + (f" and {self.gpus_per_node} GPUs" if self.gpus_per_node else "")
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {each} ({self.name})"


@dataclass(frozen=True)
class Assumption:
    """A number the plan rests on, and where it is from."""

    name: str
    value: float
    unit: str
    origin: str


V100_FLOP_S = 40e12
H100_FLOP_S = 400e12
CORE_FLOP_S = 40e9
DISK_BYTES_S = 1e9
NETWORK_BYTES_S = 1e9

CLUSTERS = {
    "v100x160": Hardware("v100x160", 20, 40, 8, 512 * 2**30, CORE_FLOP_S, V100_FLOP_S, DISK_BYTES_S, NETWORK_BYTES_S),
    "h100x8": Hardware("h100x8", 1, 96, 8, 1024 * 2**30, CORE_FLOP_S, H100_FLOP_S, 4 * DISK_BYTES_S, NETWORK_BYTES_S),
}
"""v100x160: what the DINOv2 paper used for its search (20 nodes of 8 V100-32GB); its cores and disks are assumed."""

CALIBRATION = "benchmarks/results/plan-calibration.json"
MEASURED: dict[str, tuple[float, str]] = {
    "store": (12.4, "ns per value"),
    "train": (0.053, "ns per multiply-add"),
    "truth": (2.78, "ns per pair"),
    "choose": (90000.0, "ns per query"),
    "assign": (0.0261, "ns per multiply-add"),
    "visit": (6.72, "ns per score"),
    "scan_hard": (1.04, "ns per pair"),
    "scan_easy": (1.31, "ns per pair"),
    "open": (92.1, "ns per visit"),
    "verify": (1810.0, "ns per row"),
    "driver": (3240.0, "ns per row"),
    "seeding": (0.0616, "ns per multiply-add"),
    "lloyd": (0.025, "ns per multiply-add without bounds"),
    "product": (0.025, "ns per multiply-add"),
    "tune": (0.0419, "ns per multiply-add"),
    "warm": (57.9, "ns per value of a seed"),
    "code": (6.98, "ns per value"),
    "scan_code": (0.0223, "ns per piece of a code"),
    "sort": (12.0, "ns per row and doubling"),
    "mix_row": (11.5, "ns per row and doubling"),
    "manifest_row": (1360.0, "ns per row"),
    "share_hard": (0.0138, "of all rows"),
    "visits_hard": (5.4, "cells per row"),
    "queries_hard": (7300.0, "queries"),
    "share_easy": (0.0081, "of all rows"),
    "visits_easy": (4.8, "cells per row"),
    "queries_easy": (7750.0, "queries"),
    "share_scanned": (0.0664, "of all rows"),
}
"""One thread of an AMD EPYC of 2021, vectors of 512 dimensions: what each is the rate of says `pipelines/costs.py`."""

WEB_IMAGE_BYTES = Assumption("image_bytes", 100e3, "B per image", "assumed: a web image as served")
ASSUMPTIONS = (
    WEB_IMAGE_BYTES,
    Assumption("row_bytes", 250.0, "B per row", "assumed: a row of the images table, compressed"),
    Assumption("download_rate", 20.0, "images/s per core", "assumed: slow hosts, retries and robots.txt included"),
    Assumption(
        "decode_rate",
        94.0,
        "images/s per core",
        "measured: decode and prepare for sscd, 0.245 megapixels, benchmarks/results/score_pass.json",
    ),
    Assumption("blurred_share", 0.1, "of images", "assumed: images with faces, stored once more"),
    Assumption("filter_share", 1.0, "of images kept", "upper bound: nothing is assumed to be dropped"),
    Assumption("self_share", 1.1 / 1.3, "of pool kept", "DINOv2, appendix A: 1.3 B to 1.1 B"),
    Assumption("reference_share", 0.744 / 1.1, "of pool kept", "DINOv2, appendix A: 1.1 B to 744 M"),
    *(Assumption(name, value, unit, f"measured: {CALIBRATION}") for name, (value, unit) in MEASURED.items()),
)
KNOWN = {assumption.name: assumption.value for assumption in ASSUMPTIONS}

MODELS: dict[str, tuple[float, int]] = {
    "mobilenet_v2": (0.6e9, 1280),
    "sscd": (16.7e9, 512),
    "sscd_distilled": (16.7e9, 512),
    "open_clip:ViT-B-32": (8.8e9, 512),
    "open_clip:ViT-L-14": (162e9, 768),
    "open_clip:ViT-H-14": (334e9, 1024),
    "timm:vit_small_patch14_dinov2.lvd142m": (95e9, 384),
    "timm:vit_large_patch14_dinov2.lvd142m": (1.0e12, 1024),
    "timm:vit_huge_patch14_gap_224.in22k_ijepa": (334e9, 1280),
}
"""FLOP per image (a multiply and an add are two) and dimension, from the layers' shapes at the size the adapter feeds
(SSCD: ResNet-50 at 320 pixels, DINOv2 in timm: 518). The distilled SSCD counts as the whole one: an upper bound."""
UNKNOWN_MODEL = (334e9, 1280)


def model_cost(name: str) -> tuple[float, int, bool]:
    """(FLOP per image, dimension, known) of a model; one that is not listed counts as a ViT-H/14."""
    for key in (name, name.partition("/")[0], name.partition(":")[0]):
        if key in MODELS:
            return (*MODELS[key], True)
    return (*UNKNOWN_MODEL, False)


def this_machine() -> Hardware:
    """Cores, memory and GPUs of this machine as found; its rates are assumed like all others."""
    from pipelines import doctor

    # Device files, not torch: a plan answers at once.
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    return Hardware(
        "this machine",
        1,
        doctor.usable_cores(),
        gpus,
        doctor.usable_memory(),
        CORE_FLOP_S,
        H100_FLOP_S / 4,
        DISK_BYTES_S,
        NETWORK_BYTES_S / 10,
    )


def hardware(
    name: str, *, nodes: int | None = None, gpus_per_node: int | None = None, cores_per_node: int | None = None
) -> Hardware:
    """Hardware by name (`this`, or one of CLUSTERS) with its counts changed. Raises UserError."""
    if name != "this" and name not in CLUSTERS:
        known = ["this", *CLUSTERS]
        close = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"--hardware {name}: {f'did you mean `{close[0]}`?' if close else 'known: ' + ', '.join(known)}"
        )
    found = this_machine() if name == "this" else CLUSTERS[name]
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node, "cores_per_node": cores_per_node}
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(found, **given)  # type: ignore[arg-type]
