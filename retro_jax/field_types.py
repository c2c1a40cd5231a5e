"""Values from text against the type hints of config fields: what fits is returned as the field's type, the rest is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin


def convert(value: object, hint: Any) -> object:
    """``value`` as a value of type ``hint``.

    Accepted beyond the exact type: an int for a float, a list for a tuple. A bool is no int.

    Args:
        value: what a config file or an override gives: None, bool, int, float, str, list, tuple or dict of these.
        hint: bool, int, float, str, None, ``Literal``, ``tuple``, ``dict``, or a union of them.

    Raises:
        TypeError: the value does not fit; the message says what it is and what is wanted.
    """
    found, result = _fit(value, hint)
    if not found and get_origin(hint) is Literal:
        raise TypeError(f"{value!r} is not known; choose {describe(hint)}")
    if not found:
        raise TypeError(f"{value!r} is {_noun(value)}, {describe(hint)} is wanted")
    return result


def describe(hint: Any) -> str:
    """The type in a user's words: "an integer", "one of 'a', 'b'", "a tuple of strings"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args) if len(args) > 1 else repr(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a tuple (each entry {describe(args[0])})"
        return f"a tuple ({', '.join(describe(a) for a in args)})"
    if origin is dict:
        return f"a dict from {describe(args[0])} to {describe(args[1])}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def accepts_text(hint: Any) -> type | None:
    """How an unquoted word may be read for a field of this type: ``str``, ``tuple`` (one entry), or None where it may not."""
    for part in _alternatives(hint):
        if part is str or (get_origin(part) is Literal and any(isinstance(a, str) for a in get_args(part))):
            return str
        if get_origin(part) is tuple and get_args(part)[1:] == (Ellipsis,) and accepts_text(get_args(part)[0]) is str:
            return tuple
    return None


def nested_config(hint: Any) -> tuple[type | None, bool]:
    """The dataclass in a field's type (None if it is a plain value), and whether the field may be None."""
    alternatives = _alternatives(hint)
    classes = [a for a in alternatives if dataclasses.is_dataclass(a)]
    return (classes[0] if classes else None), type(None) in alternatives  # type: ignore[return-value]


def config_from_plain(config_class: type, plain: dict) -> Any:
    """The config that :func:`retro_jax.config.resolved` made ``plain`` values (JSON) of.

    Raises:
        TypeError: a value is missing, unknown, or of another type.
    """
    values = {}
    for name, value in plain.items():
        if name not in field_hints(config_class):
            raise TypeError(f"{config_class.__name__} has no {name}")
        nested, _ = nested_config(hint := field_hints(config_class)[name])
        inner = nested is not None and isinstance(value, dict)
        values[name] = config_from_plain(nested, value) if inner else convert(value, hint)  # type: ignore[arg-type]
    return config_class(**values)


@functools.cache
def field_hints(config_class: type) -> dict[str, Any]:
    """The resolved type of every field of a config class."""
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def _alternatives(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fit(value: object, hint: Any) -> tuple[bool, object]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # The exact type first, so that 1 stays an int for int | float.
        for alternative in sorted(args, key=lambda a: a is not type(value)):
            found, result = _fit(value, alternative)
            if found:
                return True, result
        return False, None
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args), value
    if origin is tuple:
        return _fit_tuple(value, args)
    if origin is dict:
        if not isinstance(value, dict):
            return False, None
        items = [(_fit(k, args[0]), _fit(v, args[1])) for k, v in value.items()]
        return all(k[0] and v[0] for k, v in items), {k[1]: v[1] for k, v in items}
    if hint is float:
        return _fit_float(value)
    return type(value) is hint, value


def _fit_tuple(value: object, args: tuple) -> tuple[bool, object]:
    if not isinstance(value, (list, tuple)):
        return False, None
    hints = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
    if len(hints) != len(value):
        return False, None
    entries = [_fit(v, h) for v, h in zip(value, hints, strict=True)]
    return all(e[0] for e in entries), tuple(e[1] for e in entries)


def _fit_float(value: object) -> tuple[bool, object]:
    if type(value) not in (int, float):
        return False, None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return False, None
    return math.isfinite(number), number


def _noun(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    names = {int: "an integer", float: "a number", str: "a string", bool: "a bool", type(None): "None", dict: "a dict"}
    return names.get(type(value), f"a {type(value).__name__}")
