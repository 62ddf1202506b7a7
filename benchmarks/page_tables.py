"""The tables of docs/performance.md; each function gives Markdown, or nothing where there are no results."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.page_data import KINDS, Results
from pipelines import configuration, costs, plan
from pipelines.hardware import CLUSTERS

GIB = 2**30
MILLION = 1_000_000
PAPER_IMAGES = 1_200_000_000


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [" | ".join(heads), " | ".join(["---", *["---:"] * (len(heads) - 1)])]
    body = [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in [*lines, *body]) if body else ""


def number(value: float | None, digits: int = 3) -> str:
    """Three digits that count, with commas."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value < 100 else f"{value:.0f}"


def linked(names: Iterable[str]) -> str:
    shown = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in names)
    return f"\n\nFrom {shown}."


def machine(results: Results) -> str:
    known = results.read("plan-calibration") or next((d for _, d in results.named("join-*")), None)
    if known is None:
        return ""
    facts, versions = known["machine"], known["versions"]
    kernels = sorted({str(lib["architecture"]) for lib in facts["libraries"] if lib.get("architecture")})
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_bytes'] / GIB:.0f} GiB, BLAS kernels "
        f"{', '.join(kernels)}; Python {versions['python']}, numpy {versions['numpy']}, numba {versions['numba']}, "
        f"faiss-cpu {versions['faiss-cpu']}. One thread."
    )


# ---- the join --------------------------------------------------------------------------------------------------------


def join(results: Results) -> str:
    rows, names = [], []
    for kind in KINDS:
        for run in results.joins(kind):
            report = run["report"]
            names.append(f"join-{kind}-{run['vectors']}")
            rows.append(
                (
                    f"{kind}, {run['vectors']:,}",
                    number(run["cpu_seconds"]),
                    number(run["cpu_seconds_without_measuring"]),
                    number(run["exact_cpu_seconds"]),
                    f"1/{run['ratio_to_exact']:.0f}",
                    f"{report['recall']:.4f} ({report['recall_low']:.4f}-{report['recall_high']:.4f})",
                    f"{report['share_compared']:.2%}",
                    f"{run['peak_bytes'] / GIB:.2f}",
                )
            )
    heads = (
        "vectors", "CPU s", "without measuring recall", "exact, extrapolated", "share", "recall above 0.6 (95 %)",
        "rows a vector meets", "peak GiB",
    )  # fmt: skip
    text = table(heads, rows)
    slopes = [f"{slope:.2f} ({kind})" for kind in KINDS if (slope := results.exponent(kind)) is not None]
    if slopes:
        text += f"\n\nExponent of CPU seconds against vectors between 125,000 and 1,000,000: {', '.join(slopes)}."
    return text + linked(names) if rows else ""


STEPS = {
    "store_piece": "read, store, sketch",
    "store_sketched": "read, store, sketch",  # its name before the join's revision 3
    "train_cells": "train cells",
    "search_queries": "measure recall",
    "assign_piece": "assign to cells",
    "join_cells": "compare sketches, verify, forests",
    "driver": "driver",
}


def join_steps(results: Results) -> str:
    runs = [(kind, run) for kind in KINDS for run in results.joins(kind)]
    spent = [{STEPS.get(step, step): s for step, s in run["cpu_seconds_by_step"].items()} for _, run in runs]
    steps = dict.fromkeys(step for seconds in spent for step in seconds)
    rows = [(step, *(number(seconds.get(step)) for seconds in spent)) for step in steps]
    return table(("CPU seconds of", *(f"{kind} {run['vectors']:,}" for kind, run in runs)), rows) if runs else ""


def rivals(results: Results) -> str:
    rows = []
    sizes = sorted({(rival.kind, rival.vectors) for rival in results.rivals()}, key=lambda s: (s[1], s[0] != "hard"))
    for kind, vectors in sizes:
        run = results.join(kind, vectors)
        own = run["cpu_seconds"] if run else None
        bare = run["cpu_seconds_without_measuring"] if run else None
        if own and bare:
            recall, peak = f"{run['report']['recall']:.4f}", f"{run['peak_bytes'] / GIB:.2f}"
            rows.append((f"**ours**, {kind}, {vectors:,}", number(own), "1", f"{own / bare:.2f}", recall, peak))
        for rival in results.best_rivals(kind, vectors):
            recall = "1" if rival.method == "exact" else f"{rival.recall:.4f}" if rival.recall is not None else "-"
            rows.append(
                (
                    f"{rival.name}, {kind}, {vectors:,}" + (" (extrapolated)" if rival.extrapolated else ""),
                    number(rival.cpu_seconds),
                    f"{rival.cpu_seconds / own:.2f}" if own else "-",
                    f"{rival.cpu_seconds / bare:.2f}" if bare else "-",
                    recall,
                    f"{rival.peak_bytes / GIB:.2f}",
                )
            )
    names = [name for name, _ in results.named("rivals-*")]
    text = table(
        ("method, vectors", "CPU s", "over ours", "over ours without measuring", "recall above 0.6", "peak GiB"), rows
    )
    return text + linked(names) if text else ""


