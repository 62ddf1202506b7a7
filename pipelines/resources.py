"""What a task may use and asks for: the options that never change a result. And the base of all options."""

import difflib
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, field_validator

from pipelines import catalog


class StageConfig(BaseModel):
    """Base of every stage's options: unknown keys are refused, `affects_output` false leaves the fingerprint."""

    model_config = ConfigDict(extra="forbid")

    def fingerprint_options(self) -> dict[str, Any]:
        """The options that can change output."""
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if (type(self).model_fields[name].json_schema_extra or {}).get("affects_output", True)  # type: ignore[union-attr]
        }


RESERVED = ("CPU", "GPU", "memory", "object_store_memory")
"""Ray's own names of resources: they have keys of their own here."""


def _checked_size(text: str) -> str:
    if TypeAdapter(ByteSize).validate_python(text) < 1 << 26:
        raise ValueError("less than 64MiB is too little for any task")
    return text


class StageResources(StageConfig):
    """What one task of a stage asks of a machine. What is left out keeps its default."""

    cpus: float | None = Field(
        None, gt=0, le=1024, description="CPU cores of one task; default: 1 (about half for a task of an image pass)"
    )
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs, or the share of one, of a task that uses one; default: tasks_per_gpu, 1"
    )
    memory: str | None = Field(
        None, description="kept free for each task by Ray, and memory_per_worker of this stage, e.g. 16GiB"
    )
    custom: dict[str, float] = Field(
        default_factory=dict, description="custom resources of the cluster, e.g. {egress: 1}; not asked for locally"
    )

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        return text and _checked_size(text)

    @field_validator("gpus")
    @classmethod
    def _is_a_share(cls, value: float | None) -> float | None:
        return value and _whole_above_one("GPUs", value)

    @field_validator("custom")
    @classmethod
    def _are_custom(cls, values: dict[str, float]) -> dict[str, float]:
        for name, value in values.items():
            if name in RESERVED or not name.strip():
                raise ValueError(f"`{name}` is no custom resource; cpus, gpus and memory have keys of their own")
            if not 0 < value < 1 << 40:
                raise ValueError(f"`{name}: {value:g}` must be above 0")
            _whole_above_one(name, value)
        return values

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else int(TypeAdapter(ByteSize).validate_python(self.memory))


def _whole_above_one(name: str, value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"{value:g} {name}: above 1 Ray lends whole ones only")
    return value


class Resources(StageConfig):
    """Where the work runs and what it may use; never part of a fingerprint."""

    ray_address: str | None = Field(None, description="Ray cluster to use (`auto`, `ray://host:10001`); default: local")
    workers: int | None = Field(None, ge=1, description="CPU cores to use locally; default: all of them")
    memory_per_worker: str = Field("4GiB", description="memory one task may use, e.g. 4GiB")
    tasks_per_gpu: int = Field(
        8,
        ge=0,
        le=1000,
        description="tasks of products (exact joins, k-means, exact search) that share a GPU; 0: none uses one",
    )
    scratch: str | None = Field(
        None, description="folder that all machines see, for dedup's scratch where the run is on an object store"
    )
    stages: dict[str, StageResources] = Field(
        default_factory=dict, description="what a task of a stage asks for, by the stage's name"
    )

    @field_validator("memory_per_worker")
    @classmethod
    def _is_a_size(cls, text: str) -> str:
        return _checked_size(text)

    @field_validator("stages")
    @classmethod
    def _are_stages(cls, stages: dict[str, StageResources]) -> dict[str, StageResources]:
        for name in stages:
            if name not in catalog.NAMES:
                close = difflib.get_close_matches(name, catalog.NAMES, 1)
                hint = f"did you mean `{close[0]}`?" if close else f"the stages are {', '.join(catalog.NAMES)}"
                raise ValueError(f"`{name}` is no stage; {hint}")
        return stages

    def of_stage(self, name: str) -> "Resources":
        """The same with the memory of a stage's own entry, where it has one."""
        asked = self.stages.get(name)
        memory = asked.memory if asked is not None else None
        return self.model_copy(update={"memory_per_worker": memory or self.memory_per_worker})

    @property
    def memory_bytes(self) -> int:
        """`memory_per_worker` in bytes."""
        return int(TypeAdapter(ByteSize).validate_python(self.memory_per_worker))
