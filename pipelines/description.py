"""What a run says about itself: its sources, stages and models, and the counts through it.

The data card and the report are made of these. No timings, hosts or absolute paths are among them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from curation import parquet, storage
from curation.audit import funnel, tables
from curation.audit.run_tables import SNAPSHOTS
from curation.audit.sections.decontamination import THRESHOLDS
from curation.manifest import portable, rows_of
from curation.vectors import MODEL_KEY
from pipelines.context import StageConfig
from pipelines.run_directory import Generation, RunDirectory

UNDESCRIBED = frozenset({"manifest", "report"})
"""Stages that the card leaves out."""


def current_parts(run: RunDirectory, stage: str) -> list[str]:
    """Parts of a stage that count: of the newest generation of a snapshot, of all generations of other stages."""
    return [path for generation in current_generations(run, stage) for path in generation.part_paths]


def current_generations(run: RunDirectory, stage: str) -> list[Generation]:
    """The complete generations that count, in order."""
    generations = run.stage(stage).generations()
    return generations[-1:] if stage in SNAPSHOTS else generations


def stage_names(run: RunDirectory) -> list[str]:
    """Stages that have a folder in the run, embeddings by model (`embed/MODEL`), by name."""
    return run.begun()


def configuration_of(run: RunDirectory) -> dict[str, Any] | None:
    """RUN/run.yaml without what cannot change output (resources, the report) and without absolute paths."""
    from pipelines import configuration

    path = run.path("run.yaml")
    if not storage.exists(path):
        return None
    config = configuration.load(path)
    document = config.model_dump(mode="json", by_alias=True)
    for name in ("run", "resources", "report"):
        document.pop(name, None)
    for name in document:
        block = getattr(config, name, None)
        if isinstance(block, StageConfig):
            document[name] = block.fingerprint_options()
    return dict(portable(document))


def described_sources(run: RunDirectory) -> list[dict[str, Any]]:
    """The registered sources: number, name, role, kind, rows, licence, exempt, and the last name of the origin."""
    return [
        {**portable({k: v for k, v in asdict(s).items() if k not in ("stage", "generation")}), "role": s.role}
        for s in run.sources()
    ]


def run_counts(run: RunDirectory, manifest_parts: Sequence[str] | None) -> dict[str, Any]:
    """Counts in and out of every stage, per source and per reason, by streaming over the tables."""
    parts = {
        stage: current_parts(run, stage) for stage in ("download", "import", "score", "filter", "dedup", "cluster")
    }
    images = {
        s: rows_of(tables.status_counts(parts[s])) if parts[s] else None
        for s in ("download", "import", "score", "filter")
    }
    models = [name for name in stage_names(run) if name.startswith("embed/")]
    fetched = [row for stage in ("download", "import") for row in images[stage] or []]
    filtered = images["filter"] if images["filter"] is not None else images["score"]
    counts: dict[str, Any] = {
        "fetched": fetched,
        "filter": filtered,
        "dedup": rows_of(tables.duplicate_counts(parts["dedup"])) if parts["dedup"] else None,
        "embed": {m.removeprefix("embed/"): rows_of(tables.source_counts(current_parts(run, m))) for m in models},
        "cluster": rows_of(tables.source_counts(parts["cluster"])) if parts["cluster"] else None,
        "retrieve": rows_of(tables.retrieval_counts(current_parts(run, "retrieve"))) or None,
        "balance": rows_of(tables.source_counts(current_parts(run, "balance"))) or None,
        "manifest": rows_of(tables.source_counts(manifest_parts)) if manifest_parts is not None else None,
    }
    counts["funnel"] = funnel.funnel(
        described_sources(run), fetched, filtered, counts["dedup"], counts["embed"], counts["manifest"]
    )
    return counts


def side_files(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The JSON files that a stage's newest generation wrote for people, by name."""
    generations = current_generations(run, stage)
    if not generations:
        return {}
    newest = generations[-1]
    return {
        name.removesuffix(".json"): portable(json.loads(storage.read_bytes(newest.file(name))))
        for name in sorted(newest.files)
        if name.endswith(".json") and "/" not in name
    }


def described_stages(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """Per stage and generation: fingerprint, digest of the content, options, versions, rows, the stage's summary."""
    return {
        name: [
            {
                "generation": g.number,
                "revision": g.fingerprint.revision,
                "fingerprint": g.fingerprint.digest,
                "digest": g.digest,
                "options": portable(g.fingerprint.options),
                "versions": dict(g.fingerprint.backend),
                "rows": sum(part.rows for part in g.parts),
                "summary": portable(g.summary),
            }
            for g in run.stage(name).generations()
        ]
        for name in stage_names(run)
        if name not in UNDESCRIBED
    }


def described_models(run: RunDirectory) -> dict[str, Any]:
    """The models that embedded, as their files name them: per stage that holds embeddings, the identity or None."""
    found: dict[str, Any] = {}
    for name in stage_names(run):
        generations = run.stage(name).generations()
        if not generations:
            continue
        if name.startswith("embed/"):
            paths = generations[0].part_paths
        elif name == "score":
            paths = [
                generations[0].file(f)
                for part in generations[0].parts
                for f in part.files
                if f.startswith("copy_embedding/")
            ]
        else:
            continue
        metadata = parquet.schema(paths[0]).metadata or {} if paths else {}
        if paths:
            found["copy embedding" if name == "score" else name.removeprefix("embed/")] = _model(
                metadata.get(MODEL_KEY)
            )
    return found


def _model(identity: bytes | None) -> Any:
    if identity is None:
        return None
    try:
        return portable(json.loads(identity))
    except ValueError:
        return identity.decode("utf-8", "replace")


def reference_figures(run: RunDirectory) -> list[dict[str, Any]]:
    """Per reference set: direct hits, how many were dropped, and the direct hits above other thresholds."""
    parts = current_parts(run, "dedup")
    if not parts:
        return []
    return [
        {**row, "at": {f"{t:.2f}": n for t, n in zip(THRESHOLDS, row["at"], strict=True)}}
        for row in rows_of(tables.reference_summary(parts, THRESHOLDS))
    ]


def described_retrievals(run: RunDirectory) -> dict[str, Any]:
    """Per seed set what the retrieve stage says of it (`seed_sets.json`, without the list of clusters), and `planned`.

    planned: the retrievals that the configuration asks for if no seed is lost: N per seed image in sample mode, the cap
    in cluster mode (which fewer clusters than hoped for may not fill).
    """
    generations = current_generations(run, "retrieve")
    document = side_files(run, "retrieve").get("seed_sets")
    if not generations or not isinstance(document, dict):
        return {}
    options = generations[-1].fingerprint.options
    rows = {s.label: s.rows for s in run.sources() if s.role == "seed"}
    found = {}
    for name, one in document.items():
        own = (options.get("seed_sets") or {}).get(name) or {}
        if one.get("mode") == "sample":
            neighbours = one.get("neighbours")
            planned = rows[name] * neighbours if name in rows and neighbours is not None else None
        else:
            planned = own.get("cap") or options.get("cap")
        found[name] = {k: v for k, v in one.items() if k != "chosen"} | {"planned": planned}
    return found
