"""`curate status --verify`: every file of a run against its checksum, and what can be made again.

A damaged part is named. `repair` takes it out of its generation, which then is unfinished: the next `curate run`
makes that part again and nothing else. Equal inputs give equal bytes, so the stages after it stay as they are; only
a part of `download` may differ, if its web does.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from curation import storage
from curation.errors import UserError
from pipelines import lock
from pipelines.description import current_generations
from pipelines.run_directory import Generation, RunDirectory

FILES_AT_ONCE = 8
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written. part: whose it is; None: of the generation as a whole."""

    stage: str
    generation: int
    part: str | None
    path: str
    reason: str


@dataclass(frozen=True)
class _Wanted:
    stage: str
    generation: int
    part: str | None
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Verified:
    """What was looked at."""

    files: int
    bytes: int
    damaged: tuple[Damage, ...]


def verify(root: str) -> Verified:
    """Read every file that finished stages list, in bounded memory. Raises UserError where there is no run."""
    run = RunDirectory(root)
    if not run.exists():
        raise UserError(f"{root}: no such run directory")
    wanted = list(_listed(run))
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        reasons = list(pool.map(_look, wanted))
    damaged = [
        Damage(one.stage, one.generation, one.part, one.path, reason)
        for one, reason in zip(wanted, reasons, strict=True)
        if reason is not None
    ]
    return Verified(len(wanted), sum(one.bytes for one in wanted), tuple(damaged))


def repair(root: str, damaged: Sequence[Damage]) -> list[str]:
    """Take damaged parts and files out of their generations. Returns the stages to be made again, in part."""
    with lock.hold(root):
        for stage in sorted({damage.stage for damage in damaged}):
            directory = RunDirectory(root).stage(stage)
            for generation in directory.all_generations():
                mine = [d for d in damaged if (d.stage, d.generation) == (stage, generation.number)]
                if mine:
                    directory.save(_without(generation, mine))
                    for damage in mine:
                        storage.remove(damage.path)
                        if damage.part is not None:
                            storage.remove(generation.writer.path(damage.part))
    return sorted({damage.stage for damage in damaged})


def _without(generation: Generation, damaged: Sequence[Damage]) -> Generation:
    parts = {damage.part for damage in damaged}
    files = {damage.path for damage in damaged if damage.part is None}
    return replace(
        generation,
        complete=False,
        parts=[part for part in generation.parts if part.name not in parts],
        files={name: record for name, record in generation.files.items() if generation.file(name) not in files},
    )


def _listed(run: RunDirectory) -> Iterator[_Wanted]:
    for stage in run.begun():
        for generation in current_generations(run, stage):
            about = (stage, generation.number)
            for part in generation.parts:
                yield _Wanted(*about, part.name, generation.writer.path(part.name), part.bytes, part.sha256)
                for name, record in part.files.items():
                    yield _Wanted(*about, part.name, generation.file(name), record["bytes"], record["sha256"])
            for name, record in generation.files.items():
                yield _Wanted(*about, None, generation.file(name), record["bytes"], record["sha256"])


def _look(wanted: _Wanted) -> str | None:
    """What is wrong with a file; None: nothing."""
    try:
        size, digest = storage.digest(wanted.path, PIECE_BYTES)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or type(error).__name__})"
    if size != wanted.bytes:
        return f"{size:,} bytes, {wanted.bytes:,} were written"
    return None if digest == wanted.sha256 else "bytes have changed since it was written"
