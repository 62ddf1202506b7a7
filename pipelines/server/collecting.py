"""What an index collects while the images stream by once, and what it sorts after: keys to rows, scores to rows."""

import time

import numpy as np
import pyarrow as pa

from curation.audit.sections.decontamination import THRESHOLDS
from pipelines.server import parts as run_tables
from pipelines.server.columns import ColumnWriter, RowsWriter
from pipelines.server.workshop import Workshop

TOKENS = r"string_split_regex(lower(strip_accents({text})), '[^\p{{L}}\p{{N}}]+')"
"""Words of a text: letters and digits of any script, without case and accents."""
WORD = 64
"""Longer words are cut."""
SCORES = {
    "nsfw": "nsfw",
    "contrast": "contrast",
    "min_side": "least(width, height)::REAL",
    "aspect_ratio": "greatest(width, height)::REAL / nullif(least(width, height), 0)",
    "similarity": "similarity",
}
"""Columns by which images can be listed in order; those of filters as the filters and the report see them."""
ERROR_CLASS = "nullif(rtrim(regexp_extract(left(error, 200), '^[^:]*')), '')"
"""The class of an `error`: what stands before the first colon."""


def collect(work: Workshop) -> None:
    """Read the images once: write their rows and ids, put into the database what is sorted later."""
    ids = ColumnWriter(f"{work.folder}/ids", np.uint64, ordered=True)
    rows: RowsWriter | None = None
    first, said = 0, time.monotonic()
    for table in run_tables.images(work.tables):
        number = pa.array(np.arange(first, first + table.num_rows), pa.uint32())
        part = table.append_column("row", number)
        shown = table.drop_columns([n for n in ("full_url", "text") if n in table.schema.names])
        shown = shown.replace_schema_metadata(None).cast(_nullable(shown.schema))
        rows = rows or RowsWriter(f"{work.folder}/images.arrow", shown.schema)
        rows.append(shown)
        ids.append(table["image_id"].to_numpy())
        _insert(work, part)
        first += table.num_rows
        if time.monotonic() - said > 5:
            said = time.monotonic()
            work.tell(f"{first:,} images read")
    if rows is not None:
        rows.close()
    ids.close()
    work.document["rows"] = first


def _pairs(work: Workshop) -> dict[str, str]:
    """Kind -> query over `part` that gives (key, row)."""
    queries = {
        "url": "SELECT hash(full_url), row FROM part WHERE full_url IS NOT NULL",
        "sha256": "SELECT hash(sha256), row FROM part WHERE sha256 IS NOT NULL UNION ALL "
        "SELECT hash(stored_sha256), row FROM part WHERE stored_sha256 IS NOT NULL "
        "AND stored_sha256 IS DISTINCT FROM sha256",
        "pixel": "SELECT hash(pixel_sha256), row FROM part WHERE pixel_sha256 IS NOT NULL",
        "pca": "SELECT pca_hash, row FROM part WHERE pca_hash IS NOT NULL",
        "host": "SELECT hash(host), row FROM part WHERE host IS NOT NULL",
        "source": "SELECT hash(source), row FROM part",
        "status": "SELECT hash(status), row FROM part",
        "error": f"SELECT hash({ERROR_CLASS}), row FROM part WHERE error IS NOT NULL",
        "label": "SELECT hash(label), row FROM part WHERE label IS NOT NULL",
    }
    if work.tables.duplicates:
        queries["outcome"] = "SELECT hash(reason), row FROM part WHERE reason IS NOT NULL"
        queries["chain"] = (
            "SELECT reference_component_id, row FROM part "
            "WHERE reason = 'reference' AND reference_component_id IS NOT NULL"
        )
    if work.tables.mix:
        queries["brought"] = (
            "SELECT hash(s), row FROM (SELECT unnest(list_distinct(sources)) s, row FROM part WHERE weight IS NOT NULL)"
        )
    if work.tables.duplicates:
        queries["reference"] = (
            'SELECT DISTINCT hash(r.reference_set), row FROM (SELECT unnest("references") r, row FROM part)'
        )
    for level in range(1, work.levels + 1):
        queries[f"cluster_{level}"] = f"SELECT cluster_{level}, row FROM part WHERE cluster_{level} IS NOT NULL"
    return queries


def _ranked(work: Workshop) -> dict[str, str]:
    """Kind -> query over `part` that gives (key, row, rank): rows of a key lie in the order of rank."""
    queries = {}
    if work.levels:
        queries["near"] = "SELECT cluster_1, row, distance FROM part WHERE cluster_1 IS NOT NULL"
    if work.tables.duplicates:
        queries["matches"] = (
            "SELECT hash(r.reference_set), row, -max(r.similarity) FROM "
            '(SELECT unnest("references") r, row FROM part WHERE "references" IS NOT NULL) GROUP BY ALL'
        )
    return queries


