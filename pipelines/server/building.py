"""`curate serve RUN --index`: the side tables that look-ups and pages read, made in one pass over the run's Parquet.

Keys are sorted by DuckDB, which spills to disk: memory stays bounded at any number of rows. An index lies in a folder
named by the digest of what it was made of; it is there when its `index.json` is.
"""

import hashlib
import json
import os
import resource
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import UserError
from curation.hierarchy import read_hierarchy
from pipelines.description import current_generations, stage_names
from pipelines.run_directory import RunDirectory
from pipelines.server import parts as run_tables
from pipelines.server import vectors
from pipelines.server.columns import ColumnWriter, RowsWriter, write_groups

REVISION = 1
FOLDER = ".index"
DONE = "index.json"
MEMORY = "1GB"
"""What DuckDB may hold while it sorts; more goes to the disk."""
FETCH_ROWS = 1 << 19
TOKENS = r"string_split_regex(lower(strip_accents({text})), '[^\p{{L}}\p{{N}}]+')"
"""Words of a text: letters and digits of any script, without case and accents."""
WORD = 64
"""Longer words are cut."""
SCORES = {
    "nsfw": "nsfw",
    "contrast": "contrast",
    "min_side": "least(original_width, original_height)::REAL",
    "aspect_ratio": "greatest(original_width, original_height)::REAL "
    "/ nullif(least(original_width, original_height), 0)",
    "similarity": "similarity",
}
"""Columns by which images can be listed in order."""
Tell = Callable[[str], None]


def digest(run: RunDirectory) -> str:
    """Of all that an index is made of."""
    import duckdb

    stages = {
        name: [generation.digest for generation in current_generations(run, name)]
        for name in stage_names(run)
        if name not in ("report", "manifest", "balance", "dedup-search")
    }
    key = {"revision": REVISION, "duckdb": duckdb.__version__, "stages": stages}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def index_root(run: RunDirectory, folder: str | None) -> str:
    """Where indexes of a run lie. Raises UserError for a run on an object store without a folder of its own."""
    if folder is not None:
        return folder
    if not storage.is_local(run.root):
        raise UserError(f"{run.root} is not on this machine: say where its index shall lie with --index-folder DIR")
    return os.path.join(storage.filesystem(run.root)[1], FOLDER)


def find(run: RunDirectory, root: str) -> str | None:
    """The folder of the index that fits the run as it is now, None without one."""
    folder = os.path.join(root, digest(run))
    return folder if os.path.exists(os.path.join(folder, DONE)) else None


