"""URL lists: every shape people have them in, wrong ones refused with one sentence; repeats found exactly."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from pipelines.download import url_keys
from pipelines.download.url_keys import NOT_A_DUPLICATE, DuplicateUrls, normalise
from pipelines.download.url_list import open_list, read_domains

ROWS = [("http://a.example/1", "one, with comma", "cat"), ("http://a.example/2", None, None)]


def read(path: Path, **columns: str) -> list[tuple[str | None, ...]]:
    tables = list(open_list(str(path), **columns).batches())
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def test_text_lists_keep_every_line_that_is_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfhttp://a.example/1\r\n\n  \n# not a comment\nbr\xffken\n")
    assert [row[0] for row in read(path)] == ["http://a.example/1", "# not a comment", "br�ken"]
    packed = tmp_path / "list.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == read(path)


def test_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    csv = tmp_path / "list.csv"
    csv.write_text('id,URL,Alt,label\n1,http://a.example/1,"one, with comma",cat\n2,http://a.example/2\n')
    table = pa.table({"URL": [r[0] for r in ROWS], "TEXT": [r[1] for r in ROWS], "label": [r[2] for r in ROWS]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert read(csv) == read(tmp_path / "list.parquet") == ROWS
    tsv = tmp_path / "list.tsv"
    tsv.write_text("link\tname\nhttp://a.example/1\tx\n")
    assert read(tsv, url_column="link", label_column="name") == [("http://a.example/1", None, "x")]


def test_a_folder_and_a_pattern_are_read_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(pa.table({"url": [f"http://{name}.example/"]}), tmp_path / f"{name}.parquet")
    expected = ["http://a.example/", "http://b.example/"]
    assert [row[0] for row in read(tmp_path)] == expected
    assert [row[0] for row in read(tmp_path / "*.parquet")] == expected
    rows, digest = open_list(str(tmp_path)).measure()
    assert (rows, len(digest)) == (2, 64)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("list.txt", b"", "empty list"),
        ("list.txt", b"\n \n", "empty list"),
        ("list.csv", b"url\n", "empty list"),
        ("list.csv", b"a,b\n1,2\n", "no column `url`; there are: a, b"),
        ("list.parquet", b"PAR1 but not really", "cannot be read as a URL list"),
        ("list.csv.gz", b"not gzip", "cannot be read"),
    ],
)
def test_lists_that_cannot_be_right_are_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        open_list(str(tmp_path / name)).measure()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_columns_that_are_not_there_or_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": [[1, 2]], "other": ["x"]}), path)
    with pytest.raises(UserError, match="no column `link`; there are: url, other"):
        open_list(str(path), url_column="link")
    with pytest.raises(UserError, match="column `url` holds list"):
        read(path)
    with pytest.raises(UserError, match="no such URL list"):
        open_list(str(tmp_path / "absent.txt"))


def test_blocked_domains_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "domains"
    path.write_text("# ours\nBad.example\n*.worse.example  # all of it\n\nbücher.example\n")
    assert read_domains(str(path)) == {"bad.example", "worse.example", "xn--bcher-kva.example"}
    path.write_text("good.example\nhttp://bad.example/\n")
    with pytest.raises(UserError, match="line 2"):
        read_domains(str(path))


@pytest.mark.parametrize(
    ("url", "same"),
    [
        (" HTTP://A.Example:80/x#y ", "http://a.example/x"),
        ("https://a.example:443", "https://a.example/"),
        ("https://a.example?q=1", "https://a.example/?q=1"),
        ("http://a.example:443/", "http://a.example:443/"),
        ("http://a.example/X%2f?b&a", "http://a.example/X%2f?b&a"),
        ("nonsense", "nonsense"),
    ],
)
def test_urls_are_compared_after_a_light_normalisation(url: str, same: str) -> None:
    assert normalise(url) == same
    assert normalise(same) == same


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from([f"http://h.example/{n}" for n in range(40)]), max_size=60), max_size=4))
def test_repeats_are_those_of_a_dictionary(lists: list[list[str]]) -> None:
    import tempfile

    before = (url_keys.ROWS_PER_BUCKET, url_keys.ROWS_PER_RANGE)
    url_keys.ROWS_PER_BUCKET, url_keys.ROWS_PER_RANGE = 7, 10
    try:
        with tempfile.TemporaryDirectory() as folder:
            seen: dict[str, int] = {}
            earlier: list[str] = []
            for number, urls in enumerate(lists):
                first_id = number << 40
                scratch = Path(folder) / f"scratch-{number}"
                scratch.mkdir()
                finder = DuplicateUrls(str(scratch), len(urls), first_id)
                finder.add(urls[:17])
                finder.add([*urls[17:]])
                out = f"{folder}/keys-{number}"
                repeats = finder.resolve(earlier, out)
                earlier.append(out)
                expected = []
                for row, url in enumerate(urls):
                    first = seen.setdefault(url, first_id + row)
                    expected.append(int(NOT_A_DUPLICATE) if first == first_id + row else first)
                found = np.concatenate([finder.duplicates(row, 1) for row in range(len(urls))] or [np.empty(0)])
                assert found.tolist() == expected
                assert repeats == sum(e != int(NOT_A_DUPLICATE) for e in expected)
    finally:
        url_keys.ROWS_PER_BUCKET, url_keys.ROWS_PER_RANGE = before
