"""`curate forget`: opt-out and takedown. Images leave a run for good, and copies of them do not come back.

A list in RUN/forgotten hides them from every reader at once; what tells copies of them goes on the block list; then the
only operation that may rewrite finished parts takes them out of every file. Parts get new checksums in `_stage.json`,
which names the certificate; a generation keeps the identity that it was made with, so that what was made of it is
neither refused nor made again. Whatever moment it is stopped at, the next call goes on to the same end.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from curation import blocklist, hidden, parquet, storage
from curation.errors import UserError
from curation.hidden import FORGOTTEN
from curation.manifest import card_bytes
from curation.schemas import ID
from pipelines import forget_elsewhere, forget_select, lock, preflight, status
from pipelines.catalog import STAGES
from pipelines.context import Context, Resources
from pipelines.events import Events
from pipelines.forget_lists import Asked, Kind, read_list
from pipelines.forget_rewrite import (
    Done,
    Removal,
    take_out_of_keys,
    take_out_of_part,
    take_out_of_piece,
    take_out_of_table,
)
from pipelines.forget_select import Selection, collect, part_paths
from pipelines.run_directory import Generation, PartRecord, RunDirectory, Source, StageDirectory

NAME = "forget"
FORMAT = 1
BEGUN, BLOCKED, DONE = "begun", "blocked", "done"
PACKED = "packed.json"
"""Where `curate pack` notes what it wrote from a run."""
LIST = pa.schema([ID, pa.field("representative", pa.bool_(), nullable=False)])


@dataclass
class Forgotten:
    """What a call did."""

    run: str
    certificates: list[str] = field(default_factory=list)
    """Paths under the run of those that were written now."""
    images: int = 0
    named: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    """Entries that the run does not hold, by kind; they are blocked all the same."""
    known: dict[str, int] = field(default_factory=dict)
    """Entries that were forgotten before, by kind."""
    copies_left: int = 0
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    cannot_be_removed: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """Some of the user's own files that hold forgotten images."""
    planned: bool = False
    finished: list[str] = field(default_factory=list)
    """Certificates of earlier calls that were stopped, finished now."""


def forget(
    root: str,
    lists: Mapping[Kind, str],
    *,
    copies: bool | None = None,
    caught: bool = False,
    plan: bool = False,
    re_elect: bool = False,
    resources: Resources | None = None,
    events: Events | None = None,
) -> Forgotten:
    """Forget what the lists name. copies: None is for lists of sha256 alone. plan: say what would go, change nothing.

    Without lists it finishes what was stopped. Raises UserError for what is no run, and for lists with a line that is
    not what it should be, before anything is changed.
    """
    run = RunDirectory(preflight.absolute(root))
    if not storage.exists(run.path("sources.json")):
        raise UserError(f"{root}: not a run directory (no sources.json in it)")
    with lock.hold(run.root):
        context = Context(run, resources=resources or Resources(), events=events or Events(None))  # type: ignore[call-arg]
        found = Forgotten(root, planned=plan)
        try:
            if not plan:
                found.finished = finish_pending(context)
            if lists or caught:
                _forget(context, found, lists, copies, caught)
        finally:
            context.events.flush()
    if re_elect and not plan:
        _re_elect(run, resources, events)
    return found


