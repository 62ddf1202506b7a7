"""What a run will cost before it is started: rows, bytes, FLOP, CPU seconds, memory and hours of every stage.

Arithmetic on the configuration, on the counts of the sources (`pipelines/plan_counts.py`), on what the stages do with
them (`pipelines/plan_stages.py`) and on the assumptions and measured rates of `pipelines/hardware.py`. Each line of the
arithmetic can be printed.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines import plan_stages
from pipelines import run as driver
from pipelines.configuration import RunConfig
from pipelines.hardware import ASSUMPTIONS, KNOWN, Assumption, Hardware
from pipelines.plan_counts import SeedSetPlan, balance_target, count_sources, nominal_counts, plan_seed_sets
from pipelines.plan_stages import PLANNERS, StagePlan


@dataclass
class Plan:
    """A whole run on some hardware."""

    run: str
    hardware: Hardware
    stages: list[StagePlan]
    seed_sets: list[SeedSetPlan]
    nominal: dict[str, int]
    notes: list[str]
    assumptions: tuple[Assumption, ...] = ASSUMPTIONS

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def bytes_written(self) -> float:
        return sum(stage.bytes_written for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"hours": self.hours, "bytes_written": self.bytes_written}


def plan(config: RunConfig, hardware: Hardware, *, first: str | None = None, last: str | None = None) -> Plan:
    """Plan the stages that would run. Raises UserError where a source cannot be counted."""
    notes: list[str] = []
    counts = count_sources(config.sources, notes)
    seed_sets = plan_seed_sets(config, counts)
    balanced = balance_target(config, counts)
    nominal = nominal_counts(seed_sets, balanced)
    stages = []
    for stage in driver.selected(config, first, last):
        if stage.name == "download":
            stages += plan_stages.ingest(config, counts)
        else:
            stages.append(PLANNERS[stage.name](config, counts, seed_sets, nominal))
    for planned in stages:
        _time(planned, hardware)
    notes += _warnings(config, hardware, stages)
    return Plan(config.run, hardware, stages, seed_sets, nominal, notes)


DECODING = {"filter", "embed"}


def _time(planned: StagePlan, hardware: Hardware) -> None:
    """Hours and what they are spent on. Network, disk, GPUs and CPUs overlap; without GPUs all computing adds up."""
    cores = (planned.cpu_seconds - planned.serial_seconds) / hardware.cores + planned.serial_seconds
    seconds = {
        "disk": (planned.bytes_read + planned.bytes_written) / (hardware.nodes * hardware.disk_bytes_s),
        "GPUs" if hardware.gpus else "computing": planned.flop / hardware.flop_s,
    }
    if hardware.gpus:
        seconds["CPUs"] = cores
    else:
        seconds["computing"] += cores
    if planned.stage == "download":
        seconds["disk"] = planned.bytes_written / (hardware.nodes * hardware.disk_bytes_s)
        seconds["network"] = planned.bytes_read / (hardware.nodes * hardware.network_bytes_s)
        seconds["slow hosts"] = planned.rows_in / (hardware.cores * KNOWN["download_rate"])
    if planned.stage in DECODING:
        decoding = planned.rows_in / (hardware.cores * KNOWN["decode_rate"])
        if hardware.gpus:
            seconds["decoding"] = decoding
        else:
            seconds["computing"] += decoding
    planned.bound, longest = max(seconds.items(), key=lambda item: item[1])
    planned.hours = longest / 3600
    if planned.cpu_seconds:
        planned.arithmetic.append(
            f"CPU: {planned.cpu_seconds:,.3g} s / {hardware.cores:,} cores"
            + (f", {planned.serial_seconds:,.3g} s of it on one" if planned.serial_seconds else "")
            + f" = {cores / 3600:.2g} h"
        )
    each = ", ".join(f"{what} {value / 3600:.2g} h" for what, value in seconds.items() if value)
    planned.arithmetic.append(f"time: {each}; the longest counts")


def _warnings(config: RunConfig, hardware: Hardware, stages: list[StagePlan]) -> list[str]:
    notes = []
    for planned in stages:
        allowed = config.resources.of_stage(planned.stage.split("/")[0])
        if planned.memory_per_worker > allowed.memory_bytes:
            notes.append(
                f"{planned.stage} needs about {planned.memory_per_worker / 2**30:,.1f} GiB per worker, "
                f"resources.memory_per_worker is {allowed.memory_per_worker}"
            )
    return notes
