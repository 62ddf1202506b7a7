"""The tables of docs/training.md, from the result files."""

from typing import Any

from benchmarks.page_data import Results
from benchmarks.page_tables import table

SETS = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}


def learns(results: Results) -> str:
    """k-NN accuracy before and after, and what else there is."""
    document = results.read("train_learns")
    if document is None:
        return ""
    sets = document["sets"]
    rows: list[list[object]] = []
    for row in document["seeds"]:
        for state, name in (("random", "as it begins"), ("trained", f"after {document['steps']} steps")):
            rows.append([f"seed {row['seed']}, {name}", *(interval(row[state][key]) for key in sets)])
    for state, name in (("random", "all seeds, as they begin"), ("trained", "all seeds, trained")):
        rows.append([name, *(f"**{sets[key][state]['mean']:.3f}**" for key in sets)])
    names = {"pixels": "raw pixels", "mobilenet_v2": "MobileNetV2, trained on ImageNet with labels"}
    rows += [[names[one], *(interval(found[key]) for key in sets)] for one, found in document["references"].items()]
    for one, name in (
        ("distilled", "a smaller student of seed 0's teacher"),
        ("from_scratch", "the same from scratch"),
    ):
        if "distillation" in document:
            rows.append([name, *(interval(document["distillation"][one][key]) for key in sets)])
    asked, cost = document["evaluation"], [row["cpu_seconds"] / 60 for row in document["seeds"]]
    return (
        table([f"{document['neighbours']}-NN accuracy (95 %)", *(SETS[key] for key in sets)], rows)
        + f"\n\n{asked['train']:,} labelled images vote, {asked['test']:,} are asked. A training with both of its "
        f"evaluations took {min(cost):.0f} to {max(cost):.0f} CPU minutes, {sum(cost):.0f} in all; everything "
        f"{document['seconds'] / 60:.0f} minutes of two cores with other work beside it."
    )


def interval(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def step(results: Results) -> str:
    """One training step beside lightly's components."""
    document = results.read("train_step")
    if document is None:
        return ""
    rows = [
        [
            one["drop_path"],
            *(f"{one[who]['cpu_seconds_per_step']:.2f}" for who in ("ours", "lightly")),
            f"{one['time_ratio']:.2f}",
            f"{one['memory_ratio']:.2f}",
        ]
        for one in document["results"]
    ]
    return table(["drop path", "ours, CPU s per step", "lightly", "time, ours over theirs", "peak memory"], rows)
