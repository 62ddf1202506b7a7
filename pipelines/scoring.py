"""One part of the pass over pixels: what a decode worker computes of each image, and what an actor writes.

Everything is computed from the original pixels, blurred faces come after: hashes and copy embedding are those of
the image as it was brought in.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import locations, storage, vectors
from curation.errors import UserError
from curation.schemas import IMAGES
from embeddings import decoding, faces, hashes, nsfw
from embeddings.models import registry
from pipelines.image_parts import read_images, role
from pipelines.run_directory import PartRecord, PartWriter


@dataclass(frozen=True)
class Scoring:
    """What every decode task needs to know; small."""

    root: str
    preparation: Any
    pca_hash: hashes.PcaHash | None
    nsfw: bool
    faces: bool
    face_threshold: float
    face_side: int
    blur: bool
    exempt: frozenset[str]


_loaded: dict[Any, Any] = {}


def _scorer() -> nsfw.NsfwScorer:
    """This worker's NSFW model, loaded once."""
    if "nsfw" not in _loaded:
        _loaded["nsfw"] = nsfw.NsfwScorer()
    return _loaded["nsfw"]  # type: ignore[no-any-return]


def _finder(side: int) -> faces.FaceFinder:
    """This worker's face detector, loaded once."""
    if ("faces", side) not in _loaded:
        _loaded["faces", side] = faces.FaceFinder(side)
    return _loaded["faces", side]  # type: ignore[no-any-return]


def score_part(path: str, scoring: Scoring) -> dict[str, Any]:
    """Decode the usable images of a part, one at a time, and compute all but the copy embedding."""
    table = read_images(path)
    rows = [row for row, status in enumerate(table["status"].to_pylist()) if status == "ok"]
    places = [(table["shard"][row].as_py(), table["offset"][row].as_py(), table["length"][row].as_py()) for row in rows]
    sources = table["source"].to_pylist()
    decoder = decoding.worker_decoder()
    prepared = np.empty((len(rows), *scoring.preparation.shape), np.uint8)
    luminances = np.empty((len(rows), hashes.LUMINANCE_SIDE, hashes.LUMINANCE_SIDE), np.uint8)
    results: list[dict[str, Any]] = []
    failures: list[tuple[int, str]] = []
    digests = [table["stored_sha256"][row].as_py() for row in rows]
    for row, data in zip(rows, locations.read_ranges(scoring.root, places, digests), strict=True):
        if isinstance(data, OSError):
            failures.append((row, "unreadable"))
            continue
        try:
            pixels = decoder.decode(data)
        except decoding.DecodeError as error:
            failures.append((row, error.reason))
            continue
        prepared[len(results)] = scoring.preparation(pixels)
        luminances[len(results)] = hashes.luminance(pixels)
        results.append({"row": row, **score_image(data, pixels, sources[row], scoring)})
    _refuse_unreachable(path, places, failures)
    luminances = luminances[: len(results)]
    contrast = hashes.contrast(luminances)
    hashed = None if scoring.pca_hash is None else scoring.pca_hash(luminances)
    for index, result in enumerate(results):
        result["contrast"] = float(contrast[index])
        result["pca_hash"] = None if hashed is None else int(hashed[index])
    return {"path": path, "results": results, "failures": failures, "prepared": prepared[: len(results)]}


def _refuse_unreachable(path: str, places: Sequence[tuple[str, int, int]], failures: Sequence[tuple[int, str]]) -> None:
    """One file that is gone is a row with its reason; a whole part that is gone is a folder that was moved."""
    if len(places) > 1 and [reason for _, reason in failures] == ["unreadable"] * len(places):
        raise UserError(
            f"{path}: none of its {len(places)} images can be read any more (the first lies in {places[0][0]}); "
            "put them back, then run the same command again",
            exit_code=1,
        )


