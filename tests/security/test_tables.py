"""Tables and archives of strangers: nothing in them is unpickled, whatever their metadata asks for."""

import ast
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from curation.parquet import read_table
from pipelines.download.url_list import open_list
from pipelines.stages.importing import Listing, _tables

PACKAGES = ("curation", "pipelines", "embeddings", "training", "cli")
ROOT = Path(__file__).parents[2]


class Bait:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("extension", ["arrow.py_extension_type", "ray.data.arrow_pickled_object"])
def test_extension_types_that_are_pickles_stay_bytes(tmp_path: Path, extension: str) -> None:
    if extension.startswith("ray"):
        import ray.data  # noqa: F401 - it registers types of its own

    owned = tmp_path / "owned"
    bait = pickle.dumps(Bait(owned))
    field = pa.field("url", pa.binary()).with_metadata(
        {"ARROW:extension:name": extension, "ARROW:extension:metadata": bait}
    )
    table = pa.Table.from_arrays([pa.array([bait, bait])], schema=pa.schema([field]))
    path = str(tmp_path / "list.parquet")
    pq.write_table(table, path)
    for read in (
        lambda: read_table(path),
        lambda: [batch.to_pylist() for batch in open_list(path).batches()],
        lambda: [t.to_pylist() for t in _tables("parquet", path, None, Listing(path))],
    ):
        try:
            read()
        except UserError:
            continue
    assert not owned.exists()


def test_text_that_is_no_utf8_is_marked_and_its_row_kept(tmp_path: Path) -> None:
    wrong = pa.array([b"http://a.example/\xff", b"http://b.example/", None]).view(pa.string())
    pq.write_table(pa.table({"url": wrong, "path": wrong}), tmp_path / "list.parquet")
    listed = open_list(str(tmp_path / "list.parquet"))
    assert [url for batch in listed.batches() for url in batch["url"].to_pylist()] == [
        "http://a.example/\ufffd",
        "http://b.example/",
        None,
    ]
    found = _tables("parquet", str(tmp_path / "list.parquet"), None, Listing(""))
    assert sum(len(table.to_pylist()) for table in found) == 3


@pytest.mark.parametrize("name", ["list.parquet", "list.txt.gz", "list.csv.bz2", "list.txt.xz"])
@pytest.mark.parametrize("cut", [5, 40, -4])
def test_lists_that_are_damaged_are_one_sentence(tmp_path: Path, name: str, cut: int) -> None:
    import bz2
    import gzip
    import lzma

    sink = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://a.example/"] * 50}), sink)
    text = b"url\n" + b"".join(b"http://a.example/%d\n" % n for n in range(50))
    whole = {
        "parquet": sink.getvalue(),
        "gz": gzip.compress(text),
        "bz2": bz2.compress(text),
        "xz": lzma.compress(text),
    }[name.rsplit(".", 1)[-1]]
    broken = bytearray(whole[:cut])
    broken[len(broken) // 2] ^= 0x55
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(UserError, match=r"cannot be read"):
        open_list(str(tmp_path / name)).measure()


def test_names_out_of_files_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    pq.write_table(pa.table({"\x1b]0;owned\x07\nurl2": ["x"]}), tmp_path / "list.parquet")
    with pytest.raises(UserError) as caught:
        open_list(str(tmp_path / "list.parquet"))
    assert str(caught.value).isprintable()


LOADERS = re.compile(r"pickle|\bload|joblib|dill|marshal|shelve|extract")


def calls_of(source: str) -> list[tuple[str, ast.Call]]:
    if LOADERS.search(source) is None:
        return []
    return [
        (ast.unparse(node.func), node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and LOADERS.search(ast.unparse(node.func))
    ]


def test_no_code_of_ours_loads_what_could_be_a_pickle() -> None:
    """Nor numpy and torch for us: they are told not to. Ray's own processes speak pickle among themselves."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            place = str(path.relative_to(ROOT))
            for name, call in calls_of(path.read_text()):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                if name in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
                    found.append(f"{place}: {name}")
                if name == "torch.load" and options.get("weights_only") != "True":
                    found.append(f"{place}: torch.load")
                if name == "np.load" and options.get("allow_pickle", "False") != "False":
                    found.append(f"{place}: np.load")
                if name in ("yaml.load", "yaml.load_all") and "_Loader" not in ast.unparse(call):
                    found.append(f"{place}: {name}")
                if name.startswith(("joblib.", "dill.", "cloudpickle.load", "marshal.", "shelve.")):
                    found.append(f"{place}: {name}")
                if name.endswith((".extractall", ".extract")) and "tar" in name:
                    found.append(f"{place}: {name}")
    assert found == []


def test_numpy_refuses_objects_by_itself(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Bait(tmp_path / "owned")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "a.npy")
