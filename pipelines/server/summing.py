"""The lists and figures of an index that are no clusters': hosts, failures, components, what seed sets drew."""

import os

import numpy as np
import pyarrow as pa

from curation.audit.retrieval_tables import Curves
from curation.audit.sections.decontamination import THRESHOLDS
from pipelines.server import parts as run_tables
from pipelines.server.workshop import Workshop


def lists(work: Workshop) -> None:
    """Hosts, failures, components, chains, reference sets; counts by source, status and reason."""
    among = {name: f"status = '{name}'" for name in ("ok", "dropped", "failed")}
    among["other"] = "status IN ('transient', 'excluded', 'duplicate_url')"
    states = ", ".join(f"coalesce(sum(images) FILTER ({where}), 0)::BIGINT AS {name}" for name, where in among.items())
    work.write_rows(
        "hosts",
        f"SELECT host, sum(images)::BIGINT AS images, {states} FROM counts WHERE host IS NOT NULL "
        "GROUP BY host ORDER BY images DESC, host",
    )
    work.write_rows(
        "failures",
        "SELECT host, status, error, sum(images)::BIGINT AS images FROM counts WHERE status <> 'ok' "
        "GROUP BY ALL ORDER BY images DESC, host, status, error",
    )
    work.document["counts"] = work.dictionaries(
        "SELECT source, status, error, sum(images)::BIGINT AS images FROM counts GROUP BY ALL ORDER BY ALL LIMIT 5000"
    )
    sums = ", ".join(f"sum({n})::BIGINT AS {n}" for n in ("listed", "fetched", "usable", "kept", "chosen", "bytes"))
    work.document["steps"] = work.dictionaries(
        f"SELECT source, {sums} FROM steps GROUP BY source ORDER BY source LIMIT 5000"
    )
    if work.tables.duplicates:
        work.document["reasons"] = work.dictionaries(
            "SELECT source, reason, sum(images)::BIGINT AS images FROM reasons GROUP BY ALL ORDER BY ALL LIMIT 5000"
        )
        work.write_rows(
            "components",
            "SELECT key AS component_id, count(*) AS images, count(*) FILTER (kept) AS kept, "
            "min(similarity) AS least FROM members GROUP BY key HAVING count(*) > 1 ORDER BY images DESC, key",
        )
        work.write_rows(
            "chains",
            "SELECT key AS reference_component_id, sum(images)::BIGINT AS images, sum(direct)::BIGINT AS direct "
            "FROM chains GROUP BY key ORDER BY images DESC, key",
        )
        work.document["dropped_directly"] = work.dictionaries("SELECT sum(direct)::BIGINT AS images FROM chains")[0][
            "images"
        ]
        above = ", ".join(f"sum(above[{i}])::BIGINT" for i in range(1, len(THRESHOLDS) + 1))
        work.document["references"] = work.dictionaries(
            "SELECT name, sum(images)::BIGINT AS images, sum(dropped)::BIGINT AS dropped, max(most) AS most, "
            f"[{above}] AS above FROM hits GROUP BY name ORDER BY name LIMIT 1000"
        )
        work.document["component_sizes"] = work.dictionaries(
            "SELECT images, count(*) AS components FROM (SELECT count(*) AS images FROM members GROUP BY key) "
            "WHERE images > 1 GROUP BY images ORDER BY images LIMIT 10000"
        )


def retrieval(work: Workshop) -> None:
    """What every seed drew, what drew every image, and per seed set its figures and the clusters it took from."""
    columns = ["image_id", "seed_set", "seed_id", "mode", "rank", "similarity", "cluster_id"]
    kinds = ["UBIGINT", "VARCHAR", "UBIGINT", "VARCHAR", "INTEGER", "REAL", "INTEGER"]
    described = ", ".join(f"{name} {kind}" for name, kind in zip(columns, kinds, strict=True))
    curves = Curves()
    for batch in run_tables.stream(work.tables.retrieval, columns):
        table = pa.Table.from_batches([batch])
        work.db.register("part", table)
        work.into("retrieval", "SELECT * FROM part", described)
        work.db.unregister("part")
        curves.add(table)
    work.document["curves"] = [list(key) for key in curves.found]
    if curves.found:
        np.savez_compressed(os.path.join(work.folder, "curves.npz"), *(one.counts for one in curves.found.values()))
    work.db.execute(
        "CREATE TABLE numbered AS SELECT *, (row_number() OVER (ORDER BY seed_set, seed_id, rank, image_id) - 1)"
        "::UINTEGER AS row FROM retrieval"
    )
    work.write_rows("retrieval", f"SELECT {', '.join(columns)} FROM numbered ORDER BY row")
    for kind, key in (("seed", "seed_id"), ("retrieved", "image_id"), ("seed_set", "hash(seed_set)")):
        work.groups(kind, f"SELECT {key} AS key, row FROM numbered WHERE {key} IS NOT NULL ORDER BY key, row")
    work.write_rows(
        "seeds",
        "SELECT seed_set, seed_id, count(*) AS images, max(similarity) AS most, min(similarity) AS least "
        "FROM retrieval GROUP BY ALL ORDER BY seed_set, seed_id",
    )
    work.write_rows(
        "taken",
        "SELECT seed_set, cluster_id AS cluster, count(*) AS images FROM retrieval WHERE cluster_id IS NOT NULL "
        "GROUP BY ALL ORDER BY seed_set, cluster_id",
    )
    work.document["seed_sets"] = work.dictionaries(
        "SELECT seed_set, mode, count(*) AS nominal, count(DISTINCT image_id) AS images, "
        "count(DISTINCT seed_id) AS seeds, avg(similarity)::DOUBLE AS similarity FROM retrieval "
        "GROUP BY ALL ORDER BY ALL LIMIT 1000"
    )
