"""Download: URL lists become shards and rows, one row for every URL (DINOv2, appendix A.1: 1.2 billion of them).

img2dataset fetches; order, bounds, robots.txt and what a failure means are ours (`pipelines/download/`).
"""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from curation import blocklist, parquet, storage
from curation.errors import UserError
from curation.schemas import STATUSES, image_id
from pipelines import pieces, sources
from pipelines.blocking import Blocked, emptied
from pipelines.context import Context, Outcome, StageConfig
from pipelines.download import addresses
from pipelines.download.errors import FetchError
from pipelines.download.opener import FetchRules
from pipelines.download.politeness import machine_folder
from pipelines.download.shard import ShardRules, download_part
from pipelines.download.url_keys import NOT_A_DUPLICATE, DuplicateUrls, url_keys
from pipelines.download.url_list import UrlList, open_list, read_domains
from pipelines.run_directory import Generation, Source

NAME = "download"
REVISION = 1
_HARMLESS: dict[str, Any] = {"affects_output": False}


class DownloadConfig(StageConfig):
    """Options of `curate download` and of the block `download:` of a run."""

    url_column: str | None = Field(None, description="column of the URLs; default: url, whatever its case")
    caption_column: str | None = Field(
        None, description="column of the captions; default: caption, alt or text, if there"
    )
    label_column: str | None = Field(None, description="column of the labels, for the audit; default: label, if there")
    shard_rows: int = Field(1000, ge=1, le=100_000, description="URLs per shard; a shard is buffered and written whole")
    attempts: int = Field(3, ge=1, le=20, description="tries of a URL that fails in a way that may pass")
    backoff_s: float = Field(
        1.0, ge=0, le=600, description="seconds before the second try, doubled each time", json_schema_extra=_HARMLESS
    )
    timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds one try may take in all, from the name to the last byte, redirects included",
    )
    max_bytes: int = Field(20 << 20, ge=1024, le=1 << 30, description="largest body accepted, in bytes")
    max_redirects: int = Field(5, ge=0, le=20, description="redirects followed, each checked like a new URL")
    max_side: int | None = Field(
        None, ge=32, le=20_000, description="shrink images with a longer side, in pixels; default: bytes stay as served"
    )
    user_agent_token: str = Field(
        "lvd-curate", pattern=r"^[A-Za-z_-]{1,64}$", description="our name in robots.txt, X-Robots-Tag and User-Agent"
    )
    contact: str | None = Field(
        None,
        pattern=r"^[\x21-\x7e]{1,200}$",
        description="page or mail address that the User-Agent gives to site owners",
    )
    robots_expiry_s: float = Field(
        86400.0,
        ge=0,
        le=86400,
        description="seconds after which robots.txt is asked again",
        json_schema_extra=_HARMLESS,
    )
    disallowed_directives: list[str] = Field(
        ["noai", "noimageai", "noindex", "noimageindex"],
        description="X-Robots-Tag directives that exclude an image",
    )
    opt_out: str | None = Field(None, description="list of URLs (text, CSV, Parquet) that are never asked")
    blocked_domains: str | None = Field(None, description="file of domains, one a line, that are never asked")
    allow_hosts: list[str] = Field(
        [], description="host or host:port entries that may have a private address; only these, as written"
    )
    requests_per_host: int = Field(
        8, ge=1, le=1024, description="requests in flight per host and machine", json_schema_extra=_HARMLESS
    )
    seconds_between_requests: float = Field(
        0.0, ge=0, le=3600, description="seconds between requests to one host, per machine", json_schema_extra=_HARMLESS
    )
    host_wait_s: float = Field(
        120.0, gt=0, le=86400, description="seconds a URL waits for its host's turn", json_schema_extra=_HARMLESS
    )
    threads: int = Field(64, ge=1, le=1024, description="requests in flight per worker", json_schema_extra=_HARMLESS)

    @field_validator("allow_hosts")
    @classmethod
    def _hosts(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            try:
                addresses.parse_allowed([entry])
            except FetchError:
                raise ValueError(f"`{entry}` is not a host or host:port") from None
        return entries


def execute(
    context: Context,
    config: DownloadConfig,
    *,
    urls: str,
    role: str,
    licence: str | None = None,
    exempt: bool = False,
) -> Outcome:
    """Register a URL list and fetch it: one generation."""
    name = sources.source_name(role, urls)
    listed = open_list(urls, config.url_column, config.caption_column, config.label_column)
    options, rules = _prepare(context, config)
    rows, digest = listed.measure()
    sources.check_unfinished(context, NAME, name)
    source = sources.register(
        context,
        name=name,
        kind="urls",
        origin=urls,
        rows=rows,
        digest=digest,
        stage=NAME,
        licence=licence,
        exempt=exempt,
    )
    generation = context.begin_keyed(NAME, REVISION, options, {"source": source.number, "list": digest})
    if generation is None:
        return _skipped(context, {"source": source.number})
    index = pieces.read_index(generation)
    if index is None:
        _write_list(context, generation, source, listed, config.shard_rows, Blocked(rules.blocked))
        index = [(source.number, rows)]
        pieces.write_index(generation, index)
    return _fetch(context, generation, pieces.tasks(generation, index, config.shard_rows, {source.number: name}), rules)


def retry(context: Context, config: DownloadConfig) -> Outcome:
    """Ask again for every row that is still transient: a new generation of just those rows, or an unfinished one."""
    known = context.run.stage(NAME).all_generations()
    if not known:
        raise UserError(f"{context.run.root}: nothing was downloaded there; give a URL list and --out first")
    names = {source.number: source.name for source in context.run.sources()}
    for begun in known:
        number = begun.fingerprint.inputs.get("source")
        if not begun.complete and number is not None:
            raise UserError(f"{names[int(number)]} is not finished: run its `curate download` again before --retry")
    options, rules = _prepare(context, config)
    done = [g for g in known if g.complete]
    count = 1 + sum(1 for g in done if g.fingerprint.inputs.get("retry") is not None)
    digest, transient = _transient_digest(done)
    if transient == 0:
        context.events.emit("message", NAME, text="no row is transient: there is nothing to retry")
        last = done[-1]
        return Outcome(NAME, True, 0, {"transient": 0}, last.directory)
    generation = context.begin_keyed(NAME, REVISION, options, {"retry": count, "list": digest})
    if generation is None:
        return _skipped(context, {"retry": count})
    index = pieces.read_index(generation)
    if index is None:
        index = []
        for number in sorted(names):
            rows = pieces.write_pieces(generation, number, _transient_rows(done, number), config.shard_rows)
            if rows:
                index.append((number, rows))
        pieces.write_index(generation, index)
    return _fetch(context, generation, pieces.tasks(generation, index, config.shard_rows, names, f"-r{count}"), rules)


def _prepare(context: Context, config: DownloadConfig) -> tuple[dict[str, Any], ShardRules]:
    """The options as they enter the fingerprint (lists by their content), and what workers are told."""
    options = config.fingerprint_options()
    opted_out = np.empty(0, np.uint64)
    domains: frozenset[str] = frozenset()
    if config.opt_out is not None:
        listed = open_list(config.opt_out)
        _, options["opt_out"] = listed.measure()
        columns = [table["url"].drop_null().to_pylist() for table in listed.batches()]
        opted_out = np.unique(np.concatenate([url_keys(urls)[:, 0] for urls in columns]))
    if config.blocked_domains is not None:
        domains = read_domains(config.blocked_domains)
        options["blocked_domains"] = storage.sha256("\n".join(sorted(domains)).encode())
    fetch = FetchRules(
        timeout_s=config.timeout_s,
        max_bytes=config.max_bytes,
        max_redirects=config.max_redirects,
        attempts=config.attempts,
        backoff_s=config.backoff_s,
        user_agent_token=config.user_agent_token,
        contact=config.contact,
        robots_expiry_s=config.robots_expiry_s,
        disallowed_directives=tuple(config.disallowed_directives),
        allow_hosts=tuple(config.allow_hosts),
        blocked_domains=domains,
    )
    rules = ShardRules(
        fetch=fetch,
        token="",
        threads=config.threads,
        requests_per_host=config.requests_per_host,
        seconds_between_requests=config.seconds_between_requests,
        host_wait_s=config.host_wait_s,
        max_side=config.max_side,
        folder="",
        opted_out=opted_out,
        blocked=blocklist.load(context.run.root),
    )
    return options, rules


def _write_list(
    context: Context, generation: Generation, source: Source, listed: UrlList, shard_rows: int, blocked: Blocked
) -> None:
    """Lay the list out in pieces, with the rows that repeat an earlier URL marked.

    Repeats are looked for in the list itself and, for pool lists, in the pool lists before it: a
    seed or reference image keeps its own bytes, or its set would lose it. Blocked URLs are not written down.
    """
    first_id = image_id(source.number, 0)
    earlier: list[str] = []
    if source.role == "pool":
        pools = {s.number for s in context.run.sources() if s.role == "pool" and s.number < source.number}
        for other in context.run.stage(NAME).generations():
            if other.fingerprint.inputs.get("source") in pools:
                earlier.append(other.file("keys"))
    with tempfile.TemporaryDirectory(prefix="curate-list-") as scratch:
        finder = DuplicateUrls(scratch, source.rows, first_id)
        for table in listed.batches():
            urls = table["url"].to_pylist()
            finder.add([None if out else url for url, out in zip(urls, blocked.urls(urls), strict=True)])
        if finder.rows != source.rows:
            raise UserError(f"{source.origin}: changed while it was read; run the same command again", exit_code=1)
        finder.resolve(earlier, generation.file("keys") if source.role == "pool" else None)
        pieces.write_pieces(generation, source.number, _with_ids(listed, finder, first_id, blocked), shard_rows)


def _with_ids(listed: UrlList, finder: DuplicateUrls, first_id: int, blocked: Blocked) -> Iterator[pa.Table]:
    row = 0
    for table in listed.batches():
        count = table.num_rows
        repeated = finder.duplicates(row, count)
        with_ids = pa.Table.from_arrays(
            [
                pa.array(np.arange(first_id + row, first_id + row + count, dtype=np.uint64)),
                table["url"],
                table["caption"],
                table["label"],
                pa.nulls(count, pa.string()),
                pa.nulls(count, pa.string()),
                pa.array(repeated, mask=repeated == NOT_A_DUPLICATE),
            ],
            schema=pieces.PIECE,
        )
        out = blocked.urls(table["url"].to_pylist())
        yield emptied(with_ids, out) if out.any() else with_ids
        row += count


def _fetch(
    context: Context, generation: Generation, tasks: list[tuple[str, pieces.PieceTask]], rules: ShardRules
) -> Outcome:
    folder = context.run.relative(generation.directory)
    told = ShardRules(
        **{**vars(rules), "token": f"{generation.directory}:{generation.fingerprint.digest}", "folder": folder}
    )
    context.map_parts(generation, tasks, download_part, shared=told)
    shutil.rmtree(machine_folder(told.token), ignore_errors=True)
    return context.finish(generation, summarise(generation))


def summarise(generation: Generation) -> dict[str, Any]:
    """Rows by status, bytes stored, and failures by class."""
    summary: dict[str, Any] = {"rows": sum(part.rows for part in generation.parts)}
    summary |= {status: int(n) for status in STATUSES if (n := generation.total(status)) or status == "ok"}
    summary["stored_bytes"] = int(generation.total("stored_bytes"))
    classes = sorted({name for part in generation.parts for name in part.counts if name.startswith("error.")})
    summary["errors"] = {name.removeprefix("error."): int(generation.total(name)) for name in classes}
    return summary


def _skipped(context: Context, key: dict[str, Any]) -> Outcome:
    """The outcome of the generation with this key, not of the stage's last one."""
    for generation in context.run.stage(NAME).generations():
        if all(generation.fingerprint.inputs.get(name) == value for name, value in key.items()):
            rows = sum(part.rows for part in generation.parts)
            return Outcome(NAME, True, rows, generation.summary, generation.directory)
    return context.skipped(NAME)


def _still_transient(done: list[Generation]) -> list[Generation]:
    """The generations whose transient rows nobody has asked again: from the last retry on."""
    retries = [g.number for g in done if g.fingerprint.inputs.get("retry") is not None]
    return [g for g in done if g.number >= max(retries, default=0)]


def _transient_rows(done: list[Generation], number: int) -> Iterator[pa.Table]:
    """Rows of one source that are transient, as a list for the next generation, in the order of ids."""
    for generation in _still_transient(done):
        for path in generation.part_paths:
            if not path.rsplit("/", 1)[-1].startswith(f"part-{number:03d}-"):
                continue
            table = _transient_of(path)
            if table.num_rows:
                nothing = pa.nulls(table.num_rows, pa.string())
                columns = [table["image_id"], table["url"], table["caption"], table["label"], nothing, nothing]
                yield pa.Table.from_arrays([*columns, pa.nulls(table.num_rows, pa.uint64())], schema=pieces.PIECE)


def _transient_digest(done: list[Generation]) -> tuple[str, int]:
    ids = [_transient_of(p)["image_id"].to_numpy() for g in _still_transient(done) for p in g.part_paths]
    found = np.concatenate(ids) if ids else np.empty(0, np.uint64)
    return storage.sha256(np.ascontiguousarray(found, dtype="<u8").tobytes()), len(found)


def _transient_of(path: str) -> pa.Table:
    table = parquet.read_table(path, ["image_id", "url", "caption", "label", "status"])
    return table.filter(pc.equal(table["status"], "transient"))