def _forget(context: Context, found: Forgotten, lists: Mapping[Kind, str], copies: bool | None, caught: bool) -> None:
    run = context.run
    if not found.planned:  # what was written for a list that was never begun
        storage.remove(run.path(blocklist.FOLDER, f"keys-{_next(run.root)}-asked.parquet"))
    salt = (blocklist.salt_of(run.root) or bytes(32)) if found.planned else blocklist.make_salt(run.root)
    asked = [read_list(kind, path, salt) for kind, path in lists.items()]
    wanted = [(one, one.kind == "sha256" if copies is None else copies) for one in asked]
    chosen = forget_select.select(context, wanted, salt, caught)
    fresh = ~hidden.is_hidden(chosen.ids, hidden.forgotten_ids(run.root))
    before = blocklist.load(run.root)
    old_keys = {} if before is None else before.keys
    news = [
        (k, v[~hidden.is_hidden(v, old_keys.get(k, v[:0]))]) for k, v in ((one.key_kind, one.keys) for one in asked)
    ]
    for one in asked:
        unmet = chosen.unmet[one.kind]
        old = int(hidden.is_hidden(unmet, old_keys.get(one.key_kind, unmet[:0])).sum())
        found.known[one.kind], found.unknown[one.kind] = old, len(unmet) - old
    found.images, found.named, found.copies_left = int(fresh.sum()), chosen.named, chosen.copies_left
    found.places = chosen.places
    found.cannot_be_removed = _what_stays(context, chosen)
    if found.planned or not (fresh.any() or any(len(values) for _, values in news)):
        return
    name = _next(run.root)
    if news:
        blocklist.put_keys(run.root, f"{name}-asked", news, 0)
    _save(run.root, name, _begun(name, found, asked, wanted, chosen, caught))
    table = pa.table([pa.array(chosen.ids[fresh]), pa.array(chosen.representatives[fresh])], schema=LIST)
    storage.write_whole(run.path(FORGOTTEN, f"{name}.parquet"), storage.table_bytes(table))
    text = f"{found.images:,} images are hidden from every reader from now on; taking them out of the run"
    context.events.emit("message", NAME, text=text)
    found.certificates.append(_finish(context, name))
    found.removed = certificate(run.root, name)["removed"]


def _begun(
    name: str,
    found: Forgotten,
    asked: Sequence[Asked],
    wanted: Sequence[tuple[Asked, bool]],
    chosen: Selection,
    caught: bool,
) -> dict[str, Any]:
    """The certificate as it begins. No URL, path of an image or plain hash may stand in it."""
    return {
        "format": FORMAT,
        "certificate": name,
        "state": BEGUN,
        "begun": _now(),
        "asked": [
            {
                "kind": one.kind,
                "entries": one.entries,
                "different": len(one.keys),
                "copies": copies,
                "unknown_to_the_run": found.unknown[one.kind],
                "forgotten_before": found.known[one.kind],
            }
            for one, copies in wanted
        ]
        + ([{"kind": "caught by the block list"}] if caught else []),
        "images": found.images,
        "images_named": chosen.named,
        "representatives": int(chosen.representatives.sum()),
        "copies_left_in_the_run": chosen.copies_left,
        "cannot_be_removed": found.cannot_be_removed,
    }


def _what_stays(context: Context, chosen: Selection) -> list[str]:
    """What no program can take out of the world, and what is not the run's to write to."""
    stays = [
        f"{count:,} originals of {source} in files that were imported: they are yours, and are not written to"
        for source, count in sorted(chosen.originals.items())
    ]
    path = context.run.path(PACKED)
    if storage.exists(path):
        packed = json.loads(storage.read_bytes(path))["packed"]
        stays += [
            f"shards of `curate pack` in {place}: pack again into another folder, then delete it" for place in packed
        ]
    return [
        *stays,
        "models trained on a manifest of this run: their checkpoints and what was distilled from them",
        "backups, snapshots and copies of this run, and older versions of its files where the storage keeps them",
        "lists outside the run that name the images: the URL lists it was made from, and the list given now",
    ]


def _next(root: str) -> str:
    """A number for a certificate: one more than those of lists that hide images."""
    taken = [int(p.rsplit("/", 1)[-1].removesuffix(".parquet")) for p in _lists(root)]
    return f"{max(taken, default=0) + 1:04d}"


def _lists(root: str) -> list[str]:
    paths = storage.list_files(storage.join(root, FORGOTTEN), ".parquet")
    return [path for path in paths if path.rsplit("/", 1)[-1].removesuffix(".parquet").isdigit()]


def pending(root: str) -> list[str]:
    """Certificates of what was begun and is not finished."""
    names = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in _lists(root)]
    return [name for name in names if certificate(root, name).get("state") != DONE]


def finish_pending(context: Context) -> list[str]:
    """Finish what was stopped; paths of the certificates. Before anything else is done to a run: a stage that makes a
    part anew must not find what is to go."""
    return [_finish(context, name) for name in pending(context.run.root)]


