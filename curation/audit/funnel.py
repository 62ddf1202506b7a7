"""The way of the images through the stages: how many came in, how many were lost at each step, and why."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
ROLES = ("pool", "seed", "reference")

EXPLAINED = {
    "duplicate_url": "URL listed before",
    "duplicate_bytes": "same bytes",
    "duplicate_pixels": "same pixels",
    "duplicate_pca_hash": "PCA-hash copy",
    "too_small": "too small",
    "aspect_ratio": "aspect ratio",
    "solid_colour": "solid colour",
    "nsfw": "not safe for work",
    "self": "near copy of another",
    "reference": "evaluation match",
    "exact": "exact copy",
    "hash": "PCA-hash copy",
}
"""What a status or reason of the tables is called on the page."""
OPEN = {
    "retrieve, balance, mix": "not chosen",
    "embed": "unreadable, or without a vector",
    "download, import": "not tried",
}
"""What a loss is called that the tables of a stage give no reason for."""


def role_of(source: str) -> str:
    """pool, seed or reference."""
    return source.split(":", 1)[0]


def funnel(
    sources: Rows,
    fetched: Rows,
    filtered: Rows | None,
    duplicates: Rows | None,
    embedded: Mapping[str, Rows],
    manifest: Rows | None,
) -> dict[str, list[dict[str, Any]]]:
    """Per role the steps, each {`step`, `stage`, `images`, `lost`: [{`reason`, `images`}]}.

    sources: {number, name, rows}. fetched, filtered: rows of `tables.status_counts`. duplicates: of
    `tables.duplicate_counts`. embedded: per model, of `tables.source_counts`; manifest: of `tables.source_counts`.
    None stands for a stage that the run does not have.
    """
    role_by_number = {int(s["number"]): role_of(s["name"]) for s in sources}
    result: dict[str, list[dict[str, Any]]] = {}
    for role in ROLES:
        mine = [r for r in fetched if role_of(r["source"]) == role]
        listed = sum(int(s["rows"]) for s in sources if role_of(s["name"]) == role) or _total(mine)
        if not listed:
            continue
        steps = [_step("listed", "sources", listed, {})]
        lost_before = _losses(mine)
        if mine:
            steps.append(_step("fetched", "download, import", _usable(mine), lost_before))
        if filtered is not None:
            after = [r for r in filtered if role_of(r["source"]) == role]
            new = {k: n - lost_before.get(k, 0) for k, n in _losses(after).items() if n > lost_before.get(k, 0)}
            steps.append(_step("through the filters", "filter", _usable(after), new))
        if duplicates is not None and role != "reference":
            rows = [r for r in duplicates if role_by_number.get(int(r["source_number"])) == role]
            if rows:
                lost: dict[str, int] = {}
                for row in rows:
                    counted_before = filtered is not None and row["reason"] in ("exact", "hash")
                    if not row["kept"] and not counted_before:
                        reason = EXPLAINED.get(row["reason"], str(row["reason"]))
                        lost[reason] = lost.get(reason, 0) + int(row["images"])
                steps.append(_step("distinct and clean", "dedup", _total([r for r in rows if r["kept"]]), lost))
        if role != "reference":
            for model, counts in sorted(embedded.items()):
                inside = _total([r for r in counts if role_by_number.get(int(r["source_number"])) == role])
                if inside:
                    steps.append(_step(f"embedded by {model}", "embed", inside, {}))
        if manifest is not None and role != "reference":
            inside = _total([r for r in manifest if role_by_number.get(int(r["source_number"])) == role])
            steps.append(_step("in the manifest", "retrieve, balance, mix", inside, {}))
        result[role] = _explained(steps)
    return result


def _step(step: str, stage: str, images: int, lost: Mapping[str, int]) -> dict[str, Any]:
    ordered = sorted(lost.items(), key=lambda item: (-item[1], item[0]))
    return {
        "step": step,
        "stage": stage,
        "images": images,
        "lost": [{"reason": r, "images": n} for r, n in ordered if n],
    }


def _explained(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what the reasons leave open, so that each step's losses add up to the difference."""
    for before, step in itertools.pairwise(steps):
        rest = before["images"] - step["images"] - sum(entry["images"] for entry in step["lost"])
        if rest > 0:
            reason = OPEN.get(step["stage"], "without a reason given")
            step["lost"].append({"reason": reason, "images": rest})
    return steps


def _usable(rows: Rows) -> int:
    return sum(int(r["images"]) for r in rows if r["status"] == "ok")


def _total(rows: Rows) -> int:
    return sum(int(r["images"]) for r in rows)


def _losses(rows: Rows) -> dict[str, int]:
    lost: dict[str, int] = {}
    for row in rows:
        if row["status"] == "ok":
            continue
        status, reason = str(row["status"]), row["reason"] or ""
        named = EXPLAINED.get(reason, reason)
        if not reason or reason == status:
            name = EXPLAINED.get(status, status)
        else:
            name = named if status in ("dropped", "duplicate_url") else f"{status}: {named}"
        lost[name] = lost.get(name, 0) + int(row["images"])
    return lost