def score_image(data: bytes, pixels: np.ndarray, source: str, scoring: Scoring) -> dict[str, Any]:
    """Columns of one image, and the bytes of its blurred copy. Reference images get hashes alone."""
    found: dict[str, Any] = {
        "pixel_sha256": hashes.pixel_sha256(pixels),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
    }
    if role(source) == "reference":
        return found
    if scoring.nsfw:
        found["nsfw"] = _scorer().score(pixels)
    if scoring.faces:
        boxes = _finder(scoring.face_side).find(pixels, scoring.face_threshold)
        names = ("x", "y", "width", "height", "score")
        found["faces"] = [dict(zip(names, box, strict=True)) for box in boxes.tolist()]
        found["faces_blurred"] = bool(len(boxes)) and scoring.blur and source not in scoring.exempt
        if found["faces_blurred"]:
            found["blurred"] = faces.encode(faces.blur(pixels, boxes), decoding.sniff(data))
    return found


# -- a part, on a model actor ------------------------------------------------------------------------------------------

SCORES = ("pixel_sha256", "pca_hash", "width", "height", "contrast", "nsfw", "faces", "faces_blurred")


class PartMaker:
    """Holds the copy model; embeds what was decoded and writes the part with its side files."""

    def __init__(self, writer: PartWriter, model: str, device: str, shard_prefix: str) -> None:
        self._writer = writer
        self._shard_prefix = shard_prefix
        self._model = registry.load(model, device)

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> PartRecord:
        results: list[dict[str, Any]] = decoded["results"]
        table = read_images(decoded["path"])
        columns = {field: table[field].to_pylist() for field in (*SCORES, "status", "error")}
        for result in results:
            for field in SCORES:
                if field in result:
                    columns[field][result["row"]] = result[field]
        for row, reason in decoded["failures"]:
            columns["status"][row], columns["error"][row] = "failed", f"decode: {reason}"
        shard = _blurred_shard(table, results, f"{self._shard_prefix}/{name}.tar")
        columns |= shard.columns
        table = _with_columns(table, columns)
        ids = table["image_id"].to_numpy()[[result["row"] for result in results]]
        embedded = registry.embed_rows(self._model, decoded["prepared"])
        model = json.dumps(dict(self._model.identity), sort_keys=True)
        files = {
            f"copy_embedding/{name}.parquet": storage.table_bytes(
                vectors.embeddings_table(np.asarray(ids, np.uint64), embedded), {vectors.MODEL_KEY.decode(): model}
            )
        }
        if shard.data:
            files[f"faces/{name}.tar"] = shard.data
        return self._writer.write(name, table, files=files, counts=_counts(table, columns, decoded))


@dataclass(frozen=True)
class _Shard:
    """A tar of blurred images, b"" without any, and the columns with their new locations."""

    data: bytes
    columns: dict[str, list[Any]]


def _blurred_shard(table: pa.Table, results: Sequence[Mapping[str, Any]], shard: str) -> _Shard:
    columns = {name: table[name].to_pylist() for name in ("shard", "offset", "length", "stored_sha256")}
    ids = table["image_id"].to_pylist()
    blurred = [result for result in results if "blurred" in result]
    if not blurred:
        return _Shard(b"", columns)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for result in blurred:
            data, suffix = result["blurred"]
            row = result["row"]
            member = tarfile.TarInfo(f"{ids[row]:016d}.{suffix}")
            member.size = len(data)
            columns["shard"][row] = shard
            columns["offset"][row] = sink.tell() + tarfile.BLOCKSIZE
            columns["length"][row] = len(data)
            columns["stored_sha256"][row] = bytes.fromhex(storage.sha256(data))
            tar.addfile(member, io.BytesIO(data))
    return _Shard(sink.getvalue(), columns)


def _with_columns(table: pa.Table, columns: Mapping[str, list[Any]]) -> pa.Table:
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else table[field.name] for field in IMAGES
    ]
    return pa.table(arrays, schema=IMAGES)


def _counts(table: pa.Table, columns: Mapping[str, list[Any]], decoded: Mapping[str, Any]) -> dict[str, float]:
    found = [boxes for boxes in columns["faces"] if boxes]
    return {
        "rows": table.num_rows,
        "scored": len(decoded["results"]),
        "undecodable": len(decoded["failures"]),
        "images_with_faces": len(found),
        "faces": sum(len(boxes) for boxes in found),
        "blurred_images": sum(1 for value in columns["faces_blurred"] if value),
    }