def add(results: Results) -> str:
    rows = []
    for name, document in results.named("add-*"):
        asked = document["arguments"]
        rows.append(
            (
                f"{asked['new']:.0%} of {asked['count']:,} {asked['kind']} ({name})",
                number(document["joins"]["added"]["cpu_seconds"]),
                f"{document['added_over_from_nothing_cpu']:.2f}",
                f"{document['added_over_all_in_the_same_cells_cpu']:.2f}",
                "yes" if document["equal_components_as_all_in_the_same_cells"] else "no",
                f"{document['agreement_with_from_nothing']['share']:.4f}",
            )
        )
    heads = (
        "new images", "CPU s", "over a join from nothing", "over all in the same cells", "components equal",
        "images in equal components, from nothing",
    )  # fmt: skip
    return table(heads, rows) + linked(n for n, _ in results.named("add-*")) if rows else ""


def add_stages(results: Results) -> str:
    """`curate add` beside the run that it adds to, by stage."""
    document = results.read("curate-add")
    if document is None or "cpu_by_stage" not in document["add"]:
        return ""
    run, added = (document[which]["cpu_by_stage"] for which in ("run", "add"))
    images = document["new"] / (document["urls"] - document["new"])
    rows = [
        (stage, number(run.get(stage, 0.0)), number(images * run.get(stage, 0.0)), number(added.get(stage, 0.0)))
        for stage in dict.fromkeys([*run, *added])
    ]
    whole = document["run"]["cpu_seconds"], document["add"]["cpu_seconds"]
    rows.append(("all", number(whole[0]), number(images * whole[0]), number(whole[1])))
    heads = (
        "CPU s, by stage", f"run of {document['urls'] - document['new']:,} URLs", "its share for as many as are new",
        f"`curate add` of {document['new']:,}",
    )  # fmt: skip
    return table(heads, rows) + linked(["curate-add"])


def components(results: Results) -> str:
    document = results.read("components")
    if document is None:
        return ""
    rows = [
        (name.replace("_", "-"), number(method["median_edges_per_cpu_second"] / 1e6),
         f"{method['runs'][0]['state_bytes_per_node']:.0f}")
        for name, method in document["methods"].items()
    ]  # fmt: skip
    return table(("components by", "million edges a CPU second", "bytes a node"), rows) + linked(["components"])


def driver(results: Results) -> str:
    document = results.read("dedup_driver")
    if document is None:
        return ""
    found, images = document["driver"], document["arguments"]["images"]
    return (
        f"The driver of `dedup` took {found['driver_cpu_seconds']:.0f} CPU seconds for {images:,} images with a made "
        f"forest, {found['anonymous_bytes_per_image']} bytes an image that it must have and "
        f"{found['file_bytes_per_image']} of file pages." + linked(["dedup_driver"])
    )


# ---- clusters, retrieval, images -------------------------------------------------------------------------------------


def kmeans(results: Results) -> str:
    document = results.read("kmeans")
    if document is None:
        return ""
    rows = [
        (f"{r['method']}, {r['topics']} topics, seed {r['seed']}", number(r["cpu_seconds"]), f"{r['objective']:.4f}")
        for r in sorted(document["results"], key=lambda r: (r["topics"], r["seed"], r["objective"]))
    ]
    asked = document["arguments"]
    text = (
        f"{asked['vectors']:,} x {asked['dimension']}, k = {asked['clusters']:,}, {asked['iterations']} iterations "
        f"(ours-fewer: {7 * asked['iterations'] // 10}).\n\n"
    )
    return text + table(("method", "CPU s", "mean squared distance"), rows) + linked(["kmeans"])


def hierarchy(results: Results) -> str:
    document = results.read("hierarchy")
    if document is None:
        return ""
    rows = []
    for name, found in document["results"].items():
        spread = found["standard_deviation"]
        rows.append(
            (
                name,
                f"{found['mean']:.1f}" + (f" ± {spread:.1f}" if spread is not None else ""),
                number(found["cpu_seconds_mean"]),
            )
        )
    asked = document["arguments"]
    text = (
        f"{asked['vectors']:,} x {asked['dimension']}, {asked['concepts']} concepts of Zipf sizes, levels "
        f"{asked['levels']}, {asked['target']:,} images taken, {document['seeds_done']} seeds; the pool itself "
        f"has {document['pool_effective_concepts']} effective concepts.\n\n"
    )
    return text + table(("method", "effective concepts", "CPU s"), rows) + linked(["hierarchy"])


def retrieve(results: Results) -> str:
    rows = []
    for document in results.retrievals():
        asked = document["arguments"]
        for name, method in document["methods"].items():
            if "cpu_seconds" in method:
                rows.append(
                    (
                        f"{name}, {asked['seeds']:,} seeds in {asked['vectors']:,}",
                        number(method["cpu_seconds"]),
                        f"{method['share_of_exact']:.3f}" if "share_of_exact" in method else "1 (extrapolated)",
                        f"{method['recall']:.4f}" if "recall" in method else "1",
                        f"{method['peak_bytes'] / GIB:.2f}" if "peak_bytes" in method else "-",
                    )
                )
    names = [name for name, document in results.named("retrieve*") if "methods" in document]
    heads = ("method", "CPU s", "share of exact", "recall@N", "peak GiB")
    return table(heads, rows) + linked(names) + _profile(results.retrievals()) if rows else ""