def certificate(root: str, name: str) -> dict[str, Any]:
    """RUN/forgotten/NAME.json; what can be known where it is gone."""
    path = storage.join(root, FORGOTTEN, f"{name}.json")
    if not storage.exists(path):
        return {"format": FORMAT, "certificate": name, "state": BEGUN, "begun": _now()}
    found: dict[str, Any] = json.loads(storage.read_bytes(path))
    return found


def _save(root: str, name: str, document: Mapping[str, Any]) -> None:
    data = (json.dumps(document, indent=1) + "\n").encode()
    storage.write_whole(storage.join(root, FORGOTTEN, f"{name}.json"), data)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---- taking out -----------------------------------------------------------------------------------------------------


def _finish(context: Context, name: str) -> str:
    """Do all that is left to do for a list that hides images; the path of its certificate under the run."""
    run, salt = context.run, blocklist.make_salt(context.run.root)
    told = certificate(run.root, name)
    path = f"{FORGOTTEN}/{name}.json"
    table = parquet.read_table(run.path(FORGOTTEN, f"{name}.parquet"))
    ids = np.unique(table["image_id"].to_numpy())
    if told["state"] == BEGUN:
        counts = forget_select.block(context, name, ids, salt) if len(ids) else {}
        told |= {"state": BLOCKED, "kept_on_the_block_list": counts}
        _save(run.root, name, told)
    removed: dict[str, Counter[str]] = {}
    if len(ids):
        removal = Removal(run.root, path, ids)
        folders = _stage_folders(run)
        for number, folder in enumerate(folders, 1):
            removed[folder] = _take_out_of_stage(context, folder, removal)
            context.events.emit("part", NAME, part=folder, rows=0, done=number, total=len(folders))
        _remove_assignments(run, removed, path)
        told["elsewhere"] = _elsewhere(context, name, salt, removal)
    told |= {"state": DONE, "finished": _now(), "removed": {stage: dict(c) for stage, c in removed.items() if c}}
    _save(run.root, name, told)
    context.events.emit("message", NAME, text=f"{len(ids):,} images were forgotten: {path}")
    return path


def _stage_folders(run: RunDirectory) -> list[str]:
    """Folders of stages that are there, in the order of the work; the report is not one of them, it is removed."""
    named = [folder for stage in STAGES for pattern in stage.folders for folder in status.folders(run, pattern)]
    return [n for n in named if n != "report" and storage.exists(run.path(n, "_stage.json"))]


def _take_out_of_stage(context: Context, folder: str, removal: Removal) -> Counter[str]:
    """Take the images out of every generation of a stage; what went, summed."""
    directory = context.run.stage(folder)
    total: Counter[str] = Counter()
    for generation in directory.all_generations():
        names = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in part_paths(generation)]
        tasks = [(generation.directory, name) for name in names]
        parts: list[Done] = collect(context, take_out_of_part, tasks, removal)
        for done in parts:
            total.update(done.removed)
        for kind, function in (("list", take_out_of_piece), ("keys", take_out_of_keys)):
            for done in collect(context, function, storage.list_files(generation.file(kind), ".parquet"), removal):
                total.update(done.removed)
        if parts:
            _record(directory, generation, parts, removal.certificate)
    return total


def _record(directory: StageDirectory, generation: Generation, parts: Sequence[Done], certificate_path: str) -> None:
    """New checksums in `_stage.json`, the certificate that says why, and the identity it was made with."""
    identity = generation.digest
    changed = {done.path.rsplit("/", 1)[-1].removesuffix(".parquet"): done for done in parts}
    kept = [_renewed(part, changed.get(part.name)) for part in generation.parts]
    generation.parts = kept
    if generation.complete:
        generation.identity = identity
        if "manifest.json" in generation.files:
            _renew_card(generation, certificate_path)
    if certificate_path not in generation.certificates:
        generation.certificates.append(certificate_path)
    directory.save(generation)


def _renewed(part: PartRecord, done: Done | None) -> PartRecord:
    if done is None:
        return part
    return PartRecord(part.name, done.rows, done.bytes, done.sha256, done.files, part.counts)


