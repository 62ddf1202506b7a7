"""Kernels in Triton, each an override of a reference in plain torch; see docs/kernels.md.

Nothing here is imported before a configuration asks for it: a machine without Triton trains with the references.
"""

import importlib.util
import os

from curation.errors import UserError

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on the CPU; decided before triton is imported."""


def require_triton(option: str, device_type: str = "cuda") -> None:
    """Raises UserError where `option` asks for kernels on a machine without Triton, or on a CPU."""
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"{option}: needs Triton, which is not installed here; `pip install triton`, or set reference")
    if device_type == "cpu" and not INTERPRET:
        raise UserError(f"{option}: needs a GPU; set reference")