def _profile(retrievals: list[dict[str, Any]]) -> str:
    """Where the time of the largest pool goes."""
    whole = max(retrievals, key=lambda document: document["arguments"]["vectors"])
    ours, exact = whole["methods"]["curate retrieve"], whole["methods"]["exact"]["cpu_seconds"]
    if "parts" not in ours:
        return ""
    parts = dict(sorted(ours["parts"].items(), key=lambda part: -part[1]))
    parts["everything else: training of cells and levels, tables, imports"] = ours["cpu_seconds"] - sum(parts.values())
    rows = [(name, f"{seconds:.2f}", f"{seconds / exact:.3f}") for name, seconds in parts.items()]
    text = f"\n\nWhere its time goes in {whole['arguments']['vectors']:,} images:\n\n"
    return text + table(("part", "CPU s", "share of exact"), rows)


def images(results: Results) -> str:
    document = results.read("image_rivals")
    if document is None:
        return ""
    rows: list[tuple[object, ...]] = []
    for name, tool in document.items():
        if not isinstance(tool, dict) or ("found" not in tool and "error" not in tool):
            continue
        if "error" in tool:
            rows.append((name, "-", "-", "-", "-", tool["error"]))
        for setting, found in tool.get("found", {}).items():
            rows.append(
                (
                    f"{name}, {setting}",
                    f"{found['recall']:.3f}",
                    f"{found['precision']:.3f}",
                    f"{found['recall_of_components']:.3f}",
                    f"{found['precision_of_components']:.3f}",
                    f"{found['largest_component']:,}",
                )
            )
    text = f"{document['images']:,} images of the demo, {document['true_pairs']} planted pairs of copies.\n\n"
    heads = ("tool, setting", "pair recall", "precision", "recall of components", "their precision", "largest")
    return text + table(heads, rows) + linked(["image_rivals"])


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_checks(results: Results) -> str:
    document = results.read("plan-calibration")
    if document is None:
        return ""
    rows = [
        (
            f"{row['stage']}, {row['vectors']:,}",
            number(row["predicted_cpu_seconds"]),
            number(row["measured_cpu_seconds"]),
            f"{row['error']:+.0%}",
            "yes" if row["within_30_percent"] else "**no**",
            row["runs"],
        )
        for row in document.get("checks", [])
    ]
    heads = ("stage, rows", "predicted CPU s", "measured CPU s", "error", "within 30 %", "runs measured")
    return table(heads, rows) + linked(["plan-calibration"]) if rows else ""


def rates(results: Results) -> str:
    document = results.read("plan-calibration")
    if document is None:
        return ""
    every = document["rates_nanoseconds"] | document["facts"]
    from pipelines.hardware import MEASURED

    return table(
        ("rate", "value", "unit"),
        [(f"`{name}`", number(v), MEASURED.get(name, (0, ""))[1]) for name, v in every.items()],
    )


def billion(results: Results) -> str:
    """The join of 1.2 billion images with its arithmetic, and the whole of configs/lvd142m.yaml."""
    if results.read("plan-calibration") is None:
        return ""
    cluster = CLUSTERS["v100x160"]
    memory = 16 << 30
    parts = []
    for kind in KINDS:
        terms = costs.join(PAPER_IMAGES, 512, memory, kind)
        rows = [
            (t.step, t.formula, f"{t.units:.2e}", number(t.seconds() / t.units * 1e9), f"{t.seconds():.2e}")
            for t in terms
        ]
        total = costs.seconds(terms)
        rows.append(
            (f"all, {kind}", f"/ {cluster.cores} cores = {total / cluster.cores / 3600:.1f} h", "", "", f"{total:.2e}")
        )
        parts.append(table((f"join of n = {PAPER_IMAGES:,}, {kind}", "units", "number", "ns each", "CPU s"), rows))
    planned = plan.plan(configuration.load("configs/lvd142m.yaml"), cluster)
    rows_of: list[tuple[Any, ...]] = [
        (s.stage, f"{s.rows_in:,}", f"{s.cpu_seconds:.1e}" if s.cpu_seconds else "-",
         f"{s.flop:.1e}" if s.flop else "-", f"{s.hours:.2g}", s.bound)
        for s in planned.stages
    ]  # fmt: skip
    rows_of.append(("all", "", "", "", f"{planned.hours:,.0f}", ""))
    parts.append(
        f"`configs/lvd142m.yaml` (1.3 billion images as listed) on {cluster.describe()}:\n\n"
        + table(("stage", "rows in", "CPU s", "FLOP of models and exact products", "hours", "bound by"), rows_of)
    )
    return "\n\n".join(parts)
