"""Hostile tars: only offsets and lengths inside the file ever come out of one, in bounded time and memory."""

import io
import pickle
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from pipelines import tars
from pipelines.tars import read_index
from tests.pipelines.web import jpeg

DIALECTS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, octal(len(data)), kind) + data + bytes(-len(data) % 512)


END = bytes(1024)


def index_of(folder: Path, data: bytes) -> tars.TarIndex:
    path = folder / "a.tar"
    path.write_bytes(data)
    return read_index(str(path))


def packed(members: list[tuple[str, bytes]], dialect: int = tarfile.GNU_FORMAT, **options: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=dialect) as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            about.pax_headers = options.get("pax", {})
            tar.addfile(about, io.BytesIO(data))
    return sink.getvalue()


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(DIALECTS), st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6), st.data())
def test_honest_tars_are_read_as_pythons_own_reader_does(
    tmp_path_factory: pytest.TempPathFactory, dialect: int, members: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    suffixes = [data.draw(st.sampled_from([".jpg", ".PNG", ".json", "", ".x.webp"])) for _ in members]
    named = [("d/" + name + suffix, content) for (name, content), suffix in zip(members, suffixes, strict=True)]
    try:
        whole = packed(named, dialect)
    except ValueError:  # a name that this dialect cannot say
        return
    found = index_of(tmp_path_factory.mktemp("tar"), whole)
    wanted = []
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        for about in tar:
            stem, _, suffix = about.name.rpartition("/")[2].partition(".")
            if stem and suffix.lower().rsplit(".", 1)[-1] in tars.IMAGE_SUFFIXES:
                wanted.append((about.offset_data, about.size))
    assert [(m.offset, m.size) for m in found.images] == wanted and not found.damaged


LIES = [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"99999999999\0", b"0x10\0"]


@pytest.mark.parametrize("size", LIES)
def test_sizes_that_lie_end_the_tar_there(tmp_path: Path, size: bytes) -> None:
    found = index_of(tmp_path, member(b"0.jpg", jpeg(1)) + header(b"1.jpg", size) + member(b"2.jpg", jpeg(2)) + END)
    assert [(m.key, m.size) for m in found.images] == [("0", len(jpeg(1)))]
    assert found.damaged


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_name_of_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member(b"0.jpg", jpeg(1)) + header(b"long", octal(6 << 30), kind))
        file.truncate(7 << 30)  # takes no room on the disk
    began = time.monotonic()
    found = read_index(str(path))
    assert len(found.images) == 1 and found.damaged
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "records",
    [
        b"1" * 5000 + b" path=x\n",  # slow in Python's own reader before 3.12.6
        b"0 path=x\n" * 500,
        b"9999999 path=x\n",
        b"-5 path=x\n",
        b"12 size=abc\n",
        b"30 size=99999999999999999999\n",
        b"path=x",
        b"\xb2 path=x\n",
    ],
)
def test_records_that_lie_say_nothing(tmp_path: Path, records: bytes) -> None:
    found = index_of(tmp_path, member(b"pax", records, b"x") + member(b"0.jpg", jpeg(1)) + END)
    assert [(m.key, m.size) for m in found.images] == [("0", len(jpeg(1)))]


def test_records_rename_and_resize_as_they_say(tmp_path: Path) -> None:
    long = "d/" + "ä" * 200 + ".jpg"
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        found = index_of(tmp_path, packed([(long, jpeg(1)), ("1.jpg", jpeg(2))], dialect))
        assert [m.key for m in found.images] == [long.removesuffix(".jpg"), "1"]
    size = len(jpeg(1))
    record = b"%d size=%d\n" % (len(f"12 size={size}\n"), size)
    data = member(b"pax", record, b"x") + header(b"0.jpg", octal(0)) + jpeg(1) + bytes(-size % 512)
    assert [m.size for m in index_of(tmp_path, data + member(b"1.jpg", jpeg(2)) + END).images] == [size, len(jpeg(2))]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"V", b"M"])
def test_links_devices_and_files_with_holes_are_no_images(tmp_path: Path, kind: bytes) -> None:
    odd = header(b"odd.jpg", octal(0), kind)
    found = index_of(tmp_path, odd + member(b"0.jpg", jpeg(1)) + END)
    assert [m.key for m in found.images] == ["0"]


def test_a_map_of_holes_without_end_ends_with_the_file(tmp_path: Path) -> None:
    sparse = bytearray(header(b"odd.jpg", octal(0), b"S"))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:155] = b"%06o\0" % sum(sparse)
    more = bytearray(512)
    more[504] = 1
    found = index_of(tmp_path, member(b"0.jpg", jpeg(1)) + bytes(sparse) + bytes(more) * 2000)
    assert [m.key for m in found.images] == ["0"]


def test_files_with_holes_of_the_newer_kind_are_no_images(tmp_path: Path) -> None:
    with_holes = packed([("0.jpg", jpeg(1))], tarfile.PAX_FORMAT, pax={"GNU.sparse.major": "1"})
    assert index_of(tmp_path, with_holes).images == []


def test_names_that_climb_or_are_absolute_are_keys_and_never_paths(tmp_path: Path) -> None:
    names = [b"../../etc/cron.d/x.jpg", b"/etc/passwd.jpg", b"a/../../b.jpg", b"C:\\x.jpg", b"./-rf.jpg"]
    found = index_of(tmp_path, b"".join(member(name, jpeg(1)) for name in names) + END)
    assert len(found.images) == len(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_tars_put_one_behind_another_are_read_to_the_end(tmp_path: Path) -> None:
    two = packed([("0.jpg", jpeg(1))]) + packed([("1.jpg", jpeg(2))])
    found = index_of(tmp_path, two)
    assert [m.key for m in found.images] == ["0", "1"] and not found.damaged
    assert two[found.images[1].offset :].startswith(jpeg(2))
    assert not index_of(tmp_path, packed([("0.jpg", jpeg(1))]) + b"appended by somebody").damaged


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "empty"),
        (b"\x1f\x8b\x08" + bytes(600), "not a plain tar"),
        (b"PK\3\4" + bytes(600), "not a plain tar"),
        (jpeg(1) * 4, "not a plain tar"),
    ],
)
def test_what_is_no_plain_tar_is_refused_with_a_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        index_of(tmp_path, data)


class Bait:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_pickles_among_the_members_are_never_loaded(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    bait = pickle.dumps(Bait(owned))
    members = [
        ("0.jpg", jpeg(1)),
        *[(f"0.{suffix}", bait) for suffix in ("pkl", "pyd", "pth", "pickle", "npy", "json", "txt", "cls")],
    ]
    found = index_of(tmp_path, packed(members))
    assert {suffix for _, suffix in found.texts} == {"json", "txt", "cls"}
    found.about(found.images[0], {}, None)
    assert not owned.exists()
    pickle.loads(bait)
    assert owned.exists()  # the bait is one


def test_a_size_in_base_256_is_a_size(tmp_path: Path) -> None:
    size = b"\x80" + struct.pack(">3xQ", len(jpeg(1)))
    found = index_of(tmp_path, header(b"0.jpg", size) + jpeg(1) + bytes(-len(jpeg(1)) % 512) + END)
    assert [m.size for m in found.images] == [len(jpeg(1))]