def build(run: RunDirectory, root: str, tell: Tell = lambda text: None) -> str:
    """Make the index of a run, remove those of former states, return its folder. Raises UserError."""
    tables = run_tables.run_parts(run)
    name = digest(run)
    if not tables.images:
        raise UserError(f"{run.root}: no images yet; there is nothing to index", exit_code=1)
    aside = os.path.join(root, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(aside)
        with open(os.path.join(root, ".gitignore"), "w", encoding="ascii") as file:
            file.write("*\n")
        started, cpu = time.monotonic(), time.process_time()
        document: dict[str, Any] = {"digest": name, "stages": {}}
        _Build(tables, aside, tell, document).all()
        document["seconds"] = round(time.monotonic() - started, 2)
        document["cpu_seconds"] = round(time.process_time() - cpu, 2)
        document["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        document["bytes"] = _size(aside)
        with open(os.path.join(aside, DONE), "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        final = os.path.join(root, name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    except OSError as error:
        raise storage.cannot_write(root, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for other in os.listdir(root):
        if other not in (name, ".gitignore") and os.path.exists(os.path.join(root, other, DONE)):
            shutil.rmtree(os.path.join(root, other), ignore_errors=True)
    return final


def _size(folder: str) -> dict[str, int]:
    """Bytes on disk by the first name under the folder."""
    sizes: dict[str, int] = {}
    for where, _, files in os.walk(folder):
        inside = os.path.relpath(where, folder).split(os.sep)
        for file in files:
            key = "/".join(inside[:2]) if inside[0] != "." else file.removesuffix(".every")
            sizes[key] = sizes.get(key, 0) + os.path.getsize(os.path.join(where, file))
    return sizes


class _Build:
    """One build: what is collected while the images stream by, and what is sorted after."""

    def __init__(self, tables: run_tables.RunParts, folder: str, tell: Tell, document: dict[str, Any]) -> None:
        import duckdb

        self.tables, self.folder, self.tell, self.document = tables, folder, tell, document
        self.levels = run_tables.levels_of(tables)
        self.work = os.path.join(folder, ".work")
        os.makedirs(self.work)
        self.db = duckdb.connect(os.path.join(self.work, "work.duckdb"))
        self.db.execute(f"SET memory_limit='{MEMORY}'")
        self.db.execute("SET temp_directory=?", [self.work])
        self.db.execute(f"SET threads={max(1, len(os.sched_getaffinity(0)))}")
        self.db.execute("SET preserve_insertion_order=false")
        self.db.execute("SET autoinstall_known_extensions=false; SET autoload_known_extensions=false")

    def all(self) -> None:
        try:
            self.stage("images", self.collect)
            self.stage("groups", self.sort_groups)
            self.stage("words", self.sort_words)
            self.stage("orders", self.sort_scores)
            self.stage("lists", self.lists)
            if self.tables.retrieval:
                self.stage("retrieval", self.retrieval)
        finally:
            self.db.close()
            shutil.rmtree(self.work, ignore_errors=True)
        self.document["spaces"] = {}
        for space, paths in self.tables.embeddings.items():
            self.stage(f"vectors of {space}", partial(self.vectors, space, paths))

    def stage(self, name: str, work: Callable[[], None]) -> None:
        self.tell(f"{name} …")
        started = time.monotonic()
        work()
        self.document["stages"][name] = round(time.monotonic() - started, 2)

    # What streams by.

    def pairs(self) -> dict[str, str]:
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
        if self.tables.duplicates:
            queries["outcome"] = "SELECT hash(reason), row FROM part WHERE reason IS NOT NULL"
            queries["chain"] = (
                "SELECT reference_component_id, row FROM part "
                "WHERE reason = 'reference' AND reference_component_id IS NOT NULL"
            )
        if self.tables.mix:
            queries["brought"] = (
                "SELECT hash(s), row FROM "
                "(SELECT unnest(list_distinct(sources)) s, row FROM part WHERE weight IS NOT NULL)"
            )
        if self.tables.duplicates:
            queries["reference"] = (
                'SELECT DISTINCT hash(r.reference_set), row FROM (SELECT unnest("references") r, row FROM part)'
            )
        for level in range(1, self.levels + 1):
            queries[f"cluster_{level}"] = f"SELECT cluster_{level}, row FROM part WHERE cluster_{level} IS NOT NULL"
        return queries

    def ranked(self) -> dict[str, str]:
        """Kind -> query over `part` that gives (key, row, rank): rows of a key lie in the order of rank."""
        queries = {}
        if self.levels:
            queries["near"] = "SELECT cluster_1, row, distance FROM part WHERE cluster_1 IS NOT NULL"
        if self.tables.duplicates:
            queries["matches"] = (
                "SELECT hash(r.reference_set), row, -max(r.similarity) FROM "
                '(SELECT unnest("references") r, row FROM part WHERE "references" IS NOT NULL) GROUP BY ALL'
            )
        return queries

    def collect(self) -> None:
        ids = ColumnWriter(f"{self.folder}/ids", np.uint64, ordered=True)
        rows: RowsWriter | None = None
        first, said = 0, time.monotonic()
        for table in run_tables.images(self.tables):
            number = pa.array(np.arange(first, first + table.num_rows), pa.uint32())
            part = table.append_column("row", number)
            shown = table.drop_columns([n for n in ("full_url", "text") if n in table.schema.names])
            shown = shown.replace_schema_metadata(None).cast(_nullable(shown.schema))
            rows = rows or RowsWriter(f"{self.folder}/images.arrow", shown.schema)
            rows.append(shown)
            ids.append(table["image_id"].to_numpy())
            self.insert(part)
            first += table.num_rows
            if time.monotonic() - said > 5:
                said = time.monotonic()
                self.tell(f"{first:,} images read")
        if rows is not None:
            rows.close()
        ids.close()
        self.rows = self.document["rows"] = first

    def insert(self, part: pa.Table) -> None:
        self.db.register("part", part)
        for kind, query in self.pairs().items():
            self.into(f"pairs_{kind}", query, "key UBIGINT, row UINTEGER")
        for kind, query in self.ranked().items():
            self.into(f"pairs_{kind}", query, "key UBIGINT, row UINTEGER, rank REAL")
        for name, value in SCORES.items():
            if name != "similarity" or self.tables.duplicates:
                self.into(
                    f"order_{name}",
                    f"SELECT value, row FROM (SELECT {value} AS value, row FROM part) WHERE isfinite(value)",
                    "value REAL, row UINTEGER",
                )
        words = TOKENS.format(text="text")
        self.into(
            "words",
            f"SELECT hash(left(w, {WORD})), row FROM (SELECT unnest(list_distinct({words})) w, row FROM part "
            "WHERE text IS NOT NULL) WHERE w <> ''",
            "key UBIGINT, row UINTEGER",
        )
        counted = f"host, source, status, {ERROR_CLASS} AS error"
        self.into(
            "counts",
            f"SELECT {counted}, count(*) FROM part GROUP BY ALL",
            "host VARCHAR, source VARCHAR, status VARCHAR, error VARCHAR, images BIGINT",
        )
        kept = "count(*) FILTER (status = 'ok' AND kept IS NOT false)" if self.tables.duplicates else "NULL"
        self.into(
            "steps",
            "SELECT source, count(*), count(*) FILTER (status IN ('ok', 'dropped')), count(*) FILTER (status = 'ok'), "
            f"{kept}, {'count(weight)' if self.tables.mix else 'NULL'}, sum(length) FILTER (status = 'ok') FROM part "
            "GROUP BY source",
            "source VARCHAR, listed BIGINT, fetched BIGINT, usable BIGINT, kept BIGINT, chosen BIGINT, bytes HUGEINT",
        )
        if self.tables.duplicates:
            self.into(
                "reasons",
                "SELECT source, reason, count(*) FROM part WHERE reason IS NOT NULL GROUP BY ALL",
                "source VARCHAR, reason VARCHAR, images BIGINT",
            )
            self.into(
                "members",
                "SELECT component_id, row, component_id = image_id, kept, similarity FROM part "
                "WHERE component_id IS NOT NULL",
                "key UBIGINT, row UINTEGER, head BOOLEAN, kept BOOLEAN, similarity REAL",
            )
            self.into(
                "hits",
                "SELECT name, count(*), count(*) FILTER (reason = 'reference'), max(most) FROM "
                "(SELECT r.reference_set AS name, row, any_value(reason) AS reason, max(r.similarity) AS most FROM "
                '(SELECT unnest("references") r, row, reason FROM part WHERE "references" IS NOT NULL) GROUP BY ALL) '
                "GROUP BY name",
                "name VARCHAR, images BIGINT, dropped BIGINT, most REAL",
            )
            self.into(
                "chains",
                "SELECT reference_component_id, count(*), "
                'count(*) FILTER (len("references") > 0) FROM part '
                "WHERE reason = 'reference' AND reference_component_id IS NOT NULL GROUP BY ALL",
                "key UBIGINT, images BIGINT, direct BIGINT",
            )
        chosen = "count(weight)" if self.tables.mix else "0"
        for level in range(1, self.levels + 1):
            self.into(
                f"sizes_{level}",
                f"SELECT cluster_{level}, count(*), {chosen}, sum(distance) FROM part "
                f"WHERE cluster_{level} IS NOT NULL GROUP BY ALL",
                "cluster INTEGER, images BIGINT, chosen BIGINT, distance DOUBLE",
            )
            if self.tables.mix:
                self.into(
                    f"brought_{level}",
                    f"SELECT c, s, count(*) FROM (SELECT cluster_{level} c, unnest(list_distinct(sources)) s FROM part "
                    f"WHERE cluster_{level} IS NOT NULL AND weight IS NOT NULL) GROUP BY ALL",
                    "cluster INTEGER, name VARCHAR, images BIGINT",
                )
        self.db.unregister("part")

    def into(self, table: str, query: str, columns: str) -> None:
        self.db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        self.db.execute(f"INSERT INTO {table} {query}")

    # What is sorted.

    def fetched(self, query: str) -> Iterator[list[np.ndarray]]:
        for batch in self.db.sql(query).to_arrow_reader(FETCH_ROWS):
            yield [column.to_numpy(zero_copy_only=False) for column in batch.columns]

    def groups(self, kind: str, query: str) -> None:
        keys, rows = write_groups(f"{self.folder}/groups/{kind}", ((k, r) for k, r in self.fetched(query)))
        self.document.setdefault("groups", {})[kind] = {"keys": keys, "rows": rows}

    def sort_groups(self) -> None:
        for kind in self.pairs():
            self.groups(kind, f"SELECT key, row FROM pairs_{kind} ORDER BY key, row")
            self.db.execute(f"DROP TABLE pairs_{kind}")
        for kind in self.ranked():
            self.groups(kind, f"SELECT key, row FROM pairs_{kind} ORDER BY key, rank, row")
            self.db.execute(f"DROP TABLE pairs_{kind}")
        if self.tables.duplicates:
            several = "(SELECT DISTINCT key FROM members WHERE NOT head)"
            self.groups("component", f"SELECT key, row FROM members WHERE key IN {several} ORDER BY key, row")

    def sort_words(self) -> None:
        self.groups("words", "SELECT key, row FROM words ORDER BY key, row")
        self.db.execute("DROP TABLE words")

    def sort_scores(self) -> None:
        for name in SCORES:
            if name == "similarity" and not self.tables.duplicates:
                continue
            values = ColumnWriter(f"{self.folder}/orders/{name}/values", np.float32, ordered=True)
            rows = ColumnWriter(f"{self.folder}/orders/{name}/rows", np.uint32)
            for value, row in self.fetched(f"SELECT value, row FROM order_{name} ORDER BY value, row"):
                values.append(value)
                rows.append(row)
            values.close()
            rows.close()
            self.db.execute(f"DROP TABLE order_{name}")

    # What is listed.

    def write_rows(self, name: str, query: str) -> int:
        reader = self.db.sql(query).to_arrow_reader(FETCH_ROWS)
        writer = RowsWriter(f"{self.folder}/{name}.arrow", reader.schema)
        for batch in reader:
            writer.append(pa.Table.from_batches([batch]))
        writer.close()
        return writer.count

    def lists(self) -> None:
        among = {name: f"status = '{name}'" for name in ("ok", "dropped", "failed")}
        among["other"] = "status IN ('transient', 'excluded', 'duplicate_url')"
        states = ", ".join(
            f"coalesce(sum(images) FILTER ({where}), 0)::BIGINT AS {name}" for name, where in among.items()
        )
        self.write_rows(
            "hosts",
            f"SELECT host, sum(images)::BIGINT AS images, {states} FROM counts WHERE host IS NOT NULL "
            "GROUP BY host ORDER BY images DESC, host",
        )
        self.write_rows(
            "failures",
            "SELECT host, status, error, sum(images)::BIGINT AS images FROM counts WHERE status <> 'ok' "
            "GROUP BY ALL ORDER BY images DESC, host, status, error",
        )
        self.document["counts"] = self.dictionaries(
            "SELECT source, status, error, sum(images)::BIGINT AS images FROM counts "
            "GROUP BY ALL ORDER BY ALL LIMIT 5000"
        )
        sums = ", ".join(f"sum({n})::BIGINT AS {n}" for n in ("listed", "fetched", "usable", "kept", "chosen", "bytes"))
        self.document["steps"] = self.dictionaries(
            f"SELECT source, {sums} FROM steps GROUP BY source ORDER BY source LIMIT 5000"
        )
        if self.tables.duplicates:
            self.document["reasons"] = self.dictionaries(
                "SELECT source, reason, sum(images)::BIGINT AS images FROM reasons GROUP BY ALL ORDER BY ALL LIMIT 5000"
            )
            self.write_rows(
                "components",
                "SELECT key AS component_id, count(*) AS images, count(*) FILTER (kept) AS kept, "
                "min(similarity) AS least FROM members GROUP BY key HAVING count(*) > 1 ORDER BY images DESC, key",
            )
            self.write_rows(
                "chains",
                "SELECT key AS reference_component_id, sum(images)::BIGINT AS images, sum(direct)::BIGINT AS direct "
                "FROM chains GROUP BY key ORDER BY images DESC, key",
            )
            self.document["references"] = self.dictionaries(
                "SELECT name, sum(images)::BIGINT AS images, sum(dropped)::BIGINT AS dropped, max(most) AS most "
                "FROM hits GROUP BY name ORDER BY name LIMIT 1000"
            )
            self.document["component_sizes"] = self.dictionaries(
                "SELECT images, count(*) AS components FROM (SELECT count(*) AS images FROM members GROUP BY key) "
                "WHERE images > 1 GROUP BY images ORDER BY images LIMIT 10000"
            )
        places = self.places()
        for level in range(1, self.levels + 1):
            self.cluster_rows(level, places.get(level, {}))

    def dictionaries(self, query: str) -> list[dict[str, Any]]:
        return list(self.db.sql(query).to_arrow_table().to_pylist())

    def places(self) -> dict[int, dict[str, np.ndarray]]:
        """Per level, of each cluster its parent and its place on a map of two principal components."""
        folder = self.tables.clusters[0].rsplit("/", 1)[0] if self.levels else ""
        if not folder or not storage.exists(storage.join(folder, "centroids", "level-1.parquet")):
            return {}
        hierarchy, _, _ = read_hierarchy(folder)
        leaves = hierarchy.centroids[0].astype(np.float64)
        mean = leaves.mean(axis=0)
        axes = np.linalg.eigh(np.cov((leaves - mean).T))[1][:, ::-1][:, :2] if len(leaves) > 2 else None
        found = {}
        for level, centroids in enumerate(hierarchy.centroids, 1):
            at = (centroids - mean) @ axes if axes is not None else np.zeros((len(centroids), 2))
            found[level] = {"x": at[:, 0], "y": at[:, 1]}
            if level <= len(hierarchy.parents):
                found[level]["parent"] = hierarchy.parents[level - 1]
        return found

    def cluster_rows(self, level: int, places: dict[str, np.ndarray]) -> None:
        self.db.execute(
            "CREATE TABLE place AS SELECT NULL::INTEGER AS cluster, NULL::REAL AS x, NULL::REAL AS y, "
            "NULL::INTEGER AS parent LIMIT 0"
        )
        if places:
            count = len(places["x"])
            parent = pa.array(places["parent"], pa.int32()) if "parent" in places else pa.nulls(count, pa.int32())
            table = pa.table(
                {
                    "cluster": pa.array(np.arange(count), pa.int32()),
                    "x": pa.array(places["x"], pa.float32()),
                    "y": pa.array(places["y"], pa.float32()),
                    "parent": parent,
                }
            )
            self.db.register("centroids", table)
            self.db.execute("INSERT INTO place SELECT * FROM centroids")
            self.db.unregister("centroids")
        brought = (
            f"SELECT cluster, list({{'name': name, 'images': n}} ORDER BY n DESC, name)[:40] AS brought FROM "
            f"(SELECT cluster, name, sum(images)::BIGINT AS n FROM brought_{level} GROUP BY ALL) GROUP BY cluster"
            if self.tables.mix
            else "SELECT NULL::INTEGER AS cluster, NULL::STRUCT(name VARCHAR, images BIGINT)[] AS brought LIMIT 0"
        )
        self.write_rows(
            f"clusters_{level}",
            f"SELECT s.*, p.x, p.y, p.parent, b.brought FROM (SELECT cluster, sum(images)::BIGINT AS images, "
            f"sum(chosen)::BIGINT AS chosen, sum(distance) / sum(images) AS distance FROM sizes_{level} "
            f"GROUP BY cluster) s LEFT JOIN place p USING (cluster) LEFT JOIN ({brought}) b USING (cluster) "
            "ORDER BY images DESC, cluster",
        )
        self.db.execute("DROP TABLE place")
        effective = (
            f"SELECT count(*) AS clusters, count(*) FILTER (q > 0) AS chosen_from, "
            "exp(-sum(p * ln(p)) FILTER (p > 0)) AS before, exp(-sum(q * ln(q)) FILTER (q > 0)) AS after "
            "FROM (SELECT sum(images) / sum(sum(images)) "
            f"OVER () AS p, sum(chosen) / nullif(sum(sum(chosen)) OVER (), 0) AS q FROM sizes_{level} GROUP BY cluster)"
        )
        self.document.setdefault("balance", {})[str(level)] = self.dictionaries(effective)[0]

    def retrieval(self) -> None:
        columns = ["image_id", "seed_set", "seed_id", "mode", "rank", "similarity", "cluster_id"]
        kinds = ["UBIGINT", "VARCHAR", "UBIGINT", "VARCHAR", "INTEGER", "REAL", "INTEGER"]
        described = ", ".join(f"{name} {kind}" for name, kind in zip(columns, kinds, strict=True))
        for batch in run_tables.stream(self.tables.retrieval, columns):
            self.db.register("part", pa.Table.from_batches([batch]))
            self.into("retrieval", "SELECT * FROM part", described)
            self.db.unregister("part")
        self.db.execute(
            "CREATE TABLE numbered AS SELECT *, (row_number() OVER (ORDER BY seed_set, seed_id, rank, image_id) - 1)"
            "::UINTEGER AS row FROM retrieval"
        )
        self.write_rows("retrieval", f"SELECT {', '.join(columns)} FROM numbered ORDER BY row")
        for kind, key in (("seed", "seed_id"), ("retrieved", "image_id"), ("seed_set", "hash(seed_set)")):
            self.groups(kind, f"SELECT {key} AS key, row FROM numbered WHERE {key} IS NOT NULL ORDER BY key, row")
        self.write_rows(
            "seeds",
            "SELECT seed_set, seed_id, count(*) AS images, max(similarity) AS most, min(similarity) AS least "
            "FROM retrieval GROUP BY ALL ORDER BY seed_set, seed_id",
        )
        self.document["seed_sets"] = self.dictionaries(
            "SELECT seed_set, mode, count(*) AS nominal, count(DISTINCT image_id) AS images, "
            "count(DISTINCT seed_id) AS seeds, avg(similarity)::DOUBLE AS similarity FROM retrieval "
            "GROUP BY ALL ORDER BY ALL LIMIT 1000"
        )

    def vectors(self, space: str, paths: tuple[str, ...]) -> None:
        found = vectors.build(paths, f"{self.folder}/ids", os.path.join(self.folder, "vectors", space), self.tell)
        if found is not None:
            self.document["spaces"][space] = found


ERROR_CLASS = "nullif(rtrim(regexp_extract(left(error, 200), '^[^:]*')), '')"
"""The class of an `error`: what stands before the first colon."""


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, field.type) for field in schema])


def described(folder: str) -> dict[str, Any]:
    """What an index says of itself."""
    with open(os.path.join(folder, DONE), encoding="utf-8") as file:
        return dict(json.load(file))
