"""The first page: the figures in large letters, and what a reader should look at before anything else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from curation.audit.run_tables import RunTables
from curation.audit.scans import first_rows, open_parts, stream, with_hash
from curation.audit.sections import Section
from curation.hidden import is_hidden

COMPONENT_SHARE = 0.01
"""A component that holds more of the pool is worth a look."""
FAILED_SHARE, TRANSIENT_SHARE, HOST_SHARE = 0.10, 0.01, 0.5
"""Of the rows listed: not fetched, and not fetched for now; of the rows of a host with at least HOST_ROWS: lost."""
HOST_ROWS = 100
REMOVED_SHARE = 0.05
"""Of the distinct images, removed for the evaluation sets."""
FAR_SHARE = 0.5
"""Members of a component that are not above the threshold to the image that stays."""
CLUSTER_SHARE = 0.1
PLANNED_SHARE, UNIQUE_SHARE = 0.8, 0.5
"""Of what a seed set was to bring, what it brought; of its retrievals, distinct images."""
UNSAFE = 0.5
"""NSFW score above which a thumbnail is blurred until asked for, and an image of the manifest is counted."""


@dataclass(frozen=True)
class Finding:
    """level: warning (look before you train) or notice. page: where to look."""

    level: str
    words: str
    detail: str
    page: str


def warnings(
    run: RunTables,
    counts: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    shown: Mapping[str, Section | None],
) -> list[Finding]:
    """What stands out, warnings first, in the order of the pages. counts: of `run_counts`, card: of the manifest."""
    found = [*findings(counts, shown), *_manifest(run, card), *unlicensed(run.sources)]
    return sorted(found, key=lambda w: w.level != "warning")


def findings(counts: Mapping[str, Any], shown: Mapping[str, Section | None]) -> list[Finding]:
    """What stands out in the stages before the manifest, in the order of the pages; see `warnings`.

    Of counts: `fetched`, `dedup` (rows of images) and `funnel`. Of each section, the figures alone.
    """
    return [
        *_failures(counts, shown.get("failures")),
        *_duplicates(counts, shown.get("duplicates")),
        *_decontamination(counts, shown.get("decontamination")),
        *_clusters(shown.get("clusters")),
        *_retrieval(shown.get("retrieval")),
    ]


def _failures(counts: Mapping[str, Any], section: Section | None) -> list[Finding]:
    if not section:
        return []
    listed = sum(r["images"] for r in counts["fetched"])
    failed = sum(r["images"] for r in section["reasons"] if r["status"] in ("failed", "transient"))
    transient = sum(r["images"] for r in section["reasons"] if r["status"] == "transient")
    found = []
    if listed and failed > FAILED_SHARE * listed:
        words = f"{failed / listed:.1%} of the rows listed could not be fetched or decoded ({failed:,})"
        found.append(
            Finding("warning", words, "Look at the reasons: one host or one kind of file may be behind it.", "failures")
        )
    if listed and transient > TRANSIENT_SHARE * listed:
        words = f"{transient:,} rows failed for now only ({transient / listed:.1%})"
        found.append(Finding("warning", words, "`curate download --retry` may bring them.", "failures"))
    bad = [h for h in section["hosts"] if h["rows"] >= HOST_ROWS and h["images"] > HOST_SHARE * h["rows"]]
    if bad:
        worst = bad[0]
        words = f"{len(bad)} of the hosts that lost most lost over half of their rows"
        detail = f"{worst['host']}: {worst['images']:,} of {worst['rows']:,} rows."
        found.append(Finding("notice", words, detail, "failures"))
    return found


def _duplicates(counts: Mapping[str, Any], section: Section | None) -> list[Finding]:
    if not section:
        return []
    found = []
    pool = next((s["images"] for s in counts["funnel"].get("pool", []) if s["step"] == "through the filters"), 0)
    pool = pool or sum(r["images"] for r in section["reasons"])
    if pool and section["largest"] > COMPONENT_SHARE * pool:
        words = f"One component holds {section['largest'] / pool:.1%} of the pool ({section['largest']:,} images)"
        detail = "Pairs above the threshold can chain images that are no copies: look at its least similar pair."
        found.append(Finding("warning", words, detail, "duplicates"))
    recall = section["recall"]
    if recall and not recall["exact"] and recall["asked"] is not None:
        if recall["value"] < recall["asked"]:
            words = f"The join found {recall['value']:.2%} of the pairs, below the {recall['asked']:.0%} asked for"
            found.append(Finding("warning", words, "Copies are left in the pool: ask for more recall.", "duplicates"))
        elif recall["low"] is not None and recall["low"] < recall["asked"]:
            words = f"The recall of the join is {recall['value']:.2%}, but its interval begins at {recall['low']:.2%}"
            found.append(Finding("notice", words, f"{recall['asked']:.0%} was asked for.", "duplicates"))
    far = [c for c in section["shown"] if c["far"] is not None and c["far"] > FAR_SHARE]
    if far:
        words = f"In {len(far)} of the largest components most members are not similar to the image that stays"
        worst = max(far, key=lambda c: c["images"])
        detail = f"{worst['far']:.0%} of {worst['images']:,} in the largest of them: they hang together by chains."
        found.append(Finding("warning", words, detail, "duplicates"))
    return found


def _decontamination(counts: Mapping[str, Any], section: Section | None) -> list[Finding]:
    if not section:
        return []
    found = []
    distinct = section["dropped"] + sum(r["images"] for r in counts["dedup"] or [] if r["kept"])
    if distinct and section["dropped"] > REMOVED_SHARE * distinct:
        share = section["dropped"] / distinct
        words = f"The evaluation sets took {share:.1%} of the distinct images ({section['dropped']:,})"
        found.append(
            Finding("warning", words, "Look at the weakest matches: is the threshold right?", "decontamination")
        )
    if section["chains"] > section["direct"]:
        words = f"{section['chains']:,} images went by chains, more than the {section['direct']:,} that match directly"
        found.append(
            Finding("warning", words, "`dedup.drop: direct` drops the direct matches alone.", "decontamination")
        )
    largest = section["largest"]
    if largest and section["dropped"] and largest["images"] > max(20, 0.5 * section["dropped"]):
        words = f"One component is {largest['images'] / section['dropped']:.0%} of what the evaluation sets took"
        found.append(Finding("notice", words, f"{largest['images']:,} images, dropped whole.", "decontamination"))
    return found


def _clusters(section: Section | None) -> list[Finding]:
    if not section or not section["levels"]:
        return []
    leaf = section["levels"][0]
    if leaf["clusters"] > 1 / CLUSTER_SHARE and leaf["share"] > CLUSTER_SHARE:
        words = f"One leaf cluster holds {leaf['share']:.1%} of the clustered images ({leaf['largest']:,.0f})"
        return [Finding("warning", words, "Balance draws from it as from any other leaf.", "clusters")]
    return []


def _retrieval(section: Section | None) -> list[Finding]:
    found = []
    for row in section["rows"] if section else []:
        page = row["href"].removesuffix(".html") if row["href"] else "retrieval"
        if row["planned"] and row["nominal"] < PLANNED_SHARE * row["planned"]:
            words = f"Seed set {row['seed_set']} brought {row['nominal'] / row['planned']:.0%} of what was planned"
            found.append(Finding("notice", words, f"{row['nominal']:,} of {row['planned']:,} retrievals.", page))
        if row["nominal"] and row["unique"] < UNIQUE_SHARE * row["nominal"]:
            words = (
                f"Seeds of {row['seed_set']} draw the same images: {row['unique']:,} of {row['nominal']:,} are distinct"
            )
            found.append(Finding("notice", words, "The pool may hold little of its kind.", page))
    return found[:20]


def _manifest(run: RunTables, card: Mapping[str, Any] | None) -> list[Finding]:
    if card is None:
        return [Finding("notice", "The run has no manifest yet", "The pages show the stages that are there.", "index")]
    found = []
    if len(run.hidden):
        inside = sum(
            int(is_hidden(t["image_id"].to_numpy(), run.hidden).sum()) for t in stream(run.manifest, ["image_id"])
        )
        if inside:
            words = f"Images of the manifest that are hidden by now: {inside:,}"
            found.append(Finding("warning", words, "Make it again: `curate manifest`.", "index"))
    flagged = open_parts(run.manifest).count_rows(filter=pc.field("nsfw") > UNSAFE) if run.manifest else 0
    if flagged:
        words = f"Images of the manifest with an NSFW score above {UNSAFE:g}: {flagged:,}"
        found.append(Finding("notice", words, "The filter's own threshold is on its page.", "filters"))
    return found


def unlicensed(sources: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Sources that state no licence."""
    unnamed = [str(s["name"]) for s in sources if not s.get("licence")]
    if not unnamed:
        return []
    names = ", ".join(unnamed[:3]) + (f" and {len(unnamed) - 3} more" if len(unnamed) > 3 else "")
    return [Finding("notice", f"{len(unnamed)} sources state no licence", names, "index")]


