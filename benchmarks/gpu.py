"""`make gpu`: on a machine with a GPU, check and time what the project computes there.

Needs torch and numpy only. Measures the machine's two ceilings (memory bandwidth, bf16 matrix rate), then
the float32 block products of the duplicate join against float64, the embedding ViTs forward and whole training steps,
eager and compiled, as shares of those ceilings. Writes benchmarks/results/gpu-DEVICE.json (or to $OUT); `python -m
benchmarks.gpu blocks training` measures these parts alone. Without a GPU: one sentence, exit code 2.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_augmentation import augmentation
from benchmarks.gpu_blocks import blocks
from benchmarks.gpu_losses import losses
from benchmarks.gpu_training import training_steps

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 480


def main() -> int:
    """Run everything, or the parts that are named, within the budget and write the figures. Returns an exit code."""
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: torch sees no CUDA device on this machine; nothing was measured\n")
        return 2
    began = time.monotonic()
    device = torch.cuda.get_device_name(0)
    document: dict[str, Any] = {
        "command": "make gpu",
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ceilings": ceilings(torch),
        "failures": [],
    }
    parts = (
        ("block_products", block_products),
        ("vision_transformer", vision_transformers),
        ("blocks", lambda torch, document: blocks(torch, document, median_seconds)),
        ("losses", lambda torch, document: losses(torch, document, median_seconds)),
        ("augmentation", lambda torch, document: augmentation(torch, document, median_seconds)),
        ("training", lambda torch, document: training_steps(torch, document, median_seconds)),
    )
    asked = sys.argv[1:]
    for name, measure in parts:
        if asked and name not in asked:
            continue
        if time.monotonic() - began > BUDGET_S:
            document[name] = "not measured: out of time"
            continue
        try:
            document[name] = measure(torch, document)
        except Exception as error:  # the other parts are worth having
            document[name] = f"failed: {type(error).__name__}: {str(error)[:500]}"
            document["failures"].append(f"{name}: {document[name]}")
        torch.cuda.empty_cache()
    document["seconds"] = round(time.monotonic() - began, 1)
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'-'.join(['gpu', *device.lower().split(), *asked])}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document, indent=1) + f"\n{path}\n")
    return 1 if document["failures"] else 0


def median_seconds(torch: Any, run: Callable[[int], Any], repeats: int = 20) -> dict[str, float]:
    """Median and extremes of device time. run(i) uses the i-th of several input sets, so that no cache is timed."""
    for warm in range(3):
        run(warm)
    torch.cuda.synchronize()
    seconds = []
    for repeat in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run(repeat)
        last.record()
        torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) / 1000)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def ceilings(torch: Any) -> dict[str, Any]:
    """Bytes per second of a large copy (read plus written) and FLOP/s of a large bf16 and fp32 product."""
    buffers = [torch.randn(1 << 28, device="cuda") for _ in range(3)]
    copied = median_seconds(torch, lambda i, buffers=buffers: buffers[i % 2].copy_(buffers[2]))
    found: dict[str, Any] = {"bytes_per_s": 2 * buffers[0].nbytes / copied["median_s"]}
    del buffers
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        side = 8192
        left = [torch.randn(side, side, device="cuda", dtype=kind) for _ in range(3)]
        timed = median_seconds(torch, lambda i, left=left: left[i % 3] @ left[(i + 1) % 3])
        found[f"{name}_flop_per_s"] = 2 * side**3 / timed["median_s"]
    return found


def block_products(torch: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Nominated pairs of 32,768 x 512 unit vectors above 0.6, against float64: none may be missing."""
    rows, dimension, threshold = 32768, 512, 0.6
    torch.backends.cuda.matmul.allow_tf32 = False
    base = torch.randn(rows, dimension, device="cuda", dtype=torch.float64)
    kin = torch.randint(rows, (rows // 4,), device="cuda")
    noise = torch.rand(rows // 4, 1, device="cuda", dtype=torch.float64) * 1.4
    base[: rows // 4] = base[kin] + noise * base[: rows // 4]
    stored = torch.nn.functional.normalize(base, dim=1).half()
    exact = stored.double() @ stored.double().T
    wanted = torch.triu(exact > threshold, diagonal=1)
    bound = threshold - (4 * dimension * 2.0**-24 + 1e-6)
    wide = stored.float()
    product = torch.full((rows, rows), float("nan"), device="cuda")
    torch.matmul(wide, wide.T, out=product)
    missing = int((wanted & ~(product > bound)).sum())
    error = float((product.double() - exact).norm() / exact.norm())
    if missing or not error < 1e-5:
        document["failures"].append(f"block products: {missing} pairs missing, relative error {error:.2e}")
    del exact
    sets = [torch.nn.functional.normalize(torch.randn(rows, dimension, device="cuda"), dim=1) for _ in range(3)]
    timed = median_seconds(torch, lambda i: torch.matmul(sets[i % 3], sets[i % 3].T, out=product))
    rate = 2 * rows * rows * dimension / timed["median_s"]
    return {
        "pairs": int(wanted.sum()),
        "missing": missing,
        "relative_error": error,
        **timed,
        "share_of_fp32_ceiling": rate / document["ceilings"]["fp32_flop_per_s"],
    }


def vision_transformers(torch: Any, document: dict[str, Any]) -> list[dict[str, Any]]:
    """ViT-S/B/L/14 forward at 224 px in bf16, eager and compiled: images/s and share of the matrix ceiling."""
    from training.model.vision_transformer import SIZES, VisionTransformer, VisionTransformerConfig

    rows = []
    for size, batch in (("small", 512), ("base", 256), ("large", 128)):
        torch.manual_seed(0)
        model = VisionTransformer(VisionTransformerConfig(**SIZES[size])).cuda().eval().requires_grad_(False)
        check = torch.rand(4, 3, 224, 224, device="cuda")
        reference = model.double()(check.double())
        model = model.to(torch.bfloat16)
        error = float((model(check.bfloat16()).double() - reference).norm() / reference.norm())
        if not error < 5e-2:
            document["failures"].append(f"ViT-{size}: bf16 differs from float64 by {error:.2e}")
        images = [torch.rand(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        parameters = sum(p.numel() for name, p in model.named_parameters() if "blocks" in name)
        tokens, width, depth = 257, model.config.width, model.config.depth
        flop = batch * (2 * parameters * tokens + 4 * depth * tokens * tokens * width)
        row: dict[str, Any] = {"model": f"ViT-{size}/14", "batch": batch, "relative_error": error}
        for way, forward in (("eager", model), ("compiled", torch.compile(model))):
            torch.cuda.reset_peak_memory_stats()
            with torch.inference_mode():
                timed = median_seconds(torch, lambda i, forward=forward, images=images: forward(images[i % 3]), 10)
            row[way] = {
                **timed,
                "images_per_s": batch / timed["median_s"],
                "share_of_bf16_ceiling": flop / timed["median_s"] / document["ceilings"]["bf16_flop_per_s"],
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
