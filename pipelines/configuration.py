"""The YAML of a run: one block per stage, each block the options of that stage's command.

Errors name the key, the file and the line.
"""

import re
import typing
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from curation import storage
from curation.errors import UserError
from pipelines.context import Resources, StageConfig
from pipelines.stages.balance import BalanceConfig
from pipelines.stages.cluster import ClusterConfig
from pipelines.stages.dedup import DedupConfig
from pipelines.stages.download import DownloadConfig
from pipelines.stages.embed import EmbedConfig
from pipelines.stages.filter import FilterConfig
from pipelines.stages.manifest import ManifestConfig
from pipelines.stages.mix import MixConfig
from pipelines.stages.report import ReportConfig
from pipelines.stages.retrieve import RetrieveConfig

MAX_BYTES = 1 << 18
MAX_VALUES = 100_000
MAX_DEPTH = 50
"""What a configuration may hold, aliases counted as often as they are used: ten lines of aliases can mean a billion."""
ROLE = re.compile(r"^(pool|seed|reference)(:[A-Za-z0-9][A-Za-z0-9._-]*)?$")
"""pool, pool:NAME, seed:NAME or reference:NAME; a name is letters, digits, `.`, `_` and `-`."""


class SourceConfig(StageConfig):
    """Where images come from: exactly one of urls, folder, tars, parquet."""

    role: str = Field(
        alias="as",
        pattern=ROLE.pattern,
        description="pool, pool:NAME, seed:NAME or reference:NAME (what the images are for)",
    )
    urls: str | None = Field(None, description="URL list to download: text, CSV or Parquet")
    folder: str | None = Field(None, description="folder of images; a sub-folder's name is the label")
    tars: str | None = Field(None, description="folder of webdataset tars")
    parquet: str | None = Field(None, description="Parquet with a column `path`")
    licence: str | None = Field(None, description="licence of the images, for the data card")
    exempt: bool = Field(False, description="seed set that enters the manifest without filter and decontamination")
    label_column: str | None = Field(
        None, description="column of a Parquet (of paths, or beside tars) that holds labels, for the audit"
    )
    images: int | None = Field(None, ge=0, description="expected number of images, for --plan without data")
    retrieves: int | None = Field(
        None, ge=0, description="expected number of images that this seed set draws, for --plan; default: its bound"
    )

    @property
    def origin(self) -> tuple[Literal["urls", "folder", "tars", "parquet"], str]:
        """(kind, path) of the one that is given."""
        kinds: tuple[Literal["urls", "folder", "tars", "parquet"], ...] = ("urls", "folder", "tars", "parquet")
        given = [(kind, value) for kind in kinds if (value := getattr(self, kind)) is not None]
        return given[0]

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        given = [k for k in ("urls", "folder", "tars", "parquet") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of urls, folder, tars, parquet (given: {', '.join(given) or 'none'})")
        if self.role != "pool" and ":" not in self.role:
            raise ValueError(f"`as: {self.role}` needs a name: {self.role}:NAME")
        return self


class RunConfig(StageConfig):
    """A whole run. A block that is missing or empty takes its defaults; `cluster: null` leaves a stage out."""

    run: str = Field(description="the run directory: a path or an fsspec URL such as s3://bucket/run")
    seed: int = Field(0, ge=0, description="of every random choice")
    sources: list[SourceConfig] = Field(default_factory=list, description="pool, seed and reference images")
    resources: Resources = Field(default_factory=Resources)  # type: ignore[arg-type]
    download: DownloadConfig = Field(default_factory=DownloadConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    cluster: ClusterConfig | None = Field(default_factory=ClusterConfig)
    retrieve: RetrieveConfig | None = Field(default_factory=RetrieveConfig)
    balance: BalanceConfig | None = None
    mix: MixConfig = Field(default_factory=MixConfig)
    manifest: ManifestConfig = Field(default_factory=ManifestConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key that is no plain word", problem_mark=key_node.start_mark)
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is written twice", problem_mark=key_node.start_mark)
        seen[key] = key_node.start_mark.line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: str) -> RunConfig:
    """Read and check a run's YAML. Raises UserError that names the key and the line."""
    if not storage.exists(path):
        raise UserError(f"{path}: no such configuration; `curate init` writes a commented one")
    document, text = read_mapping(path)
    return check(RunConfig, document | {name: {} for name in _empty_blocks(text)}, path, lines_of(text))


def read_mapping(path: str) -> tuple[dict[str, Any], str]:
    """A YAML file that holds a mapping of blocks, and its text. Raises UserError that names the line."""
    try:
        data = storage.read_bytes(path, 0, MAX_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 10} KiB, which no configuration is")
    if _brackets(text) > 4 * MAX_DEPTH:  # PyYAML takes the square of their number
        raise UserError(f"{path}: not valid YAML (nested too deep)")
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader), path)
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem})") from error
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deep)") from None
    except UserError:
        raise
    except Exception as error:  # PyYAML lets through whatever its constructors raise on values they cannot read
        raise UserError(f"{path}: not valid YAML ({(str(error) or type(error).__name__).splitlines()[0]})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: a configuration is a mapping of blocks; `curate init` writes an example")
    return document, text


