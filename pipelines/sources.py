"""Registration: a list, folder or set of tars gets its number, and so its ids, before anything of it is read."""

import re

from curation import secrets, storage
from curation.errors import UserError
from pipelines.context import Context
from pipelines.run_directory import Source

ROLE = re.compile(r"^(pool|seed|reference)(:[A-Za-z0-9][A-Za-z0-9._-]*)?$")
SUFFIXES = re.compile(r"(\.(parquet|pq|csv|tsv|txt|text|lst|tar|gz|bz2|xz|zst))+$", re.IGNORECASE)


def source_name(role: str, origin: str) -> str:
    """`pool:web` from a role and an origin: `pool` alone takes the stem of the origin's name.

    Raises UserError for what is no role.
    """
    if not ROLE.match(role):
        raise UserError(
            f"--as {role}: give pool, pool:NAME, seed:NAME or reference:NAME; "
            "a name is letters, digits, `.`, `_` and `-`"
        )
    if ":" in role:
        return role
    if role != "pool":
        raise UserError(f"--as {role} needs a name: {role}:NAME")
    path = re.split(r"[?#]", origin, maxsplit=1)[0] if "://" in origin else origin  # a query may hold a signature
    stem = SUFFIXES.sub("", path.rstrip("/").rsplit("/", 1)[-1])
    return "pool:" + (re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "pool")


def check_unfinished(context: Context, stage: str, name: str) -> None:
    """Refuse a new source while an earlier one of the stage is unfinished: ids and repeats follow their order."""
    if context.rebuild:
        return
    complete = {g.fingerprint.inputs.get("source") for g in context.run.stage(stage).generations()}
    for source in context.run.sources():
        if source.name == name:
            return
        if source.stage == stage and source.number not in complete:
            raise UserError(
                f"{context.run.root}: {source.name} ({source.origin}) was begun and is not finished; "
                f"run its command again first, then add {name}"
            )


def register(
    context: Context,
    *,
    name: str,
    kind: str,
    origin: str,
    rows: int,
    digest: str,
    stage: str,
    licence: str | None,
    exempt: bool,
) -> Source:
    """The source of this name, new or as it was registered. Raises UserError where it was something else."""
    if exempt and not name.startswith("seed:"):
        raise UserError(f"{name}: only a seed set can be exempt from filter and decontamination")
    known = context.run.sources()
    for source in known:
        if source.name != name:
            continue
        if (source.stage, source.kind, source.digest) != (stage, kind, digest):
            raise UserError(
                f"{name} is registered in {context.run.root} with other content ({source.kind} {source.origin}, "
                f"{source.rows:,} rows): give this one a name of its own with --as {source.role}:NAME"
            )
        if source.exempt != exempt or (licence is not None and source.licence != licence):
            raise UserError(
                f"{name} is registered in {context.run.root} with licence {source.licence or 'unknown'} and "
                f"{'' if source.exempt else 'not '}exempt: that cannot change; use the same settings or another run"
            )
        return source
    source = Source(
        number=len(known),
        name=name,
        kind=kind,
        origin=secrets.hide(origin),
        rows=rows,
        digest=digest,
        stage=stage,
        generation=0 if context.rebuild else len(context.run.stage(stage).all_generations()),
        licence=licence,
        exempt=exempt,
    )
    context.run.register(source)
    return source


def absolute_root(context: Context) -> str:
    """The run directory as an absolute path or URL, for telling what lies inside it."""
    root = context.run.root
    return storage.filesystem(root)[1].rstrip("/") if storage.is_local(root) else root
