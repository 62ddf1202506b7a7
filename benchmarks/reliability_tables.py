"""The tables of docs/reliability.md, from the result files."""

from benchmarks.page_data import Results
from benchmarks.page_tables import table

VICTIMS = {
    "driver": "`curate run`",
    "worker": "a Ray worker",
    "raylet": "the raylet",
    "gcs": "the server of Ray's state",
    "machine": "all of them at once",
}


def chaos(results: Results) -> str:
    """What was killed, and what was lost."""
    document = results.read("chaos")
    if document is None:
        return ""
    counts = document["by_victim"]
    rows: list[list[object]] = [
        ["kills", document["kills"]],
        ["of them " + ", ".join(VICTIMS[name] for name in counts), ", ".join(str(count) for count in counts.values())],
        ["runs brought to their end", document["runs"]],
        ["rows lost", f"**{document['rows_lost']}**"],
        ["rows twice", f"**{document['rows_twice']}**"],
        [f"files of {document['untouched']['files']} that differ from the untouched run", document["files_different"]],
        ["half-written files left behind", document["left_behind"]],
        ["drivers that hung", document["hung"]],
    ]
    stages = ", ".join(f"{name} {count}" for name, count in document["by_stage"].items())
    return (
        table(["", ""], rows)
        + f"\n\nThe stage that had begun last when the kill came: {stages}. `{document['command']}`; an untouched run "
        f"took {document['untouched']['seconds']:.0f} s on two cores with much other work beside it."
    )


def checksums(results: Results) -> str:
    """What checking costs."""
    document = results.read("checksums")
    if document is None:
        return ""
    rows: list[list[object]] = []
    for name, part in document["parts"].items():
        cost = part["cpu_seconds_per_gb"]
        rows.append([f"a part of {name}", *(f"{cost[key]:.2f}" for key in ("read", "read_checked", "sha256"))])
    columns = ["CPU seconds per GB", "read without checking", "read, every page checked", "sha256 of the file"]
    return table(columns, rows) + f"\n\n`{document['command']}`, one thread."