def _renew_card(generation: Generation, certificate_path: str) -> None:
    """The data card says how many rows are left; its other counts are those of the making."""
    card = json.loads(storage.read_bytes(generation.file("manifest.json")))
    card["manifest"]["rows"] = sum(part.rows for part in generation.parts)
    card["manifest"]["parts"] = [{"name": p.name, "rows": p.rows, "sha256": p.sha256} for p in generation.parts]
    card["forgotten"] = sorted({*card.get("forgotten", []), certificate_path})
    card.pop("format", None)
    generation.put_file("manifest.json", card_bytes(card))


def _remove_assignments(run: RunDirectory, removed: Mapping[str, Counter[str]], certificate_path: str) -> None:
    """Sketches of copy embeddings that the search kept (`cells/*.npz`): they no longer fit what they were made of."""
    if not any("copy embedding" in what for what in removed.get("score", ())):
        return
    directory = run.stage("dedup-search")
    for generation in directory.all_generations():
        kept = [name for name in generation.files if name.startswith("cells/")]
        if not generation.complete:
            storage.remove_folder(generation.file("cells"))
        if not kept:
            continue
        identity = generation.digest
        for name in kept:
            storage.remove(generation.file(name))
            del generation.files[name]
        generation.identity = identity if generation.complete else None
        if certificate_path not in generation.certificates:
            generation.certificates.append(certificate_path)
        directory.save(generation)


def _elsewhere(context: Context, name: str, salt: bytes, removal: Removal) -> dict[str, Any]:
    """All that is no table of a stage."""
    run = context.run
    forget_elsewhere.remove_leftovers(run.root, _stage_folders(run))
    gone = [folder for folder in ("report", ".index") if forget_elsewhere.remove_folder(run.root, folder)]
    texts = forget_elsewhere.Texts(salt, blocklist.keys_of(run.root, f"{name}-images"))
    decisions = storage.list_files(run.path(hidden.DECIDED), ".parquet")
    rows: Counter[str] = Counter()
    for done in collect(context, take_out_of_table, decisions, removal):
        rows.update(done.removed)
    for path in decisions:
        forget_elsewhere.scrub_notes(path, texts)
    lists = _own_lists(run, texts)
    written = forget_elsewhere.scrub_texts(run.root, texts)
    return {"removed": gone, "rows_of_decisions": rows["rows"], "rows_of_lists": lists, "texts_rewritten": written}


def _own_lists(run: RunDirectory, texts: forget_elsewhere.Texts) -> int:
    """URL lists that lie in the run: what they name goes, and the run knows them by their new digest."""
    changed = 0
    inside = run.root.rstrip("/") + "/"
    sources = run.sources()
    for at, source in enumerate(sources):
        if source.kind != "urls" or not preflight.absolute(source.origin).startswith(inside):
            continue
        found = forget_elsewhere.rewrite_own_list(source, texts)
        if found is not None:
            changed += found[0]
            sources[at] = replace(source, digest=found[1])
            _renew_digest(run, sources, at)
    return changed


def _renew_digest(run: RunDirectory, sources: Sequence[Source], at: int) -> None:
    """The run knows a list by its bytes: `curate run` would refuse another one."""
    data = (json.dumps([asdict(source) for source in sources], indent=1) + "\n").encode()
    storage.write_whole(run.path("sources.json"), data)
    directory = run.stage(sources[at].stage)
    for generation in directory.all_generations():
        if generation.fingerprint.inputs.get("source") == sources[at].number:
            inputs = {**generation.fingerprint.inputs, "list": sources[at].digest}
            generation.fingerprint = replace(generation.fingerprint, inputs=inputs)
            directory.save(generation)


# ---- what follows ---------------------------------------------------------------------------------------------------


def _re_elect(run: RunDirectory, resources: Resources | None, events: Events | None) -> None:
    """Choose representatives anew: everything from dedup on is made again, but the search."""
    from pipelines import add
    from pipelines import run as driver

    config = add.stored(run.root)
    if resources is not None:
        config = config.model_copy(update={"resources": resources})
    driver.run(config, rebuild="dedup", events=events)
