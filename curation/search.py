"""The one place that imports FAISS, so that a missing or doubled installation gives one sentence."""

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType

from curation.errors import UserError

CPU_DISTRIBUTIONS = frozenset({"faiss-cpu"})
GPU_DISTRIBUTIONS = frozenset({"faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"})


@cache
def installed_faiss() -> list[str]:
    """Names of the installed FAISS distributions, sorted."""
    return sorted(name for name in CPU_DISTRIBUTIONS | GPU_DISTRIBUTIONS if _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def require_faiss() -> ModuleType:
    """The faiss module. Raises UserError when no FAISS, or more than one, is installed."""
    names = installed_faiss()
    if len(names) > 1:
        raise UserError(
            f"{' and '.join(names)} are both installed and overwrite each other's files: "
            "uninstall all of them, then `pip install 'lvd-curate[cpu]'` or `'lvd-curate[gpu]'`",
            exit_code=1,
        )
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "FAISS is not installed: `pip install 'lvd-curate[cpu]'` on a machine without a GPU, "
            f"`pip install 'lvd-curate[gpu]'` on one with CUDA ({error})",
            exit_code=1,
        ) from error
    return faiss  # type: ignore[no-any-return]


def faiss_backend() -> str:
    """`cuda` where FAISS was built for GPUs and sees one, else `cpu`; part of stage fingerprints."""
    faiss = require_faiss()
    count = getattr(faiss, "get_num_gpus", lambda: 0)()
    return "cuda" if count > 0 else "cpu"
