"""`make gpu`: on a machine with a GPU, check and time what the project computes there.

Needs torch and numpy only. Measures the machine's two ceilings (memory bandwidth, bf16 matrix rate), then what kernels
and training steps reach of them, the float32 block products of the duplicate join against float64, and the embedding
ViTs forward. Every part is a process of its own with a limit: one that crashes, hangs or leaves the device unusable
costs the others nothing, and what it had found stays. Writes benchmarks/results/gpu-DEVICE.json (or to $OUT) after each
part; `python -m benchmarks.gpu blocks training` measures these parts alone. Without a GPU: one sentence, exit code 2.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 450
"""Of all parts; the machine's lease ends a command after ten minutes."""
Part = Callable[[Any, dict[str, Any], Any], Any]
"""(torch, document, median_seconds) -> figures. What it puts under its name meanwhile stays if it is ended."""


def main() -> int:
    """Run everything, or the parts that are named, within the budget and write the figures. Returns an exit code."""
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        sys.stderr.write(f"make gpu: {error}; name a Python that has torch and numpy: make gpu GPU_PYTHON=...\n")
        return 2
    from benchmarks.gpu_augmentation import augmentation
    from benchmarks.gpu_blocks import blocks
    from benchmarks.gpu_curation import curation
    from benchmarks.gpu_losses import losses
    from benchmarks.gpu_training import training_steps

    parts: dict[str, tuple[Part, float]] = {
        "blocks": (blocks, 130),
        "losses": (losses, 70),
        "augmentation": (augmentation, 40),
        "training": (training_steps, 220),
        "block_products": (block_products, 40),
        "curation": (curation, 60),
        "vision_transformer": (vision_transformers, 90),
    }
    asked = sys.argv[1:]
    if unknown := set(asked) - set(parts):
        sys.stderr.write(f"make gpu: no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}\n")
        return 2
    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: torch sees no CUDA device on this machine; nothing was measured\n")
        return 2
    began = time.monotonic()
    document: dict[str, Any] = {"command": "make gpu", "device": torch.cuda.get_device_name(0)}
    document |= {"torch": torch.__version__, "python": platform.python_version(), "failures": []}
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'-'.join(['gpu', *document['device'].lower().split(), *asked])}.json"
    chosen = {name: part for name, part in parts.items() if not asked or name in asked}
    for name, (measure, limit_s) in {"ceilings": (ceilings, 60.0), **chosen}.items():
        left = BUDGET_S - (time.monotonic() - began)
        document[name] = "not measured: out of time"
        if left > 10:
            carry_out(name, measure, document, min(limit_s, left))
        document["seconds"] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(document, indent=1) + "\n")
        if name == "ceilings" and not isinstance(document[name], dict):
            break  # shares of what?
    sys.stdout.write(f"{path.read_text()}{path}\n")
    return 1 if document["failures"] else 0


def carry_out(name: str, measure: Part, document: dict[str, Any], limit_s: float) -> None:
    """document[name] <- what `measure` finds in a process of its own, ended after `limit_s`; failures are added."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        process = multiprocessing.get_context("spawn").Process(
            target=measured_here, args=(name, measure, document | {"failures": [], name: None}, path)
        )
        began = time.monotonic()
        process.start()
        process.join(limit_s)
        with contextlib.suppress(ProcessLookupError):  # compilers it started are of its group
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        found = json.loads(path.read_text()) if path.exists() else {"failures": []}
    document[name] = found.get(name)
    document["failures"] += found["failures"]
    document.setdefault("seconds_of_parts", {})[name] = round(time.monotonic() - began, 1)
    if process.exitcode:
        seconds = round(time.monotonic() - began)
        ended = f"{name}: ended after {seconds} s, exit code {process.exitcode}; what it had found by then is kept"
        document["failures"].append(ended)
        document[name] = ended if document[name] is None else document[name]


def measured_here(name: str, measure: Part, document: dict[str, Any], path: Path) -> None:
    """In a process of its own. What is there is written down every second: whatever happens then, that stays."""
    os.setpgid(0, 0)
    done, lock = threading.Event(), threading.Lock()

    def write() -> None:
        with lock:
            part = path.with_suffix(".part")
            part.write_text(json.dumps({name: document[name], "failures": document["failures"]}))
            part.replace(path)

    def keep_writing() -> None:
        while not done.wait(1):
            with contextlib.suppress(RuntimeError):  # a table that grows meanwhile is written a second later
                write()

    threading.Thread(target=keep_writing, daemon=True).start()
    try:
        import torch

        document[name] = measure(torch, document, median_seconds)
    except Exception as error:  # the parent goes on with the other parts
        failed = f"failed: {type(error).__name__}: {str(error)[:500]}"
        document["failures"].append(f"{name}: {failed}")
        document[name] = failed if document[name] is None else document[name]
    done.set()
    write()
    os._exit(0)  # a device that a kernel left unusable cannot be tidied up either


AHEAD = 8
"""Writings of the buffer before each measured call, about 0.1 ms each on an H100."""
_buffers: list[Any] = []


def median_seconds(torch: Any, run: Callable[[int], Any], repeats: int = 20, ahead: int = AHEAD) -> dict[str, float]:
    """Median and extremes of device time. run(i) uses the i-th of several input sets, so that no cache is timed.

    Before each call the device writes a buffer larger than its cache, `ahead` times: that empties the cache, and the
    host, which is not made to wait, has launched the call when its turn comes. Otherwise a pass of 40 microseconds
    would be timed as long as its launch takes.
    """
    for warm in range(3):
        run(warm)
    if ahead and not _buffers:
        _buffers.append(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    events = []
    for repeat in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(ahead):
            _buffers[0].zero_()
        first.record()
        run(repeat)
        last.record()
        events.append((first, last))
    torch.cuda.synchronize()
    seconds = [first.elapsed_time(last) / 1000 for first, last in events]
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def ceilings(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
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


def block_products(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
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


def vision_transformers(torch: Any, document: dict[str, Any], median_seconds: Any) -> list[dict[str, Any]]:
    """ViT-S/B/L/14 forward at 224 px in bf16, eager and compiled: images/s and share of the matrix ceiling."""
    from training.model.vision_transformer import SIZES, VisionTransformer, VisionTransformerConfig

    rows: list[dict[str, Any]] = []
    document["vision_transformer"] = rows
    for size, batch in (("small", 512), ("base", 256), ("large", 128)):
        torch.manual_seed(0)
        torch._dynamo.reset()  # else the second size is compiled for any batch
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
        rows.append(row)
        for way, forward in (("eager", model), ("compiled", torch.compile(model, dynamic=False))):
            torch.cuda.reset_peak_memory_stats()
            with torch.inference_mode():
                timed = median_seconds(torch, lambda i, forward=forward, images=images: forward(images[i % 3]), 10, 0)
            row[way] = {
                **timed,
                "images_per_s": batch / timed["median_s"],
                "share_of_bf16_ceiling": flop / timed["median_s"] / document["ceilings"]["bf16_flop_per_s"],
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
