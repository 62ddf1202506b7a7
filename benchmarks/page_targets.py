"""The table of targets of docs/performance.md: what was asked for beside what was measured."""

from benchmarks.page_data import KINDS, Results
from benchmarks.page_tables import GIB, MILLION, number, table


def targets(results: Results) -> str:
    """What was asked for beside what was measured."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, asked: str, found: float | None, good: bool, shown: str = "") -> None:
        state = "not measured" if found is None else ("yes" if good else "**no**")
        rows.append((what, asked, "-" if found is None else shown or number(found), state))

    for kind, ratio, exponent in (("hard", 30, 1.7), ("easy", 60, 1.4)):
        run = results.join(kind, MILLION)
        if run is not None:
            low = run["report"]["recall_low"]
            add(f"join, 1 M {kind}: recall, lower end", "≥ 0.99", low, low >= 0.99, f"{low:.4f}")
            found = run["ratio_to_exact"]
            add(f"join, 1 M {kind}: exact's CPU time over ours", f"≥ {ratio}", found, found >= ratio)
            peak = run["peak_bytes"] / GIB
            add(f"join, 1 M {kind}: peak memory, GiB", "≤ 3", peak, peak <= 3)
            rival = results.fastest_rival(kind, MILLION)
            over = rival.cpu_seconds / run["cpu_seconds"] if rival else None
            add(f"join, 1 M {kind}: best FAISS, tuned already, over ours", "≥ 2", over, bool(over and over >= 2))
            over = rival.cpu_seconds / run["cpu_seconds_without_measuring"] if rival else None
            what = f"join, 1 M {kind}: the same, our measuring of recall not counted either"
            add(what, "≥ 2", over, bool(over and over >= 2))
        else:
            add(f"join, 1 M {kind}", "", None, False)
        slope = results.exponent(kind)
        add(f"join, {kind}: exponent 125 k to 1 M", f"≤ {exponent}", slope, bool(slope and slope <= exponent))
    two = next((run for kind in KINDS for run in results.joins(kind) if run["vectors"] == 2 * MILLION), None)
    peak = two["peak_bytes"] / GIB if two else None
    add("join of 2 M completes in 24 GiB, GiB", "≤ 24", peak, bool(peak and peak <= 24))
    parts = results.read("components")
    edges = parts["methods"]["union_find"]["median_edges_per_cpu_second"] / 1e6 if parts else None
    add("components: million edges a CPU second", "≥ 10", edges, bool(edges and edges >= 10))
    kinds = results.read("kmeans")
    for topics in sorted({r["topics"] for r in kinds["results"]}) if kinds else []:
        for own in ("ours-fewer", "ours"):
            found = next(
                (
                    r
                    for r in kinds["ratios"]
                    if (r["topics"], r["of"], r["over"]) == (topics, own, "faiss-afk-mc2") and r["objective"]
                ),
                None,
            )
            if found:
                name = (
                    f"k-means, {topics} topics, {own.replace('ours', 'our steps').replace('-fewer', ', seven tenths')}"
                )
                good = found["objective"] < 1 and found["cpu_seconds"] <= 1
                shown = f"{found['objective']:.4f}, {found['cpu_seconds']:.2f}"
                add(f"{name}: objective and CPU time over FAISS's (AFK-MC2)", "< 1, ≤ 1", 1.0, good, shown)
    tree = results.read("hierarchy")
    if tree:
        more = tree["over_the_transcription"]["ours"]
        spread = tree["results"]["transcription"]["standard_deviation"] or 0.0
        add(
            f"hierarchy, {tree['seeds_done']} of {tree['arguments']['seeds']} seeds: effective concepts more than "
            "the transcription's",
            f"≥ -{spread:.1f} (its spread)",
            1.0,
            more["effective_concepts_more"] >= -spread,
            f"{more['effective_concepts_more']:+.1f}",
        )
        share = more["cpu_seconds_ratio"]
        add("hierarchy: share of its CPU time", "≤ 0.1", share, share <= 0.1)
    found = next((d for d in results.retrievals() if d["arguments"]["vectors"] == MILLION), None)
    own = found["methods"]["curate retrieve"] if found else None
    add("retrieval, 1 M: recall@4", "≥ 0.99", own and own["recall"], bool(own and own["recall"] >= 0.99))
    share = own["share_of_exact"] if own else None
    add("retrieval, 1 M: share of exact's CPU time", "≤ 0.1", share, bool(share and share <= 0.1))
    for name, document in results.named("add-*"):
        share = document["added_over_from_nothing_cpu"]
        add(f"adding 5 % ({name}): share of the join's CPU time", "≤ 0.2", share, share <= 0.2)
    whole = results.read("curate-add")
    share = None
    if (
        whole and "cpu_by_stage" in whole["add"]
    ):  # asked for from download to manifest: the report, which is made anew, is not of it
        added, run = (whole[w]["cpu_seconds"] - whole[w]["cpu_by_stage"]["report"] for w in ("add", "run"))
        share = added / run
    what = f"`curate add` of 5 %, {whole['urls']:,} URLs in all" if whole else "`curate add` of 5 %"
    add(f"{what}, download to manifest: share of the run's CPU time", "< 0.1", share, bool(share and share < 0.1))
    checks = (results.read("plan-calibration") or {}).get("checks", [])
    for row in (row for row in checks if "told" not in row["stage"]):
        add(
            f"plan, {row['stage']} at {row['vectors'] / 1e6:.0f} M: error of the prediction",
            "within 30 %",
            1.0,
            row["within_30_percent"],
            f"{row['error']:+.0%}",
        )
    return table(("what", "asked", "measured", "reached"), rows)
