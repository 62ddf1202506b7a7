"""A stage's command-line options, made from its configuration class: one definition for both."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cli.terminal import handle_errors


def config_options(model: type[BaseModel], *, leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a command function that takes `overrides: dict` with one option per simple field of `model`.

    `overrides` holds only what the user gave, by field name. Fields of nested models and mappings stay in YAML.
    """
    fields = {
        name: kind
        for name, info in model.model_fields.items()
        if name not in leave_out and (kind := _option_type(info)) is not None
    }

    def decorate(function: Callable[..., Any]) -> Any:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "overrides"]
        taken = {p.name for p in own}
        made = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, _option(name, model.model_fields[name])],
            )
            for name, kind in fields.items()
            if name not in taken
        ]

        @functools.wraps(function)
        def command(**arguments: Any) -> Any:
            overrides = {p.name: arguments.pop(p.name) for p in made}
            given = {name: value for name, value in overrides.items() if value is not None and value != []}
            return handle_errors(functools.partial(function, **arguments, overrides=given))

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = signature.replace(parameters=[*keyword_only, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *made]}
        return command

    return decorate


def _option(name: str, info: FieldInfo) -> Any:
    default = "" if info.is_required() else f" [default: {_shown(info.get_default(call_default_factory=True))}]"
    flag = "--" + name.replace("_", "-")
    declarations = (f"{flag}/--no-{flag[2:]}",) if _option_type(info) is bool else (flag,)
    return typer.Option(*declarations, help=(info.description or "") + default, show_default=False)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value) or "none"
    return str(value)


def _option_type(info: FieldInfo) -> Any:
    """The type typer understands, or None for what only YAML can say. Lists of simple values are comma-separated."""
    kind = info.annotation
    if typing.get_origin(kind) in (Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        if len(inner) != 1:
            return str if all(i in (str, int, float) for i in inner) else None
        kind = inner[0]
    if kind in (str, int, float, bool):
        return kind
    origin = typing.get_origin(kind)
    if origin is Literal:
        return kind
    if origin in (list, tuple):
        simple = all(a in (str, int, float, Ellipsis) for a in typing.get_args(kind))
        return str if simple else None
    return None


def split_lists(model: type[BaseModel], overrides: dict[str, Any]) -> dict[str, Any]:
    """Turn comma-separated option values into the lists that the configuration class expects."""
    result = {}
    for name, value in overrides.items():
        kind: Any = model.model_fields[name].annotation
        arguments = [kind, *typing.get_args(kind)]
        is_list = any(typing.get_origin(a) in (list, tuple) for a in arguments)
        result[name] = (
            [v.strip() for v in value.split(",") if v.strip()] if is_list and isinstance(value, str) else value
        )
    return result
