"""What a run no longer shows: images that were forgotten, and images that an auditor dropped.

`RUN/forgotten/*.parquet` is for good; `RUN/decisions/*.parquet` are batches of decisions, of which the last one on an
image counts. Both are small lists beside tables that never change: every reader takes their images away.
"""

import hashlib

import numpy as np
import pyarrow as pa

from curation import parquet, storage
from curation.errors import UserError
from curation.schemas import DECISIONS

FORGOTTEN, DECIDED = "forgotten", "decisions"
"""Folders of a run."""


def hidden_ids(run: str) -> np.ndarray:
    """Ids that no reader may show, uint64, sorted, each once; 8 bytes in memory per hidden image."""
    return np.union1d(forgotten_ids(run), dropped_ids(run))


def forgotten_ids(run: str) -> np.ndarray:
    """Ids under RUN/forgotten, uint64, sorted."""
    found = [_column(path, "image_id") for path in storage.list_files(storage.join(run, FORGOTTEN), ".parquet")]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))


def forgotten_representatives(run: str) -> np.ndarray:
    """Forgotten ids that stood for a component of duplicates, uint64, sorted."""
    found = [np.empty(0, np.uint64)]
    for path in storage.list_files(storage.join(run, FORGOTTEN), ".parquet"):
        table = parquet.read_table(path)
        if "representative" in table.column_names:
            found.append(table.filter(table["representative"])["image_id"].to_numpy())
    return np.unique(np.concatenate(found))


def dropped_ids(run: str) -> np.ndarray:
    """Ids that the last decision under RUN/decisions drops, sorted uint64. Raises UserError for a damaged file."""
    batches = [_decisions(path) for path in storage.list_files(storage.join(run, DECIDED), ".parquet")]
    if not batches:
        return np.empty(0, np.uint64)
    ids, made, drops = (np.concatenate([batch[i] for batch in batches]) for i in range(3))
    order = np.lexsort((np.arange(len(ids)), made, ids))
    last = np.append(ids[order][1:] != ids[order][:-1], True)[: len(ids)]
    return np.asarray(ids[order][last & drops[order]])


def hide(table: pa.Table, hidden: np.ndarray, column: str = "image_id") -> pa.Table:
    """The rows of a table whose id is not among the sorted `hidden`; rows with a null id stay."""
    if not len(hidden) or not table.num_rows:
        return table
    values = table[column]
    ids = np.asarray(values.fill_null(0).to_numpy(), np.uint64)
    shown = ~is_hidden(ids, hidden) | values.is_null().to_numpy(zero_copy_only=False)
    return table if shown.all() else table.filter(pa.array(shown))


def is_hidden(ids: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Which of `ids` are among the sorted `hidden`: bool, of the shape of `ids`."""
    if not len(hidden):
        return np.zeros(ids.shape, bool)
    return np.asarray(hidden[np.minimum(np.searchsorted(hidden, ids), len(hidden) - 1)] == ids)


def digest(hidden: np.ndarray) -> str:
    """Of a list of hidden ids, for fingerprints: what is made without them is other than what was made with them."""
    return hashlib.sha256(np.ascontiguousarray(hidden, np.uint64).tobytes()).hexdigest() if len(hidden) else ""


def _decisions(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image ids, times in microseconds, whether they drop) of a batch; notes decide nothing and are left out."""
    names = ["image_id", "made_at", "action"]
    try:
        table = parquet.open_bytes(storage.read_bytes(path)).read(names)
        table = table.cast(pa.schema([DECISIONS.field(name) for name in names]))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a batch of decisions ({error}); restore or remove it", exit_code=1) from error
    action = np.asarray(table["action"].to_numpy(zero_copy_only=False), str)
    counts = (action != "note") & ~table["image_id"].is_null().to_numpy(zero_copy_only=False)
    ids = np.asarray(table["image_id"].fill_null(0).to_numpy(), np.uint64)
    made = table["made_at"].cast(pa.int64()).to_numpy()
    return ids[counts], made[counts], (action == "drop")[counts]


def _column(path: str, name: str) -> np.ndarray:
    try:
        table = parquet.open_bytes(storage.read_bytes(path)).read([name])
        return np.asarray(table[name].to_numpy(), np.uint64)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a list of forgotten images ({error}); restore it", exit_code=1) from error
