"""More like this: the nearest cells of the index's vectors, with the recall that was measured for that."""

from typing import Any

import numpy as np
from fastapi import HTTPException

from pipelines.server.opened import Opened
from pipelines.server.shown import plain


def space_of(index: Opened, name: str | None) -> str:
    """The space asked for, or the first. Raises HTTPException 404."""
    if not index.spaces or (name and name not in index.spaces):
        raise HTTPException(404, f"spaces: {', '.join(index.spaces) or 'the run has no embeddings'}")
    return name or next((n for n in index.spaces if n != "copies"), "copies")


def similar_to(
    index: Opened, space: str | None, count: int, *, image_id: int | None = None, vector: Any = None
) -> dict[str, Any]:
    """{images with `similarity_to_query`, space, recall, cells, probes}. One of image_id and vector is given."""
    name = space_of(index, space)
    held = index.spaces[name]
    if image_id is not None:
        row = int(index.rows_of_one(image_id))
        vector = held.vector(row) if row >= 0 else None
        if vector is None:
            raise HTTPException(404, f"the image has no vector in {name}")
    elif len(vector) != held.dimension:
        raise HTTPException(422, f"a vector of {len(vector)} dimensions, {held.dimension} expected")
    rows, cosines = held.search(vector, count + 1 + min(len(index.hidden), 100), rotated=image_id is not None)
    by_row = dict(zip(rows.tolist(), cosines.tolist(), strict=True))
    found = []
    for row in index.shown(rows.astype("int64")).tolist():
        entry = index.table.take(np.array([row]))[0]
        if int(entry["image_id"]) != image_id:
            found.append(entry | {"similarity_to_query": round(min(1.0, by_row[row]), 4)})
    document = held.document
    return {
        "images": [plain(entry) for entry in found[:count]],
        "space": name,
        "recall": document["recall"],
        "recall_of_nearest": 10,
        "cells_read": document["probes"],
        "cells": document["cells"],
    }
