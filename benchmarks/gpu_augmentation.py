"""The part of `make gpu` for crops that the device finishes: colours, blur, solarisation, normalisation.

The kernel is held to plain torch on the CPU, which tests hold to the CPU's own path: levels equal but where a crop is
blurred or a hue turned, and there at most one apart in a share of pixels. Timed for the crops of 64 images, plain torch
and ours; the floor is a byte read and four written per value. Needs torch and triton only.
"""

from typing import Any

from benchmarks.gpu_losses import poisoned

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES, SIZES = 64, ((2, 224), (8, 98))
MOST_APART = 0.01
"""Share of values that may be a level apart."""


def augmentation(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
    """{"checks": ..., "timings": ...}."""
    from training import finishing
    from training.kernels import augmentation as kernel

    checks = []
    for size in (224, 98, 37):
        crops, drawn = made(torch, 96, size)
        wanted = finishing.finish(crops.cpu(), drawn, (0.0,) * 3, (1 / 255,) * 3)
        with poisoned(torch):
            got = kernel.finish(crops, drawn, (0.0,) * 3, (1 / 255,) * 3).cpu()
        solarised = drawn[:, finishing.SOLARISE_AT].view(-1, 1, 1, 1) > 0
        difference = (got - wanted).abs()
        # A level more or less at 128 is another side of solarisation.
        difference = torch.where(solarised, torch.minimum(difference, (got - 255 + wanted).abs()), difference)
        apart = float((difference > 1e-3).float().mean())
        found = {"size": size, "most_levels_apart": float(difference.max()), "share_apart": apart}
        if not (found["most_levels_apart"] < 1.01 and apart < MOST_APART):
            document["failures"].append(f"augmentation of {size} pixels: {found}")
        checks.append(found)
    sets = [[made(torch, IMAGES * count, size) for count, size in SIZES] for _ in range(3)]
    values = sum(crops.numel() for crops, _ in sets[0])
    timings: dict[str, Any] = {"images": IMAGES}
    for way, finish in (("eager", finishing.finish), ("ours", kernel.finish)):

        def run(number: int, finish: Any = finish) -> Any:
            return [finish(crops, drawn, MEAN, STD) for crops, drawn in sets[number % 3]]

        timings[way] = median_seconds(torch, run)
        rate = 5 * values / timings[way]["median_s"]
        timings[way]["share_of_bandwidth"] = rate / document["ceilings"]["bytes_per_s"]
    return {"checks": checks, "timings": timings}


def made(torch: Any, count: int, size: int) -> tuple[Any, Any]:
    """(crops on the device, drawn numbers on the CPU) with the recipe's probabilities."""
    from training import finishing

    drawn = torch.zeros(count, finishing.NUMBERS)
    drawn[:, : finishing.OPERATIONS] = -1
    reach = torch.tensor((0.4, 0.4, 0.2, 0.1))
    for crop in range(count):
        if torch.rand(()) < 0.8:
            order = torch.randperm(finishing.OPERATIONS)
            factors = 1 + reach * (2 * torch.rand(finishing.OPERATIONS) - 1)
            factors[finishing.HUE] -= 1
            drawn[crop, : finishing.OPERATIONS] = order.float()
            drawn[crop, finishing.OPERATIONS : finishing.GREY_AT] = factors[order]
    drawn[:, finishing.GREY_AT] = (torch.rand(count) < 0.2).float()
    drawn[:, finishing.SIGMA_AT] = (torch.rand(count) < 0.5) * (0.1 + 1.9 * torch.rand(count))
    drawn[:, finishing.SOLARISE_AT] = (torch.rand(count) < 0.1).float()
    # Smooth in places, as photographs are.
    small = torch.rand(count, 3, 8, 8, device="cuda")
    crops = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear") * 300 - 20
    crops += 10 * torch.randn(count, 3, size, size, device="cuda")
    return crops.clamp(0, 255).to(torch.uint8), drawn
