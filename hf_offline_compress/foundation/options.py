"""Options of a call as one frozen dataclass: a field is an argument in Python, its help, and an option of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any, TypeVar

Options = TypeVar("Options")
Function = TypeVar("Function", bound=Callable[..., Any])


def option(default: Any, text: str, *, cli: Any = None, **more: Any) -> Any:
    """Return a field of an options dataclass.

    Args:
        default: of the argument and the option.
        text: what it is for; the one place that says it.
        cli: type that it has on the command line; None for what only Python can pass.
        more: what the command line says otherwise: `help`, `min`, `name`.
    """
    return field(default=default, metadata={"text": text, "cli": cli, **more})


def chosen(kind: type[Options], options: Options | None, changes: Mapping[str, Any]) -> Options:
    """Return the options with changes made to them.

    Raises:
        TypeError: a change has no such field, as for any unknown argument; or the options are of another kind.
    """
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"options must be {kind.__name__}, not {type(options).__name__}")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"unexpected keyword argument '{unknown[0]}'; known are {', '.join(known)}")
    start: Any = kind() if options is None else options
    return replace(start, **changes) if changes else start


def documented(kind: type[Any]) -> Callable[[Function], Function]:
    """Return a decorator that shows the fields of an options dataclass as keywords of a function that takes `**changes`.

    `help()`, editors and the documentation then see them with their defaults; their texts are put where the docstring
    says `{options}`.
    """

    def decorate(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if item.default is MISSING else item.default,
                annotation=item.type,
            )
            for item in fields(kind)
        ]
        function.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
        lines = [f"        {item.name}: {item.metadata['text']}" for item in fields(kind)]
        function.__doc__ = (function.__doc__ or "").replace("        {options}", "\n".join(lines))
        return function

    return decorate
