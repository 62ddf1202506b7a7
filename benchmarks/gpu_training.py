"""The training part of `make gpu`: whole steps of ViT-S/B/L on one GPU, eager and compiled.

The trainer's own step (`training.step`) under FSDP2 on a mesh of one, bfloat16, the recipe's crops, heads of 65,536
prototypes, Sinkhorn-Knopp, drop path .3 (L) and .1 (S, B); made images, so that no loader is timed. images/s, peak
memory, and MFU over the measured matrix ceiling with the backbones' operations counted. Needs torch and numpy only.
"""

from types import SimpleNamespace
from typing import Any

PATCH, GLOBAL, LOCAL, LOCAL_CROPS, PROTOTYPES = 14, 224, 98, 8, 65536


def training_steps(torch: Any, document: dict[str, Any], median_seconds: Any) -> list[dict[str, Any]]:
    """One row per model."""
    from training import parallel

    device = parallel.start()
    rows = []
    for size, batch, drop_path in (("small", 128, 0.1), ("base", 64, 0.1), ("large", 32, 0.3)):
        row: dict[str, Any] = {"model": f"ViT-{size}/14", "batch": batch, "drop_path": drop_path}
        for way in ("eager", "compiled"):
            try:
                row[way] = measure(torch, document, median_seconds, size, batch, drop_path, way == "compiled", device)
            except Exception as error:  # the other figures are worth having
                row[way] = f"failed: {type(error).__name__}: {str(error)[:300]}"
                document["failures"].append(f"training step of ViT-{size}, {way}: {row[way]}")
            torch.cuda.empty_cache()
        rows.append(row)
    parallel.stop()
    return rows


def measure(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    size: str,
    batch: int,
    drop_path: float,
    compiled: bool,
    device: Any,
) -> dict[str, Any]:
    """Figures of one model, one way."""
    from training import parallel
    from training.flops import forward_of_crop
    from training.losses import SinkhornKnopp
    from training.model import SIZES, HeadConfig, Network, VisionTransformerConfig
    from training.optimizer import make_optimizer
    from training.schedules import StepValues
    from training.step import Learner, Models, train_step

    shape, head = VisionTransformerConfig(**SIZES[size]), HeadConfig(prototypes=PROTOTYPES)
    torch.manual_seed(0)
    networks = []
    spread = SimpleNamespace(replicate=1, precision="bfloat16", compile=compiled, activation_checkpointing=False)
    mesh = parallel.make_mesh(spread, device)
    for trained in (True, False):
        network = Network(shape, head, None).requires_grad_(trained).train(trained).to(device)
        parallel.apply(network, spread, mesh, trained=trained)
        networks.append(network)
    adam = SimpleNamespace(betas=(0.9, 0.999), layer_decay=1.0, patch_embed_factor=0.2, clip=3.0)
    learner = Learner("model", *networks, make_optimizer(networks[0], adam), drop_path)
    models = Models([learner], learner.average, SinkhornKnopp(), SinkhornKnopp(), device)
    losses = SimpleNamespace(dino_weight=1.0, ibot_weight=1.0, koleo_weight=0.1, student_temperature=0.1)
    config = SimpleNamespace(losses=losses, group_size=batch, seed=0, optimizer=adam)
    values = StepValues(1e-4, 1e-4, 0.04, 0.994, 0.05)
    batches = [made_batch(torch, batch, number) for number in range(3)]
    torch.cuda.reset_peak_memory_stats()
    figures: dict[str, Any] = {}

    def step(number: int) -> None:
        figures.update(train_step(models, [batches[number % 3]], values, config)["model"])

    timed = median_seconds(torch, step, 10)
    if not torch.isfinite(figures["loss"]):
        document["failures"].append(f"training step of ViT-{size}: loss {float(figures['loss'])}")
    seen = [2 * forward_of_crop(shape, GLOBAL), LOCAL_CROPS * forward_of_crop(shape, LOCAL)]
    flop = batch * (seen[0] + 3 * (1 - drop_path) * sum(seen))
    return {
        **timed,
        "images_per_s": batch / timed["median_s"],
        "mfu_of_bf16_ceiling": flop / timed["median_s"] / document["ceilings"]["bf16_flop_per_s"],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def made_batch(torch: Any, samples: int, number: int) -> Any:
    """Noise in pinned memory, masks of the recipe's mean size."""
    random = torch.Generator().manual_seed(number)
    crops = torch.randn(2 * samples, 3, GLOBAL, GLOBAL, generator=random)
    local = torch.randn(LOCAL_CROPS * samples, 3, LOCAL, LOCAL, generator=random)
    masks = torch.rand(2 * samples, (GLOBAL // PATCH) ** 2, generator=random) < 0.3
    masks[1::2] = False
    return SimpleNamespace(
        global_crops=crops.pin_memory() if torch.cuda.is_available() else crops,
        local_crops=local.pin_memory() if torch.cuda.is_available() else local,
        masks=masks,
        sample_numbers=torch.arange(samples) + number * samples,
    )
