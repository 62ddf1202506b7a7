"""Compiles kernels for an H100 on a machine without one: the interpreter accepts code that the compiler refuses.

`compile_launches(run)` calls `run`, which calls kernels through their own wrappers on CPU tensors, in a new process
without the interpreter; every launch is compiled, with the specialisations it would have on a device, and not carried
out.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.tiny import SERVER

SHARED = 232_448
"""Bytes of shared memory that a program on an H100 may take (CUDA C++ programming guide, table of compute capability
9.0: 227 KB)."""


def compile_launches(run: Callable[[], None]) -> dict[str, str]:
    """{kernel: what ptxas says of the registers of each launch}. Fails where anything does not compile."""
    mine, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_compile_here, args=(run, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found = mine.recv()
    except EOFError:
        found = "the process died"
    process.join(timeout=20)
    assert isinstance(found, dict), found
    return found


def _compile_here(run: Callable[[], None], sent: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    assert "triton" not in sys.modules, "triton was imported with the interpreter on"
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Says that it is an H100."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    found: dict[str, str] = {}
    launch = triton.runtime.jit.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        name = kernel.fn.__name__
        assert compiled.metadata.shared <= SHARED, f"{name} takes {compiled.metadata.shared} bytes of shared memory"
        found[name] = f"{found.get(name, '')} {_resources(triton, compiled.asm['ptx'])};"
        return compiled

    triton.runtime.driver.set_active(Driver())
    triton.runtime.jit.JITFunction.run = compile_only
    try:
        run()
        sent.send(found)
    except Exception as error:
        sent.send(f"{type(error).__name__}: {error}")


def _resources(triton: Any, ptx: str) -> str:
    assembler = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return ", ".join(re.findall(r"\d+ bytes spill \w+|\d+ registers", told))
