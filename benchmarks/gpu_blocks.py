"""The part of `make gpu` for blocks: packed attention, what lies between a block's products, the feed-forward.

Kernels are checked in bfloat16 (and attention in float32) against float64 on fresh inputs into poisoned memory, by the
norm of the difference, and twice for equal bits. Then each is timed eager, compiled and ours, with the share of the
measured bandwidth that the fewest bytes make (each input read once, each output written once), and for attention of
the matrix ceiling. Other cuts of attention than the table's are timed as well: `training.kernels.attention.tiles` is to
be set by them. Needs torch and triton only.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_losses import poisoned, timed

DEVICE = "cuda"
LENGTHS = (37, 41, 50, 54, 197, 201, 257, 261, 1370)
TIMED = (37, 50, 197, 257, 1370)
HEADS, CHANNELS, TOKENS = 16, 64, 32768
RECIPES = {  # crops of 32 images, of which a branch of ViT-L keeps .7
    "ViT-L/14": ((44, 179), (257, 50)),
    "ViT-L/16": ((44, 179), (197, 37)),
}
CLOSE = {"bfloat16": 1e-2, "float32": 5e-5}
"""Relative norms of the difference that pass; float32 goes through the matrix units in three parts (tf32x3)."""
CUTS: dict[int, tuple[tuple[int, int, int, int], ...]] = {  # own rows, others per block, warps, stages
    50: ((64, 64, 2, 1), (64, 64, 8, 1)),
    197: ((64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)),
    257: ((64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2)),
    1370: ((64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 2)),
}
LIMIT_S = 100
"""Other cuts are left out after so many seconds of this part."""


def blocks(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
    """{"checks": relative errors, "attention", "blocks", "passes": rows}."""
    began = time.monotonic()
    found: dict[str, Any] = {"checks": check_attention(torch, document)}
    document["blocks"] = found
    found["checks"] |= check_blocks(torch, document)
    found["passes"] = passes(torch, document, median_seconds)
    found["attention"], found["blocks"] = [], []
    for length in TIMED:
        layout = ((max(TOKENS // length, 1),), (length,))
        found["attention"].append(attention(torch, document, median_seconds, f"length {length}", *layout))
    for name, layout in RECIPES.items():
        found["attention"].append(attention(torch, document, median_seconds, f"crops of {name}", *layout))
    for of in BLOCKS:
        found["blocks"].append(whole_block(torch, document, median_seconds, *of))
    found["cuts"] = []
    for length, cuts in CUTS.items():
        for cut in cuts:
            if time.monotonic() - began < LIMIT_S:
                found["cuts"].append(other_cut(torch, document, median_seconds, length, cut))
    torch.cuda.empty_cache()
    return found


def note(document: dict[str, Any], name: str, pairs: dict[str, tuple[Any, Any]], bound: float) -> dict[str, float]:
    """Relative errors; those beyond the bound, NaN as well, are failures."""
    errors = {}
    for what, (got, exact) in pairs.items():
        errors[what] = float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())
        if not errors[what] < bound:
            document["failures"].append(f"{name}: {what} differs from float64 by {errors[what]:.1e}")
    return errors


def check_attention(torch: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Every length, and two together, with the gradients of q, k and v."""
    from training.kernels.attention import attend_triton, attend_varlen
    from training.model import Layout, attend_per_length

    found = {}
    layouts = [Layout((3,), (length,)) for length in (*LENGTHS, 1, 64, 128)] + [Layout((2, 5), (257, 50))]
    ways = (
        ("triton", attend_triton, torch.bfloat16, layouts),
        ("triton", attend_triton, torch.float32, layouts[-1:]),
        ("varlen", attend_varlen, torch.bfloat16, layouts[-1:]),
    )
    for way, attend, kind, own in ways:
        for layout in own:
            qkv = torch.randn(sum(layout.tokens), 3, HEADS, CHANNELS, device=DEVICE).to(kind).requires_grad_()
            gradient = torch.randn(len(qkv), HEADS, CHANNELS, device=DEVICE).to(kind)
            exact = qkv.detach().double().requires_grad_()
            wanted = attend_per_length(exact, layout)
            (of_exact,) = torch.autograd.grad(wanted, exact, gradient.double())
            named = str(kind).removeprefix("torch.")
            name = f"attention {way} {named} {layout.counts} x {layout.lengths}"
            try:
                runs = []
                for _ in range(2):
                    with poisoned(torch):
                        out = attend(qkv, layout)
                        runs.append((out, *torch.autograd.grad(out, qkv, gradient)))
            except Exception as error:  # another way may run
                found[name] = failed(document, name, error)
                continue
            (out, of_qkv), again = runs
            pairs = {"out": (out, wanted)}
            if max(layout.lengths) > 1:  # one key: its weight is 1, and q and k have no gradient
                pairs |= {"dq": (of_qkv[:, 0], of_exact[:, 0]), "dk": (of_qkv[:, 1], of_exact[:, 1])}
            found[name] = note(document, name, pairs | {"dv": (of_qkv[:, 2], of_exact[:, 2])}, CLOSE[named])
            same = all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
            if way == "triton" and not same:
                document["failures"].append(f"{name}: equal runs gave other bits")
    return found


