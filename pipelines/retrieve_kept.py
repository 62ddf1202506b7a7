"""Results of tasks kept as files, so that an interrupted search finds what it had done.

They lie in the generation's scratch folder, which belongs to one fingerprint, and go when the stage is finished.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from curation import storage
from pipelines import embedded
from pipelines.context import Context
from pipelines.run_directory import Generation

Arrays = Mapping[str, np.ndarray]


def path_of(generation: Generation, name: str) -> str:
    """Where the result of a task lies."""
    return generation.file(f"{embedded.SCRATCH}/{name}.npz")


def spread(
    context: Context,
    generation: Generation,
    function: Callable[..., Arrays],
    calls: Iterable[tuple[str, tuple[Any, ...]]],
    *,
    shared: Any = None,
    heavy: bool = False,
) -> None:
    """Run function(*arguments, shared) -> arrays for every (name, arguments) whose result is not there yet.

    heavy: as for `Context.spread`.
    """
    asked = list(calls)
    known = {p.rsplit("/", 1)[-1] for p in storage.list_files(generation.file(embedded.SCRATCH), ".npz")}
    missing = [(name, arguments) for name, arguments in asked if f"{name}.npz" not in known]
    stage, done = generation.fingerprint.stage, len(asked) - len(missing)
    context.events.emit("parts", stage, total=len(asked), done=done)
    if not missing:
        return
    kept = ((name, (path_of(generation, name), function, arguments)) for name, arguments in missing)
    for name, _ in context.spread(_keep, kept, shared=shared, heavy=heavy):
        done += 1
        context.events.emit("part", stage, part=name, rows=0, done=done, total=len(asked))


def _keep(path: str, function: Callable[..., Arrays], arguments: tuple[Any, ...], shared: Any) -> None:
    sink = io.BytesIO()
    np.savez(sink, **function(*arguments, shared))  # type: ignore[arg-type]
    storage.write_whole(path, sink.getvalue())


def load(path: str) -> dict[str, np.ndarray]:
    """The arrays that a task left."""
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
        return dict(arrays)