def _brackets(text: str) -> int:
    """The most brackets that are open at once, those in quotes counted too."""
    deepest = depth = 0
    for sign in re.findall(r"[\[{\]}]", text):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_size(root: yaml.Node | None, path: str) -> None:
    """Refuse aliases that contain themselves, and what grows beyond all bounds when aliases are followed."""
    known: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node, above: frozenset[int]) -> tuple[int, int]:
        """(values, levels) of a node, aliases followed."""
        if id(node) in above:
            raise UserError(f"{path} line {node.start_mark.line + 1}: an alias that contains itself")
        if id(node) not in known:
            children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            found = [measure(part, above | {id(node)}) for part in parts]
            known[id(node)] = (
                1 + sum(values for values, _ in found),
                1 + max((levels for _, levels in found), default=0),
            )
            if known[id(node)][1] > MAX_DEPTH:
                raise UserError(f"{path} line {node.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        return known[id(node)]

    if root is not None and measure(root, frozenset())[0] > MAX_VALUES:
        raise UserError(f"{path}: its aliases mean more than {MAX_VALUES:,} values")


def _empty_blocks(text: str) -> list[str]:
    """Blocks with nothing in them, every line commented out, say: they mean defaults, unlike `null`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    blocks = {name for name, info in RunConfig.model_fields.items() if _model_in(info.annotation) and name != "sources"}
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return [key.value for key, value in pairs if key.value in blocks and value.value == ""]


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, as stored in RUN/run.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_none=False), sort_keys=False)


def check[M: BaseModel](
    model: type[M], document: Any, where: str, lines: dict[tuple[Any, ...], int] | None = None
) -> M:
    """Validate; the first error as one sentence, further ones counted."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first, *others = error.errors()
        sentence = describe_error(first["loc"], first, model)
        line = _line_of(first["loc"], lines or {})
        place = f" in {where}" + (f" line {line}" if line else "") if where else ""
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{sentence}{place}{more}") from None


def describe_error(location: tuple[Any, ...], error: Any, model: type[BaseModel]) -> str:
    """`dedup.threshold: 1.6 ...` from a pydantic error."""
    name = ".".join(str(part) for part in location) or "configuration"
    value = error.get("input")
    shown = "" if isinstance(value, (dict, list)) or error["type"] == "missing" else f" {value!r}"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key{_suggest(location, model)}"
    if error["type"] == "missing":
        return f"{name}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}:{shown} {'is refused: ' if shown else ''}{message[0].lower() + message[1:]}"


def _suggest(location: tuple[Any, ...], model: type[BaseModel]) -> str:
    import difflib

    current: Any = model
    for part in location[:-1]:
        current = _below(current, part)
    current = _model_in(current)
    if current is None:
        return ""
    known = [f.alias or n for n, f in current.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, 1)
    return f", did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def _below(kind: Any, part: Any) -> Any:
    """The annotation of a model's field, or of an element of a list or mapping."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {f.alias or n: f.annotation for n, f in kind.model_fields.items()}.get(part)
    if typing.get_origin(kind) in (list, dict):
        return typing.get_args(kind)[-1]
    return next((found for a in typing.get_args(kind) if (found := _below(a, part)) is not None), None)


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The model of an annotation such as `X | None`, `list[X]` or `dict[str, X]`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for a in typing.get_args(kind) if (found := _model_in(a)) is not None), None)


def lines_of(text: str) -> dict[tuple[Any, ...], int]:
    """The line of every key, by its path."""
    found: dict[tuple[Any, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[Any, ...]) -> None:
        if node is None:
            return
        found.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, index))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found


def _line_of(location: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> int | None:
    for end in range(len(location), 0, -1):
        if location[:end] in lines:
            return lines[location[:end]]
    return None
