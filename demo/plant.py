"""What the demo's web holds: originals and other real images, copies planted among them, leaks, seeds and faults.

Everything is chosen by hash order, so equal corpora give equal webs. The truth about every row of the URL list is
in `truth.parquet`: the pipeline never reads it, `demo/evaluation.py` marks the run with it.
"""

import hashlib
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.order import generator
from demo.corpus import Corpus, Picture
from demo.originals import LONGEST_ASPECT, SHORTEST, THRESHOLD, components, hashed, pairs_above, shuffled

COPIES = {"exact": 100, "resized": 110, "recompressed": 110, "cropped": 60, "overlaid": 60}
LEAKS = {"exact": 15, "resized": 20, "recompressed": 20, "cropped": 10, "overlaid": 10}
WAYS = {"redirect": 8, "flaky": 4, "under": 6, "open": 8}
"""Of the exact copies: behind a redirect, at a host that fails once, at a slow one, beside what robots.txt forbids."""
FAULTS = {
    "missing": (14, "failed", "http_404"),
    "gone": (3, "failed", "http_410"),
    "html": (12, "failed", "not_an_image"),
    "cut": (10, "failed", "decode|damaged"),
    "hangup": (3, "transient", "truncated"),
    "over": (3, "transient", "timeout"),
    "unavailable": (2, "transient", "http_503"),
    "huge": (1, "failed", "too_large"),
    "robots": (12, "excluded", "robots_disallowed"),
    "noai": (8, "excluded", "x_robots_tag"),
    "to_private": (3, "failed", "private_address"),
    "to_loopback": (3, "failed", "private_address"),
    "to_file": (1, "failed", "scheme"),
    "loop": (2, "failed", "redirect_loop"),
    "bad_url": (2, "failed", "bad_url"),
    "scheme": (2, "failed", "scheme"),
    "duplicate_url": (40, "duplicate_url", ""),
    "small": (10, "dropped", "too_small"),
    "long": (6, "dropped", "aspect_ratio"),
    "solid": (5, "dropped", "solid_colour"),
}
"""kind: (rows, status in the table of `filter`, class of its error, or several that are as good)."""
PLURAL = {"copy": "copies", "leak": "leaks"}
COPIED_SIDE = 128
"""Copies are made of originals with at least this many pixels on the short side: half of it is still an image."""
LEAST_CONTRAST = 12.0
"""Standard deviation of the 32x32 luminance of what is copied, 0-128."""
FORBIDDEN_PRIVATE = "http://10.0.0.1/router.png"
FORBIDDEN_LOOPBACK = "http://127.0.0.99:{port}/admin.png"


@dataclass(frozen=True)
class SeedSet:
    """`count` pictures of a label of one package; the others of that label, whatever their package, are kin."""

    name: str
    label: str
    package: str
    count: int


SEED_SETS = (
    SeedSet("animals", "animal", "tuxpaint-stamps-default", 45),
    SeedSet("plants", "plant", "tuxpaint-stamps-default", 20),
    SeedSet("nebulae", "nebula", "stellarium-data", 80),
    SeedSet("cards", "card", "arcade", 24),
    SeedSet("tiles", "tile", "arcade", 50),
)
"""Of these, those whose package could be had."""
REFERENCE_LABELS = ("art4apps", "solar cell")

TRUTH = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("kind", pa.string()),  # original, other, copy, leak, or a fault
        ("copy", pa.string()),  # exact, resized, recompressed, cropped, overlaid
        ("way", pa.string()),  # how an exact copy is reached, if not simply
        ("of", pa.string()),  # sha256 of the original or of the reference image
        ("sha256", pa.string()),  # of the picture, where it is served as it is
        ("label", pa.string()),
        ("package", pa.string()),
        ("path", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)


@dataclass
class Row:
    """A line of the URL list and the truth about it."""

    url: str
    kind: str
    alt: str = ""
    copy: str = ""
    way: str = ""
    of: str = ""
    sha256: str = ""
    label: str = ""
    package: str = ""
    path: str = ""
    status: str = "ok"
    error: str = ""