def chosen(run: RunTables, count: int) -> list[int]:
    """Ids of random images of the manifest, in hash order."""
    columns = {"image_id": pc.field("image_id"), "group": pc.scalar(0)}
    tables = (with_hash(t, 0, "report manifest") for t in stream(run.manifest, columns, hidden=run.hidden))
    return [row["image_id"] for row in first_rows(tables, "group", count, [("hash", "ascending")])]


def lead(card: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> str:
    """The sentence under the title."""
    listed = sum(steps[0]["images"] for steps in counts["funnel"].values())
    if card is None:
        return f"{listed:,} images are listed. The run has no manifest yet: the pages show what is there."
    rows = card["manifest"]["rows"]
    return f"{rows:,} images were chosen from {listed:,} listed, with the reason for each that was left behind."


def facts(
    card: Mapping[str, Any] | None, counts: Mapping[str, Any], shown: Mapping[str, Section | None]
) -> list[dict[str, Any]]:
    """The figures in large letters: `name`, `value`, `note`, and the `page` that has more of it."""
    pool = counts["funnel"].get("pool", [])
    found = []
    if pool:
        found.append(_fact("Pool images listed", f"{pool[0]['images']:,}", "", ""))
    fetched = next((s for s in pool if s["step"] == "fetched"), None)
    if fetched and pool[0]["images"]:
        share = f"{fetched['images'] / pool[0]['images']:.1%} of the list"
        found.append(_fact("Fetched", f"{fetched['images']:,}", share, "failures"))
    duplicates = shown.get("duplicates")
    if duplicates:
        note = f"{duplicates['components']:,} components"
        found.append(_fact("Copies removed", f"{duplicates['copies']:,}", note, "duplicates"))
    decontamination = shown.get("decontamination")
    if decontamination:
        note = f"{decontamination['direct']:,} direct, {decontamination['chains']:,} by chains"
        value = f"{decontamination['dropped']:,}"
        found.append(_fact("Removed for evaluation sets", value, note, "decontamination"))
    if card:
        rows, size = card["manifest"]["rows"], card["manifest"]["bytes"]
        note = f"{size / 1e9:,.2f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"
        found.append(_fact("In the manifest", f"{rows:,}", note, "balance" if shown.get("balance") else ""))
        page = "retrieval" if shown.get("retrieval") else ""
        found.append(_fact("Nominal draws", f"{card['manifest']['nominal']:,}", "the paper's count", page))
    return found


def _fact(name: str, value: str, note: str, page: str) -> dict[str, Any]:
    return {"name": name, "value": value, "note": note, "page": page}


def sources(described: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources with how many of their rows are usable and in the manifest; None where that is not known."""
    usable: dict[str, int] = {}
    for row in counts["filter"] or counts["fetched"]:
        usable[row["source"]] = usable.get(row["source"], 0) + (row["images"] if row["status"] == "ok" else 0)
    inside = {row["source_number"]: row["images"] for row in counts["manifest"] or []}
    known = counts["manifest"] is not None
    return [
        {**s, "usable": usable.get(s["name"]), "manifest": inside.get(s["number"], 0) if known else None}
        for s in described
    ]