def failed(document: dict[str, Any], name: str, error: Exception) -> str:
    """What to write in place of figures."""
    document["failures"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    return "failed"


def check_blocks(torch: Any, document: dict[str, Any]) -> dict[str, Any]:
    """A block with dropped sequences, both kinds of feed-forward, with the gradients of input and weights."""
    from training.kernels.branch import compute_triton
    from training.model import Block, VisionTransformerConfig, compute_block

    found = {}
    for width, heads, feed_forward in ((384, 6, "mlp"), (1024, 16, "mlp"), (1536, 24, "swiglu")):
        name = f"block of width {width}, {feed_forward}"
        config = VisionTransformerConfig(width=width, heads=heads, feed_forward=feed_forward, layer_scale=0.3)
        block, layout, kept = Block(config).to(DEVICE).bfloat16(), *crops(torch, 4, 0.3)
        exact = Block(config).to(DEVICE).double()
        exact.load_state_dict(block.state_dict())
        exact.compute, block.compute = compute_block, compute_triton
        x = torch.randn(sum(layout.tokens), width, device=DEVICE).bfloat16().requires_grad_()
        gradient = torch.randn_like(x)
        wide = x.detach().double().requires_grad_()
        wanted = exact(wide, layout, *kept)
        of_exact = torch.autograd.grad(wanted, [wide, *exact.parameters()], gradient.double())
        try:
            runs = []
            for _ in range(2):
                with poisoned(torch):
                    out = block(x, layout, *kept)
                    runs.append((out, *torch.autograd.grad(out, [x, *block.parameters()], gradient)))
        except Exception as error:
            found[name] = failed(document, name, error)
            continue
        names = ["out", "x", *(parameter for parameter, _ in block.named_parameters())]
        pairs = dict(zip(names, zip(runs[0], (wanted, *of_exact), strict=True), strict=True))
        found[name] = note(document, name, pairs, 3e-2)  # several bfloat16 products one behind another
        if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
            document["failures"].append(f"{name}: equal runs gave other bits")
    return found


def crops(torch: Any, samples: int, rate: float) -> tuple[Any, Any]:
    """(layout, kept) of the recipe's crops with 14 pixels per patch."""
    from training.model import Layout
    from training.stochastic_depth import choose_kept

    layout = Layout((2 * samples, 8 * samples), (257, 50))
    kept = choose_kept(layout, [0], group_size=samples, rate=rate, depth=1, seed=0, device=DEVICE)
    return layout, (None, None) if kept is None else kept[0]


def attention(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    name: str,
    counts: tuple[int, ...],
    lengths: tuple[int, ...],
) -> dict[str, Any]:
    """Forward, and forward with backward, four ways."""
    from training.kernels.attention import attend_triton, attend_varlen
    from training.model import Layout, attend_per_length

    layout = Layout(counts, lengths)
    shape = (sum(layout.tokens), 3, HEADS, CHANNELS)
    inputs = [torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)]
    gradient = torch.randn_like(inputs[0][:, 0])
    squares = sum(count * length**2 for count, length in zip(counts, lengths, strict=True))
    flop, moved = 4 * squares * HEADS * CHANNELS, inputs[0].nbytes * 4 // 3
    ceilings, row = document["ceilings"], {"layout": name, "counts": counts, "lengths": lengths, "heads": HEADS}
    row["fewest_bytes"] = {"forward": moved, "both": moved + moved * 7 // 4}
    ways = {"sdpa": attend_per_length, "varlen": attend_varlen, "ours": attend_triton}
    if len(lengths) > 1:  # of one length there is nothing to fuse
        torch._dynamo.reset()
        ways["compiled"] = torch.compile(attend_per_length, dynamic=False)
    for way, attend in ways.items():
        row[way] = {}
        for what, factor in (("forward", 1.0), ("both", 3.5)):

            def step(number: int, attend: Any = attend, what: str = what) -> None:
                qkv = inputs[number % 3]
                if what == "forward":
                    with torch.no_grad():
                        attend(qkv, layout)
                else:
                    torch.autograd.grad(attend(qkv, layout), qkv, gradient)

            row[way][what] = figures = timed(torch, document, median_seconds, step, f"attention {name}, {way} {what}")
            if isinstance(figures, dict):
                rate = factor * flop / figures["median_s"]
                figures["share_of_bandwidth"] = (
                    row["fewest_bytes"][what] / figures["median_s"] / ceilings["bytes_per_s"]
                )
                figures["share_of_bf16_ceiling"] = rate / ceilings["bf16_flop_per_s"]
    return row


def other_cut(
    torch: Any, document: dict[str, Any], median_seconds: Any, length: int, cut: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Our attention cut otherwise than its table says."""
    from training.kernels import attention as module
    from training.model import Layout

    layout, table = Layout((max(TOKENS // length, 1),), (length,)), module.tiles
    qkv = torch.randn(sum(layout.tokens), 3, HEADS, CHANNELS, device=DEVICE).bfloat16().requires_grad_()
    gradient = torch.randn_like(qkv[:, 0])
    module.tiles = lambda *_: module.Tiles(*cut)

    def both(_: int) -> None:
        torch.autograd.grad(module.attend_triton(qkv, layout), qkv, gradient)

    def forward(_: int) -> None:
        with torch.no_grad():
            module.attend_triton(qkv, layout)

    row: dict[str, Any] = {"length": length, "cut": cut}
    try:
        for what, step in (("forward", forward), ("both", both)):
            try:
                row[what] = median_seconds(torch, step, 10)["median_s"]
            except Exception as error:  # a cut that takes too much shared memory: of no consequence
                row[what] = f"{type(error).__name__}"
    finally:
        module.tiles = table
    return row


def passes(torch: Any, document: dict[str, Any], median_seconds: Any) -> list[dict[str, Any]]:
    """The fused passes by themselves: ViT-L's width, 32 images of which .7 are kept; bytes as in docs/kernels.md."""
    from training.kernels import branch, swiglu

    width, (layout, (first, second)) = 1024, crops(torch, 32, 0.3)
    counts, tokens = (list(layout.counts), list(layout.lengths)), sum(layout.tokens)
    kept_tokens, scales = len(first.rows), list(first.scales)

    def numbers(*shape: int) -> list[Any]:
        return [torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3)]

    x, gradients, part, normed = (numbers(n, width) for n in (tokens, tokens, kept_tokens, kept_tokens))
    weight = torch.randn(width, device=DEVICE).bfloat16()
    whole, kept, hidden = (2 * n for n in (tokens * width, kept_tokens * width, kept_tokens * 4096))
    wide, gated, inner = numbers(kept_tokens, 4096), numbers(kept_tokens, 2 * 4096), numbers(kept_tokens, 4096)
    after = (second.places, kept_tokens, *counts)
    steps: dict[str, tuple[int, Callable[[int], Any]]] = {
        "branch begin": (2 * kept, lambda i: branch.begin(x[i % 3], weight, weight, 1e-6, *after)),
        "branch join": (
            2 * whole + 2 * kept,
            lambda i: branch.join(x[i % 3], part[i % 3], first.places, scales, weight, weight, 1e-6, *after),
        ),
        "branch join backward": (
            2 * whole + 3 * kept,
            lambda i: branch.join_backward(
                gradients[i % 3], normed[i % 3], x[i % 3], first.places, scales, kept_tokens, weight, 1e-6,
                second.places, *counts,
            ),
        ),
        "branch end": (
            2 * whole + kept,
            lambda i: branch.end(x[i % 3], part[i % 3], first.places, scales, *counts),
        ),
        "branch gather": (
            2 * kept,
            lambda i: branch.gather(gradients[i % 3], first.places, scales, kept_tokens, *counts),
        ),
        "gelu": (2 * hidden, lambda i: swiglu.activate(wide[i % 3], False)),
        "gelu backward": (4 * hidden, lambda i: swiglu.activate_backward(inner[i % 3], wide[i % 3], False)),
        "swiglu": (3 * hidden, lambda i: swiglu.activate(gated[i % 3], True)),
        "swiglu backward": (6 * hidden, lambda i: swiglu.activate_backward(inner[i % 3], gated[i % 3], True)),
    }  # fmt: skip
    rows = []
    for name, (moved, step) in steps.items():
        figures = timed(torch, document, median_seconds, step, name)
        row = {"pass": name, "bytes": moved, "ours": figures}
        if isinstance(figures, dict):
            row["share_of_bandwidth"] = moved / figures["median_s"] / document["ceilings"]["bytes_per_s"]
        rows.append(row)
    return rows


BLOCKS = (
    (384, 6, "mlp", 128, 0.1),
    (1024, 16, "mlp", 32, 0.3),
    (1536, 24, "swiglu", 16, 0.4),
)


def whole_block(
    torch: Any,
    document: dict[str, Any],
    median_seconds: Any,
    width: int,
    heads: int,
    kind: str,
    samples: int,
    rate: float,
) -> dict[str, Any]:
    """One block forward and backward in its ways, the attention torch's but in the last."""
    from training.kernels.attention import attend_triton
    from training.kernels.branch import compute_triton
    from training.model import Block, VisionTransformerConfig, attend_per_length, compute_block

    layout, kept = crops(torch, samples, rate)
    inputs = [torch.randn(sum(layout.tokens), width, device=DEVICE).bfloat16().requires_grad_() for _ in range(2)]
    gradient = torch.randn_like(inputs[0])
    row: dict[str, Any] = {"width": width, "feed_forward": kind, "images": samples, "drop_path": rate}
    ways = {
        "eager": (compute_block, attend_per_length, False),
        "compiled": (compute_block, attend_per_length, True),
        "ours": (compute_triton, attend_per_length, False),
        "ours, compiled": (compute_triton, attend_per_length, True),
        "ours and our attention, compiled": (compute_triton, attend_triton, True),
    }
    for way, (compute, attend, compiled) in ways.items():
        torch._dynamo.reset()
        block = Block(VisionTransformerConfig(width=width, heads=heads, feed_forward=kind)).to(DEVICE).bfloat16()
        block.compute, block.attn.attend = compute, attend
        if compiled:
            block.compile(dynamic=False)

        def step(number: int, block: Any = block) -> None:
            x = inputs[number % 2]
            torch.autograd.grad(block(x, layout, *kept), [x, *block.parameters()], gradient)

        row[way] = timed(torch, document, median_seconds, step, f"block of width {width}, {way}")
    return row
