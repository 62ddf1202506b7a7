"""Bytes of images: whole ones by one range read, small ones decoded in a process that may die, uploads embedded.

Hostile bytes reach no codec of this process.
"""

import io
import json
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from curation import locations
from curation.errors import UserError
from embeddings.decoding import DecodeError, DecodeLimits, Decoder, sniff
from embeddings.models import registry

LARGEST = 64 << 20
"""Bytes of a stored image that are handed out."""
LIMITS = DecodeLimits(max_pixels=100_000_000, cpu_s=10, wall_s=20.0, memory_bytes=2 << 30)
DECODERS = 2
CACHED_BYTES = 64 << 20
SIDE = 224
"""Longest side of a thumbnail, pixels."""
TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
}


class Unavailable(Exception):
    """An image's bytes that cannot be shown; the reason is fit to be shown."""


class Pictures:
    """The images of one run, or of two that are compared."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._decoders: queue.Queue[Decoder] = queue.Queue()
        for _ in range(DECODERS):
            self._decoders.put(Decoder(LIMITS))
        self._small: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._model_lock = threading.Lock()
        self._models: dict[str, Any] = {}

    def stored(self, row: Mapping[str, Any], root: str | None = None) -> tuple[bytes, str]:
        """(bytes as stored, content type) of an image. Raises Unavailable."""
        shard, offset, length = row.get("shard"), row.get("offset"), row.get("length")
        if shard is None or offset is None or not length:
            raise Unavailable("no bytes are stored of this image")
        if length > LARGEST or offset < 0 or length < 0:
            raise Unavailable(f"{length:,} bytes: too large to show")
        try:
            data = next(locations.read_ranges(root or self.root, [(shard, offset, length)]))
        except (OSError, ValueError) as error:
            data = OSError(str(error))
        if isinstance(data, OSError):
            raise Unavailable("its bytes cannot be read")
        kind = sniff(data)
        if kind is None:
            raise Unavailable("its bytes are not an image")
        return data, TYPES[kind]

    def small(self, row: Mapping[str, Any], root: str | None = None) -> bytes:
        """A thumbnail as WebP, at most SIDE pixels wide and high. Raises Unavailable."""
        key = (root or self.root, str(row.get("shard")), int(row.get("offset") or 0))
        with self._lock:
            if key in self._small:
                self._small.move_to_end(key)
                return self._small[key]
        data, _ = self.stored(row, root)
        made = _webp(self.pixels(data, SIDE))
        with self._lock:
            self._small[key] = made
            self._held += len(made)
            while self._held > CACHED_BYTES:
                self._held -= len(self._small.popitem(last=False)[1])
        return made

    def pixels(self, data: bytes, shrink_to: int | None = None) -> np.ndarray:
        """(h, w, 3) uint8, decoded in a child process. Raises Unavailable."""
        with self._decoder() as decoder:
            try:
                return decoder.decode(data, shrink_to)
            except DecodeError as error:
                raise Unavailable(f"not decoded: {error.reason}") from None

    @contextmanager
    def _decoder(self) -> Iterator[Decoder]:
        try:
            decoder = self._decoders.get(timeout=30)
        except queue.Empty:
            raise Unavailable("the decoders are busy: try again") from None
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)

    def vector(self, data: bytes, identity: str | None) -> np.ndarray:
        """(d,) float32 of unit length: an uploaded image as the model of this identity sees it.

        Raises Unavailable for bytes that are no image, UserError where the model is not to be had.
        """
        model = self.model(identity)
        prepared = model.prepare(self.pixels(data))
        with self._model_lock:
            vector = registry.embed_rows(model, prepared[None])[0]
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)

    def model(self, identity: str | None) -> Any:
        """The model that made vectors of this identity, loaded once. Raises UserError (exit code 1)."""
        try:
            wanted = json.loads(identity or "")
            name = str(wanted["name"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("the vectors do not say which model made them", exit_code=1) from error
        with self._model_lock:
            if name not in self._models:
                try:
                    loaded = registry.load(name)
                except UserError as error:
                    raise UserError(f"images cannot be embedded here: {error}", exit_code=1) from error
                if json.loads(json.dumps(dict(loaded.identity))) != wanted:
                    raise UserError(f"{name} is here in another version than made the vectors", exit_code=1)
                self._models[name] = loaded
            return self._models[name]

    def close(self) -> None:
        """End the decoders' processes."""
        while not self._decoders.empty():
            self._decoders.get().close()


def _webp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=78, method=2)
    return sink.getvalue()
