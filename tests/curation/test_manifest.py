"""The join of one range of ids, against a naive one; and what must not enter a data card."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from curation.manifest import cut_ranges, join_range, portable
from curation.schemas import DUPLICATES, IMAGES, MANIFEST, MIX, RETRIEVAL, clusters_schema

IDS = st.integers(0, 12)


def images(ids: list[int], statuses: list[str]) -> pa.Table:
    rows = [
        dict.fromkeys(IMAGES.names) | {"image_id": i, "source": "pool:web", "status": s, "url": f"{n}", "faces": []}
        for n, (i, s) in enumerate(zip(ids, statuses, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES)


def mix(ids: list[int]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"image_id": i, "sources": ["balance"], "nominal": 1, "weight": 1.0} for i in ids], schema=MIX
    )


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.sets(IDS, max_size=8),
    retrieved=st.lists(
        st.tuples(IDS, st.sampled_from("ab"), IDS, st.sampled_from([None, 0.1, 0.5, 0.9])),
        max_size=20,
        unique_by=lambda r: r[:3],
    ),
    clustered=st.sets(IDS),
    tried_again=st.sets(IDS),
)
def test_join_equals_a_naive_one(
    chosen: set[int], retrieved: list[tuple[int, str, int, float | None]], clustered: set[int], tried_again: set[int]
) -> None:
    everything = list(range(13)) + sorted(tried_again)
    first = ["transient" if i in tried_again else "ok" for i in range(13)]
    table = images(everything, [*first, *["ok"] * len(tried_again)])
    retrieval = pa.Table.from_pylist(
        [
            {
                "image_id": i,
                "seed_set": s,
                "seed_id": seed,
                "mode": "sample",
                "rank": 0,
                "similarity": v,
                "cluster_id": None,
            }
            for i, s, seed, v in retrieved
        ],
        schema=RETRIEVAL,
    )
    clusters = pa.Table.from_pylist(
        [{"image_id": i, "cluster_1": i, "cluster_2": i // 2, "distance": 0.0} for i in sorted(clustered)],
        schema=clusters_schema(2),
    )
    found = join_range(table, mix(sorted(chosen, reverse=True)), None, clusters, retrieval).to_pylist()
    assert [row["image_id"] for row in found] == sorted(chosen)
    for row in found:
        i = row["image_id"]
        assert row["url"] == str(max(n for n, e in enumerate(everything) if e == i))
        assert row["clusters"] == ([i, i // 2] if i in clustered else None)
        wanted = sorted((r for r in retrieved if r[0] == i), key=lambda r: (r[3] is None, -(r[3] or 0), r[1], r[2]))
        assert [(r["seed_set"], r["seed_id"]) for r in row["retrieved_by"]] == [r[1:3] for r in wanted]


def test_of_several_rows_of_an_id_the_usable_one_stands() -> None:
    table = images([5, 5, 5], ["transient", "ok", "transient"])
    assert join_range(table, mix([5]), None, None, None)["url"].to_pylist() == ["1"]


def test_an_id_without_an_image_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"image_id 7 \(2 such rows\)"):
        join_range(images([1], ["ok"]), mix([1, 7, 8]), None, None, None)


def test_an_id_twice_in_the_mix_is_refused() -> None:
    with pytest.raises(UserError, match="more than once"):
        join_range(images([1], ["ok"]), mix([1, 1]), None, None, None)


def test_nothing_chosen_gives_an_empty_manifest() -> None:
    empty = join_range(images([1], ["ok"]), mix([]), DUPLICATES.empty_table(), None, None)
    assert empty.schema == MANIFEST and empty.num_rows == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 50)), min_size=1, max_size=30))
def test_ranges_never_part_rows_of_one_id(parts: list[tuple[int, int]]) -> None:
    parts = sorted(parts)
    lows, rows = [p[0] for p in parts], [p[1] for p in parts]
    cuts = cut_ranges(lows, rows, 60)
    assert cuts[0] == 0 and all(lows[c] != lows[c - 1] for c in cuts[1:])
    ends = [*cuts[1:], len(rows)]
    for a, b in zip(cuts, ends, strict=True):
        assert sum(n for low, n in parts[a:b] if low != lows[b - 1]) <= 60


def test_absolute_paths_keep_only_their_last_name() -> None:
    value = {"a": "/home/x/lists/urls.parquet", "b": ["~/d", "s3://bucket/k"], "c": {"d": "C:\\x\\y.txt", "e": 0.5}}
    assert portable(value) == {"a": "urls.parquet", "b": ["d", "s3://bucket/k"], "c": {"d": "y.txt", "e": 0.5}}
