"""Substring scans: streamed, one at a time, cancelled at once, never holding the column."""

import json
import threading
from typing import Any

import numpy as np
import pytest

from pipelines.server import scans
from tests.pipelines.synthetic_run import SyntheticRun
from tests.server.test_index import rows_of


def told(client: Any, **asked: str) -> list[dict[str, Any]]:
    answer = client.get("/api/scan", params=asked)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def test_scan_finds_what_a_naive_search_finds(client: Any, made: SyntheticRun) -> None:
    rows = rows_of(made, "filter")
    for column, text in (("caption", "TURE 1"), ("url", "2.EXAMPLE/5"), ("label", "class-3"), ("caption", "a'b\"<")):
        events = told(client, column=column, text=text)
        wanted = [row["image_id"] for row in rows if text.lower() in (row[column] or "").lower()]
        assert [i for e in events for i in e.get("found", [])] == wanted
        assert events[-1] == {"rows": len(rows), "of": len(rows), "done": "complete"}


def test_hidden_images_are_not_found(made: SyntheticRun) -> None:
    paths = made.run.stage("filter").part_paths()
    hidden = np.array([10, 11], np.uint64)
    events = list(scans.run(paths, "caption", "picture 1", hidden, threading.Event()))
    found = [i for e in events for i in e.get("found", [])]
    assert 1 in found and 12 in found and not {10, 11} & set(found)


def test_second_scan_is_refused_and_the_turn_comes_back(client: Any) -> None:
    turn = client.served.scans.begin()
    assert client.get("/api/scan", params={"text": "x"}).status_code == 409
    assert "under way" in client.get("/scan").text
    client.served.scans.end(turn)
    assert told(client, text="nothing like it")[-1]["done"] == "complete"
    assert not client.served.scans.running


def test_cancelled_scan_stops_before_the_next_piece(made: SyntheticRun) -> None:
    turn = threading.Event()
    events = scans.run(made.run.stage("filter").part_paths(), "caption", "picture", np.empty(0, np.uint64), turn)
    first = next(events)
    turn.set()
    rest = list(events)
    assert first["rows"] == 0 and rest == [{"rows": 0, "of": first["of"], "done": "cancelled"}]


def test_cancel_is_asked_over_http(client: Any) -> None:
    turn = client.served.scans.begin()
    assert client.delete("/api/scan").json() == {"cancelled": True} and turn.is_set()
    client.served.scans.end(turn)
    assert client.delete("/api/scan").json() == {"cancelled": False}


def test_scan_of_everything_stops_at_its_bound(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "MOST_FOUND", 5)
    paths = made.run.stage("filter").part_paths()
    events = list(scans.run(paths, "caption", "picture", np.empty(0, np.uint64), threading.Event()))
    assert len([i for e in events for i in e.get("found", [])]) == 5 and events[-1]["done"] == "enough"


def test_a_client_that_leaves_gives_the_turn_back(client: Any) -> None:
    with client.stream("GET", "/api/scan", params={"text": "picture"}) as answer:
        assert answer.status_code == 200
    assert not client.served.scans.running
