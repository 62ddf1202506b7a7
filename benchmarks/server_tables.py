"""The tables of docs/server.md, from the result file."""

from typing import Any

from benchmarks.page_data import Results
from benchmarks.page_tables import table


def _size(rows: str) -> str:
    return f"{int(rows) // 1_000_000} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def answers(results: Results) -> str:
    """How long whole answers take under several users, and the server's CPU time for each."""
    document = results.read("serve")
    if document is None:
        return ""
    sizes: dict[str, dict[str, Any]] = document["sizes"]
    columns = [
        "asked for",
        "limit, s",
        *(f"p95 s, {_size(rows)}" for rows in sizes),
        *(f"CPU ms, {_size(rows)}" for rows in sizes),
    ]
    rows: list[list[object]] = []
    late = []
    for kind, found in next(iter(sizes.values()))["kinds"].items():
        of_size = [entry["kinds"][kind] for entry in sizes.values()]
        rows.append(
            [
                kind,
                f"{found['limit_s']:g}",
                *(f"{one['p95_s']:.2f}" for one in of_size),
                *(f"{1000 * one['server_cpu_s']:.0f}" for one in of_size),
            ]
        )
        late += [
            f"{kind} at {_size(size)} ({one['p95_s']:.2f} s)"
            for size, one in zip(sizes, of_size, strict=True)
            if one["p95_s"] > one["limit_s"]
        ]
    loads = ", ".join(f"{entry['machine']['load_average'][0]:.1f}" for entry in sizes.values())
    users = next(iter(sizes.values()))["users"]
    said = f"Beyond its limit: {', '.join(late)}." if late else "Every limit is kept."
    return (
        table(columns, rows)
        + f"\n\n{users} users ask at once, each at once again; load averages at the ends, these users and the server "
        f"included: {loads}. {said}"
    )


def index(results: Results) -> str:
    """What the index costs, and a scan; with what is projected."""
    document = results.read("serve")
    if document is None:
        return ""
    entries: list[dict[str, Any]] = list(document["sizes"].values())
    figures = document["projection"]["figures"]

    def line(name: str, values: list[str], projected: str = "") -> list[object]:
        return [name, *values, projected]

    def expected(name: str, show: Any) -> str:
        found = figures[name]
        return f"{show(found['projected'])} (exponent {found['exponent']:.2f})"

    spaces = [next(iter(entry["index"]["spaces"].values())) for entry in entries]
    rows = [
        line(
            "index, CPU seconds",
            [f"{entry['index']['cpu_seconds']:,.0f}" for entry in entries],
            expected("index CPU seconds", lambda x: f"{x:,.0f}"),
        ),
        line(
            "index on disk",
            [_gigabytes(entry["index"]["bytes"]) for entry in entries],
            expected("index bytes", _gigabytes),
        ),
        line("memory while it is made, peak", [_gigabytes(entry["index"]["peak_bytes"]) for entry in entries]),
        line(
            "memory of the server, peak",
            [_gigabytes(entry["server_peak_bytes"]) for entry in entries],
            expected("server peak bytes", _gigabytes),
        ),
        line(
            "scan of all alt texts, s",
            [f"{entry['scan']['seconds']:.1f}" for entry in entries],
            expected("scan seconds", lambda x: f"{x:,.0f}"),
        ),
        line("a cancelled scan ends after, s", [f"{entry['scan']['cancelled_after_s']:.2f}" for entry in entries]),
        line("recall of the 10 nearest", [f"{space['recall']:.3f}" for space in spaces]),
        line("cells read for it", [f"{space['probes']:,} of {space['cells']:,}" for space in spaces]),
    ]
    columns = ["rows", *(f"{entry['rows']:,}" for entry in entries), f"{document['projection']['rows']:,}, projected"]
    return table(columns, rows)


def words(results: Results) -> str:
    """Our index of words beside SQLite's."""
    document = results.read("serve")
    if document is None or "words" not in document:
        return ""
    found = document["words"]
    rows: list[list[object]] = [
        [name, f"{one['bytes'] / 1e6:.0f} MB", *(f"{1000 * one[f'p{q}_s']:.1f}" for q in (50, 95, 99))]
        for name, one in (("ours", found["ours"]), ("SQLite FTS5", found["fts5"]))
    ]
    return (
        table(["index of words", "size", "p50 ms", "p95 ms", "p99 ms"], rows)
        + f"\n\n{found['questions']} questions of one to three words over {found['rows']:,} rows, in one process; "
        "both name the same images; ours has read their rows as well, SQLite gives ids alone."
    )