def _insert(work: Workshop, part: pa.Table) -> None:
    work.db.register("part", part)
    for kind, query in _pairs(work).items():
        work.into(f"pairs_{kind}", query, "key UBIGINT, row UINTEGER")
    for kind, query in _ranked(work).items():
        work.into(f"pairs_{kind}", query, "key UBIGINT, row UINTEGER, rank REAL")
    for name, value in SCORES.items():
        if name != "similarity" or work.tables.duplicates:
            work.into(
                f"order_{name}",
                f"SELECT value, row FROM (SELECT {value} AS value, row FROM part) WHERE isfinite(value)",
                "value REAL, row UINTEGER",
            )
    words = TOKENS.format(text="text")
    work.into(
        "words",
        f"SELECT hash(left(w, {WORD})), row FROM (SELECT unnest(list_distinct({words})) w, row FROM part "
        "WHERE text IS NOT NULL) WHERE w <> ''",
        "key UBIGINT, row UINTEGER",
    )
    counted = f"host, source, status, {ERROR_CLASS} AS error"
    work.into(
        "counts",
        f"SELECT {counted}, count(*) FROM part GROUP BY ALL",
        "host VARCHAR, source VARCHAR, status VARCHAR, error VARCHAR, images BIGINT",
    )
    kept = "count(*) FILTER (status = 'ok' AND kept IS NOT false)" if work.tables.duplicates else "NULL"
    work.into(
        "steps",
        "SELECT source, count(*), count(*) FILTER (status IN ('ok', 'dropped')), count(*) FILTER (status = 'ok'), "
        f"{kept}, {'count(weight)' if work.tables.mix else 'NULL'}, sum(length) FILTER (status = 'ok') FROM part "
        "GROUP BY source",
        "source VARCHAR, listed BIGINT, fetched BIGINT, usable BIGINT, kept BIGINT, chosen BIGINT, bytes HUGEINT",
    )
    if work.tables.duplicates:
        work.into(
            "reasons",
            "SELECT source, reason, count(*) FROM part WHERE reason IS NOT NULL GROUP BY ALL",
            "source VARCHAR, reason VARCHAR, images BIGINT",
        )
        work.into(
            "members",
            "SELECT component_id, row, component_id = image_id, kept, similarity FROM part "
            "WHERE component_id IS NOT NULL",
            "key UBIGINT, row UINTEGER, head BOOLEAN, kept BOOLEAN, similarity REAL",
        )
        above = ", ".join(f"count(*) FILTER (most > {t}::REAL)" for t in THRESHOLDS)
        work.into(
            "hits",
            f"SELECT name, count(*), count(*) FILTER (reason = 'reference'), max(most), [{above}] FROM "
            "(SELECT r.reference_set AS name, row, any_value(reason) AS reason, max(r.similarity) AS most FROM "
            '(SELECT unnest("references") r, row, reason FROM part WHERE "references" IS NOT NULL) GROUP BY ALL) '
            "GROUP BY name",
            "name VARCHAR, images BIGINT, dropped BIGINT, most REAL, above BIGINT[]",
        )
        work.into(
            "chains",
            "SELECT reference_component_id, count(*), "
            'count(*) FILTER (len("references") > 0) FROM part '
            "WHERE reason = 'reference' AND reference_component_id IS NOT NULL GROUP BY ALL",
            "key UBIGINT, images BIGINT, direct BIGINT",
        )
    if work.levels:
        path = ", ".join(f"cluster_{level}" for level in range(1, work.levels + 1))
        chosen = "count(weight)" if work.tables.mix else "0"
        work.into(
            "sizes",
            f"SELECT {path}, count(*), {chosen}, sum(distance) FROM part WHERE cluster_1 IS NOT NULL GROUP BY ALL",
            ", ".join(f"cluster_{level} INTEGER" for level in range(1, work.levels + 1))
            + ", images BIGINT, chosen BIGINT, distance DOUBLE",
        )
        if work.tables.mix:
            work.into(
                "brought",
                "SELECT c, s, count(*) FROM (SELECT cluster_1 c, unnest(list_distinct(sources)) s FROM part "
                "WHERE cluster_1 IS NOT NULL AND weight IS NOT NULL) GROUP BY ALL",
                "cluster INTEGER, name VARCHAR, images BIGINT",
            )
    work.db.unregister("part")


def sort_groups(work: Workshop) -> None:
    """Write the rows of every key: URL, hash, host, cluster, component, ..."""
    for kind in _pairs(work):
        work.groups(kind, f"SELECT key, row FROM pairs_{kind} ORDER BY key, row")
        work.db.execute(f"DROP TABLE pairs_{kind}")
    for kind in _ranked(work):
        work.groups(kind, f"SELECT key, row FROM pairs_{kind} ORDER BY key, rank, row")
        work.db.execute(f"DROP TABLE pairs_{kind}")
    if work.tables.duplicates:
        several = "(SELECT DISTINCT key FROM members WHERE NOT head)"
        work.groups("component", f"SELECT key, row FROM members WHERE key IN {several} ORDER BY key, row")


def sort_words(work: Workshop) -> None:
    """Write the rows of every word of the alt texts."""
    work.groups("words", "SELECT key, row FROM words ORDER BY key, row")
    work.db.execute("DROP TABLE words")


def sort_scores(work: Workshop) -> None:
    """Write the rows in the order of every score."""
    for name in SCORES:
        if name == "similarity" and not work.tables.duplicates:
            continue
        values = ColumnWriter(f"{work.folder}/orders/{name}/values", np.float32, ordered=True)
        rows = ColumnWriter(f"{work.folder}/orders/{name}/rows", np.uint32)
        for value, row in work.fetched(f"SELECT value, row FROM order_{name} ORDER BY value, row"):
            values.append(value)
            rows.append(row)
        values.close()
        rows.close()
        work.db.execute(f"DROP TABLE order_{name}")


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, field.type) for field in schema])