@dataclass
class Plan:
    """The web under construction."""

    places: Mapping[str, Sequence[Any]]
    files: Path
    pages: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def put(self, host: str, path: str, **page: Any) -> str:
        """A page; returns its URL."""
        assert path not in self.pages.setdefault(host, {}), path
        self.pages[host][path] = {"do": "file", **page}
        address, port = self.places[host]
        return f"http://{address}:{port}{path}"


def plant(
    corpus: Corpus,
    pictures: Sequence[Picture],
    vectors: np.ndarray | None,
    places: Mapping[str, Sequence[Any]],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the web into `folder`; returns what was planted, in numbers. vectors: (n, d), None without SSCD.

    site.json, urls.parquet, truth.parquet, one Parquet of paths per seed and reference set, files/ with the copies.
    """
    (folder / "files").mkdir(parents=True, exist_ok=True)
    references = [p for p in pictures if p.label in REFERENCE_LABELS]
    seeds = _seeds([p for p in pictures if p.label not in REFERENCE_LABELS])
    taken = {p.path for members in seeds.values() for p in members}
    pool_rows = [i for i, p in enumerate(pictures) if p.label not in REFERENCE_LABELS and p.path not in taken]
    pool = [pictures[i] for i in pool_rows]
    chosen = _originals(pool, None if vectors is None else vectors[pool_rows])
    originals = {pool[i].path for i in chosen["rows"]}

    plan = Plan(places, folder / "files")
    for picture in pool:
        url = plan.put("pictures", _path(picture), file=str(corpus.root / picture.path), type=_mime(picture.path))
        kind = "original" if picture.path in originals else "other"
        plan.rows.append(Row(url, kind, _alt(picture), sha256=picture.sha256, **_about(picture)))
    large = [p for p in shuffled([pool[i] for i in chosen["rows"]], "copies") if min(p.width, p.height) >= COPIED_SIDE]
    _copies(plan, corpus, large, COPIES, "copy", say)
    _copies(
        plan,
        corpus,
        [p for p in shuffled(references, "leaks") if min(p.width, p.height) >= COPIED_SIDE],
        LEAKS,
        "leak",
        say,
    )
    _faults(plan, corpus, pool)
    _write(plan, folder, corpus, seeds, references)
    numbers: dict[str, Any] = {
        "rows": len(plan.rows),
        "pool images": len(pool),
        "originals": len(originals),
        "kinds": dict(sorted(Counter(r.kind for r in plan.rows).items())),
        "copies": dict(sorted(Counter(r.copy for r in plan.rows if r.kind == "copy").items())),
        "leaks": dict(sorted(Counter(r.copy for r in plan.rows if r.kind == "leak").items())),
        "seeds": {name: len(members) for name, members in seeds.items()},
        "references": len(references),
        "real images": len({p.sha256 for p in [*pool, *references]} | {p.sha256 for m in seeds.values() for p in m}),
        **{key: value for key, value in chosen.items() if key != "rows"},
    }
    (folder / "planted.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _seeds(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    found = {}
    for seed_set in SEED_SETS:
        members = [p for p in pictures if p.label == seed_set.label and p.package == seed_set.package]
        if len(members) >= 2 * seed_set.count:
            found[seed_set.name] = sorted(
                shuffled(members, f"seed:{seed_set.name}")[: seed_set.count], key=lambda p: p.path
            )
    return found


def _originals(pool: Sequence[Picture], vectors: np.ndarray | None) -> dict[str, Any]:
    """One picture of each component of the pool's graph under exact search, so no two have a chain between them yet."""
    if vectors is None:
        return {
            "rows": list(range(len(pool))),
            "chosen by": "nothing: without SSCD no exact search among the originals",
        }
    pairs = pairs_above(vectors, THRESHOLD)
    component = components(len(pool), pairs)
    order = np.argsort(hashed([p.path for p in pool], "originals"), kind="stable")
    first: dict[int, int] = {}
    for row in order.tolist():
        if np.any(vectors[row]):
            first.setdefault(int(component[row]), row)
    sizes = np.bincount(component, minlength=len(pool))
    return {
        "rows": sorted(first.values()),
        "chosen by": f"one image of each component above {THRESHOLD} under exact search over all pool candidates",
        "components of several images before planting": int((sizes > 1).sum()),
        "images in them": int(sizes[sizes > 1].sum()),
        "largest of them": int(sizes.max(initial=0)),
        "had any images without a pair been chosen, so many would share a component": _sharing(order, pairs, component),
    }


def _sharing(order: np.ndarray, pairs: np.ndarray, component: np.ndarray) -> int:
    """Of a maximal set of rows without a pair, those joined with another by chains through rows outside it."""
    near: dict[int, set[int]] = defaultdict(set)
    for i, j in pairs.tolist():
        near[i].add(j)
        near[j].add(i)
    chosen: set[int] = set()
    for row in order.tolist():
        if not near[row] & chosen:
            chosen.add(row)
    counts = Counter(component[sorted(chosen)].tolist())
    return sum(number for number in counts.values() if number > 1)


# Copies


def _copies(
    plan: Plan,
    corpus: Corpus,
    pictures: Sequence[Picture],
    wanted: Mapping[str, int],
    kind: str,
    say: Callable[[str], None],
) -> None:
    """Copies of as many pictures as asked for, each of another; fewer, in proportion, where there are too few."""
    share = min(1.0, 0.8 * len(pictures) / sum(wanted.values()))
    queue = iter(pictures)
    for copy, count in wanted.items():
        ways = _ways(copy, kind, int(count * share))
        for way in ways:
            picture = next((p for p in queue if _has_detail(corpus, p)), None)
            if picture is None:
                break
            data, suffix = _derive(corpus, picture, copy)
            name = hashlib.sha256(f"{kind}{copy}{picture.path}".encode()).hexdigest()[:16] + suffix
            if copy == "exact":
                file = corpus.root / picture.path
            else:
                file = plan.files / name
                file.write_bytes(data)
            url = _reach(plan, way, name, file)
            plan.rows.append(Row(url, kind, _alt(picture), copy, way, picture.sha256, **_about(picture)))
    planted = [row for row in plan.rows if row.kind == kind]
    say(f"planted {len(planted):,} {PLURAL[kind]}")


def _has_detail(corpus: Corpus, picture: Picture) -> bool:
    """Whether no filter for solid colour could take the picture, or a crop of it, for a plain surface."""
    from PIL import Image

    from embeddings.decoding import decode

    image = Image.fromarray(decode(corpus.open(picture))).convert("L").resize((32, 32), Image.Resampling.BOX)
    return float(np.asarray(image, np.float64).std()) >= LEAST_CONTRAST


def _ways(copy: str, kind: str, count: int) -> list[str]:
    if copy != "exact" or kind != "copy":
        return [""] * count
    special = [way for way, number in WAYS.items() for _ in range(number)]
    return (special + [""] * count)[:count] if count >= 2 * len(special) else [""] * count


def _reach(plan: Plan, way: str, name: str, file: Path) -> str:
    page = {"file": str(file.absolute()), "type": _mime(name)}
    if way == "redirect":
        return plan.put("broken", f"/moved/{name}", do="redirect", to=plan.put("mirror", f"/new/{name}", **page))
    if way == "flaky":
        return plan.put("broken", f"/flaky/{name}", **page | {"do": "flaky"})
    if way == "under":
        return plan.put("slow", f"/in-time/{name}", **page | {"do": "under"})
    if way == "open":
        return plan.put("private", f"/open/{name}", **page)
    return plan.put("mirror", f"/cache/{name}", **page)


def _derive(corpus: Corpus, picture: Picture, copy: str) -> tuple[bytes, str]:
    """(bytes, suffix) of a copy; deterministic in (picture, copy)."""
    data = corpus.open(picture)
    if copy == "exact":
        return data, Path(picture.path).suffix.lower()
    from PIL import Image

    from embeddings.decoding import decode

    image = Image.fromarray(decode(data))
    random = generator(0, f"{copy}:{picture.sha256}")
    width, height = image.size
    if copy == "resized":
        scale = max(float(random.uniform(0.35, 0.8)), 1.1 * SHORTEST / min(width, height))
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        return _encoded(image, "PNG" if picture.path.lower().endswith(".png") else "JPEG", 92)
    if copy == "recompressed":
        return _encoded(image, "WEBP" if random.random() < 0.25 else "JPEG", int(random.integers(25, 71)))
    if copy == "cropped":
        across, down = (float(random.uniform(0.6, 0.85)) for _ in range(2))
        left, top = random.uniform(0, 1 - across) * width, random.uniform(0, 1 - down) * height
        box = (round(left), round(top), round(left + across * width), round(top + down * height))
        return _encoded(image.crop(box), "JPEG", 92)
    return _encoded(_overlay(image, random), "JPEG", 92)


def _overlay(image: Any, random: np.random.Generator) -> Any:
    """A banner with words and a round badge, as picture sites lay them over what they took."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = image.size
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    bar = max(12, height // 8)
    top = int(random.choice([0, height - bar]))
    draw.rectangle([0, top, width, top + bar], fill=(20, 20, 20, 190))
    words = str(random.choice(["best pictures ever", "FREE WALLPAPERS", "(c) somebody else", "look at this"]))
    draw.text((bar // 3, top + bar // 6), words, fill=(255, 255, 255, 255), font=ImageFont.load_default(bar * 0.6))
    radius = min(width, height) // 9
    x, y = int(random.uniform(radius, width - radius)), int(random.uniform(radius, height - radius))
    colour = tuple(int(c) for c in random.integers(60, 256, 3))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(*colour, 230))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def _encoded(image: Any, kind: str, quality: int) -> tuple[bytes, str]:
    sink = io.BytesIO()
    image.save(sink, kind, quality=quality)
    return sink.getvalue(), {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[kind]


# Faults


def _faults(plan: Plan, corpus: Corpus, pool: Sequence[Picture]) -> None:
    """What is wrong with a web: pages of pool pictures that cannot, or must not, be had under this URL."""
    counts = {kind: min(rows, max(1, len(pool) // 100)) for kind, (rows, _, _) in FAULTS.items()}
    queue = itertools.cycle(shuffled([p for p in pool if p.bytes > 1024], "faults"))
    port = plan.places["pictures"][1]
    for kind, (_, status, error) in FAULTS.items():
        for index in range(counts[kind]):
            picture = next(queue)
            name = f"{index:03d}{Path(picture.path).suffix.lower()}"
            page = {"file": str((corpus.root / picture.path).absolute()), "type": _mime(name)}
            target = f"/{kind}/{name}"
            if kind == "robots":
                url = plan.put("private", f"/members/{name}", **page)
            elif kind == "over":
                url = plan.put("slow", f"/too-late/{name}", **page | {"do": "over"})
            elif kind == "to_private":
                url = plan.put("broken", target, do="redirect", to=FORBIDDEN_PRIVATE)
            elif kind == "to_loopback":
                url = plan.put("broken", target, do="redirect", to=FORBIDDEN_LOOPBACK.format(port=port))
            elif kind == "to_file":
                url = plan.put("broken", target, do="redirect", to="file:///etc/hostname")
            elif kind == "loop":
                url = plan.put("broken", target, do="redirect", to=target)
            elif kind in ("bad_url", "scheme"):
                url = {"bad_url": f"http://{index}..example/{name}", "scheme": f"ftp://files.example/{name}"}[kind]
            elif kind in ("duplicate_url", "small", "long", "solid"):
                continue
            else:
                url = plan.put("broken", target, **page | {"do": kind})
            plan.rows.append(Row(url, kind, _alt(picture), status=status, error=error, **_about(picture)))
    for picture, kind in _unfit(corpus, counts):
        url = plan.put(
            "pictures", _path(picture), file=str((corpus.root / picture.path).absolute()), type=_mime(picture.path)
        )
        plan.rows.append(Row(url, kind, _alt(picture), status="dropped", error=FAULTS[kind][2], **_about(picture)))
    for index in range(counts["solid"]):
        url = plan.put("pictures", f"/solid/{index}.png", file=str(_solid(plan, index).absolute()), type="image/png")
        plan.rows.append(Row(url, "solid", "background", status="dropped", error=FAULTS["solid"][2]))
    listed = [r for r in plan.rows if r.kind in ("original", "other")]
    for row in [listed[i] for i in np.argsort(hashed([r.url for r in listed], "twice"))[: counts["duplicate_url"]]]:
        again = asdict(row) | {"kind": "duplicate_url", "of": row.sha256, "status": "duplicate_url"}
        plan.rows.append(Row(**again))


def _unfit(corpus: Corpus, counts: Mapping[str, int]) -> list[tuple[Picture, str]]:
    """Pictures of the corpus that are too small or too long, all with some detail."""
    distinct = {p.sha256: p for p in shuffled(corpus.pictures, "unfit") if p.label not in REFERENCE_LABELS}
    found: list[tuple[Picture, str]] = []
    for picture in distinct.values():
        short, long = sorted((picture.width, picture.height))
        kind = (
            "small"
            if 24 <= short < SHORTEST and long <= 2 * short
            else "long"
            if short >= SHORTEST and long > LONGEST_ASPECT * short
            else ""
        )
        if kind and picture.bytes > 1500 and sum(k == kind for _, k in found) < counts[kind]:
            found.append((picture, kind))
    return found


def _solid(plan: Plan, index: int) -> Path:
    from PIL import Image

    colour = tuple(int(c) for c in generator(0, f"solid:{index}").integers(0, 256, 3))
    file = plan.files / f"solid-{index}.png"
    Image.new("RGB", (240, 180), colour).save(file)
    return file


# Writing


def _write(
    plan: Plan, folder: Path, corpus: Corpus, seeds: Mapping[str, Sequence[Picture]], references: Sequence[Picture]
) -> None:
    order = np.argsort(hashed([f"{i}:{r.url}" for i, r in enumerate(plan.rows)], "list"), kind="stable").tolist()
    rows = _as_listed([plan.rows[i] for i in order])
    pq.write_table(pa.table({"url": [r.url for r in rows], "alt": [r.alt for r in rows]}), folder / "urls.parquet")
    documents = [asdict(r) | {"row": index} for index, r in enumerate(rows)]
    columns = {name: [d[name] for d in documents] for name in TRUTH.names}
    pq.write_table(pa.table(columns, schema=TRUTH), folder / "truth.parquet")
    for name, members in [*((f"seed-{n}", m) for n, m in seeds.items()), ("reference", references)]:
        if members:
            paths = [str((corpus.root / p.path).absolute()) for p in members]
            table = pa.table({"path": paths, "label": [p.label for p in members]})
            pq.write_table(table, folder / f"{name}.parquet")
    (folder / "site.json").write_text(json.dumps({"places": plan.places, "pages": plan.pages}))


def _as_listed(rows: list[Row]) -> list[Row]:
    """The same rows with a URL's truthful row before the one that repeats it, and a site's slow pages together."""
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row.url in seen:
            first = seen[row.url]
            if rows[first].kind == "duplicate_url":
                rows[first], rows[index] = row, rows[first]
        else:
            seen[row.url] = index
    late = [row for row in rows if row.kind == "over"]
    rows = [row for row in rows if row.kind != "over"]
    return rows[:20] + late + rows[20:]


def _about(picture: Picture) -> dict[str, str]:
    return {"label": picture.label, "package": picture.package, "path": picture.path}


def _path(picture: Picture) -> str:
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(picture.path).stem).strip("-") or "picture"
    digest = hashlib.sha256(picture.path.encode()).hexdigest()[:10]
    return f"/{digest[:2]}/{digest[2:]}/{stem}{Path(picture.path).suffix.lower()}"


def _alt(picture: Picture) -> str:
    words = re.sub(r"[^A-Za-z]+", " ", Path(picture.path).stem).strip().lower()
    return words or picture.label


def _mime(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return {".png": "image/png", ".webp": "image/webp"}.get(suffix, "image/jpeg")
