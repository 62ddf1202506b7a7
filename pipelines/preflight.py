"""Everything about a run that can be found wrong before its first stage starts."""

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from curation import storage
from curation.errors import UserError
from pipelines.configuration import RunConfig
from pipelines.sources import source_name

URL_LISTS = ("opt_out", "blocked_domains")
"""Options of `download` that name a file."""


def absolute(path: str) -> str:
    """A path as it is from anywhere: relative ones start at the current folder, URLs stay as they are."""
    if "://" in path:
        return path
    return os.path.abspath(os.path.expanduser(path))


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths: what RUN/run.yaml holds, good from any folder."""
    sources = []
    for source in config.sources:
        kind, origin = source.origin
        sources.append(source.model_copy(update={kind: absolute(origin)}))
    lists = {name: absolute(path) for name in URL_LISTS if (path := getattr(config.download, name)) is not None}
    copy_model = config.filter.copy_model
    return config.model_copy(
        update={
            "run": absolute(config.run),
            "sources": sources,
            "download": config.download.model_copy(update=lists),
            "filter": config.filter.model_copy(update={"copy_model": copy_model and _model(copy_model)}),
            "embed": config.embed.model_copy(update={"models": [_model(name) for name in config.embed.models]}),
        }
    )


def _model(name: str) -> str:
    family, _, path = name.partition(":")
    return f"{family}:{absolute(path)}" if path and family in ("checkpoint", "sscd") else name


def check(config: RunConfig) -> None:
    """Refuse a run whose files, names or folders cannot be right. Raises UserError."""
    check_sources(config)
    check_seed_sets(config)
    check_writable(config.run)


def check_sources(config: RunConfig) -> None:
    """Every source is there, holds something, and has a name of its own; there is a pool."""
    if not config.sources:
        raise UserError("sources: none given; list at least one `as: pool` with urls, folder, tars or parquet")
    if not any(source.role.split(":")[0] == "pool" for source in config.sources):
        raise UserError("sources: no pool among them; give one `as: pool` to take images from")
    for name, count in Counter(source_name(s.role, s.origin[1]) for s in config.sources).items():
        if count > 1:
            raise UserError(
                f"sources: {name} stands there {count} times; give each source a name of its own with `as:`"
            )
    for number, source in enumerate(config.sources):
        kind, origin = source.origin
        _check_origin(f"sources.{number}.{kind}", kind, origin)
    for name in URL_LISTS:
        if (path := getattr(config.download, name)) is not None:
            _check_origin(f"download.{name}", "urls", path)


def _check_origin(key: str, kind: str, origin: str) -> None:
    fs, inner = storage.filesystem(origin)
    where = f"{key}: {origin}"
    if any(sign in origin for sign in "*?[") and not fs.exists(inner):
        if not fs.glob(inner):
            raise UserError(f"{where}: no file matches")
        return
    try:
        there, folder = fs.exists(inner), fs.isdir(inner)
    except PermissionError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    if not there:
        raise UserError(f"{where}: no such {'folder' if kind in ('folder', 'tars') else 'file'}")
    if kind == "folder" and not folder:
        raise UserError(f"{where}: a file, where a folder of images is expected")
    if folder and not fs.ls(inner, detail=False):
        raise UserError(f"{where}: an empty folder")
    if not folder and fs.size(inner) == 0:
        raise UserError(f"{where}: an empty file")
    if not folder and storage.is_local(origin) and not os.access(inner, os.R_OK):
        raise UserError(f"{where}: cannot be read; mend its rights")


def check_seed_sets(config: RunConfig) -> None:
    """The seed sets that later stages name are among the sources."""
    seeds = [source.role.split(":", 1)[1] for source in config.sources if source.role.startswith("seed:")]
    for key, name in _seed_sets_named(config):
        if name not in seeds:
            close = difflib.get_close_matches(name, seeds, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(seeds) or 'none'}"
            raise UserError(f"{key}: no source is `as: seed:{name}`; {hint}")


def _seed_sets_named(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.retrieve is not None:
        for name in config.retrieve.seed_sets:
            yield f"retrieve.seed_sets.{name}", name
    for name in config.mix.as_is:
        if name != "all":
            yield f"mix.as_is: {name}", name
    for share in config.mix.shares or {}:
        kind, _, name = share.partition(":")
        if kind in ("seed", "retrieve") and name:
            yield f"mix.shares.{share}", name


def check_something_enters(config: RunConfig, has_seeds: bool) -> None:
    """A seed set as it is, retrieval or balance brings images into the dataset: known before any is fetched."""
    drawn = has_seeds and (config.retrieve is not None or bool(config.mix.as_is))
    if not drawn and config.balance is None:
        raise UserError(
            "nothing would enter the dataset: list a seed set (`as: seed:NAME`) or add a `balance:` block, "
            "or stop earlier with --until"
        )


def check_models(config: RunConfig, stages: Collection[str]) -> None:
    """The models that `stages` will load can be had: looked up before a billion images are fetched for them."""
    from embeddings.models import registry

    names = list(config.embed.models) if "embed" in stages else []
    if "filter" in stages and config.filter.copy_model:
        names.append(config.filter.copy_model)
    for name in dict.fromkeys(names):
        registry.check(name)
    for block in ("cluster", "retrieve"):
        model = getattr(getattr(config, block), "model", None)
        if block in stages and model and registry.slug(model) not in map(registry.slug, config.embed.models):
            raise UserError(
                f"{block}.model: {model} is not among embed.models ({', '.join(config.embed.models)}); add it"
            )


def check_writable(run: str) -> None:
    """The run directory can be made and written to. Raises UserError (exit code 1 where rights or space lack)."""
    inner = storage.filesystem(run)[1]
    if storage.is_local(run) and os.path.exists(inner) and not os.path.isdir(inner):
        raise UserError(f"run: {run} is a file, where the folder of the run is expected")
    probe = storage.join(run, ".probe")
    storage.write_whole(probe, b"")
    storage.remove(probe)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"dedup.threshold": 0.6, ...}` of a configuration's document."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    if isinstance(value, dict) and value:
        inner: dict[str, Any] = {}
        for key, item in value.items():
            inner |= flat(item, f"{prefix}.{key}" if prefix else str(key))
        return inner
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return flat({str(index): item for index, item in enumerate(value)}, prefix)
    return {prefix: value}
