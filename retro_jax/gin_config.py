"""From gin files and overrides to one checked Config: the only file that imports gin, and of gin only the parser.

gin's own registry accepts wrong types, unused bindings and double bindings in silence; here its grammar is kept and the rest
is done with the dataclasses of :mod:`retro_jax.config`, which know nothing of gin. No global state is touched.

* ``Class.field = value`` sets a field, ``NAME = value`` a macro that is used as ``%NAME``.
* ``include 'other.gin'``, relative to the including file, stands above the bindings.
* A field or macro is set once in a file. A file may set anew what a file that it includes sets, and ``--set`` what any file
  sets; two files of which neither includes the other may not set the same.
* ``ModelConfig.retro = None`` makes a GPT: bindings of the classes that this takes away are dropped where they stand in a
  file that the one with ``None`` includes, and an error elsewhere. ``ModelConfig.retro = @RetroConfig()`` brings it back.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin.config_parser import BindingStatement, BlockDeclaration, ConfigParser, IncludeStatement, ParserDelegate

from retro_jax.config import Config, ModelConfig, resolved
from retro_jax.errors import UserError
from retro_jax.field_types import accepts_text, convert, describe, field_hints, nested_config

SUFFIX = ".gin"
CONFIG_FOLDERS = (Path("configs"), Path(__file__).resolve().parent.parent / "configs")


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The config that the files and overrides describe; what they leave out has its default.

    Args:
        files: paths of gin files, or names of files in ``configs/`` ("quickstart").
        overrides: ``Class.field=value`` or ``MACRO=value``, in gin's syntax; text that is to be a string, or the only entry of
            a tuple of strings, need not be quoted.

    Raises:
        UserError: a file is missing or malformed, or a setting is unknown, of the wrong type, set twice, unused or
            contradicts another; the message names file and line, or the override.
    """
    paths = [find_config(file).resolve() for file in files]
    parsed: dict[Path, _File] = {}
    for path in paths:
        _parse_file(path, parsed, ())
    bindings = [binding for file in parsed.values() for binding in file.bindings]
    bindings += [_parse_override(text) for text in overrides]
    macros = _Macros(_winners([b for b in bindings if not b.config_class], parsed), bindings)
    settings = [b for b in bindings if b.config_class]
    builder = _Builder(_winners(settings, parsed), macros, " and ".join(map(_shown, paths)) or "the config")
    config = builder.build(Config)
    _refuse_unused(settings, builder, parsed)
    return config


def config_text(config: Config | ModelConfig) -> str:
    """Every setting of the config, or of its model alone, default or not, in gin's syntax and in a fixed order:
    :func:`load_config` reads it back."""
    sections: dict[type, str] = {}
    _write_section(config, sections)
    return "\n".join(sections.values())


def config_json(config: Config) -> str:
    """The config as JSON text, nested as the dataclasses are."""
    return json.dumps(resolved(config), indent=2) + "\n"


def find_config(file: str | Path) -> Path:
    """The path of a config file given by its path, or by its name in ``configs/``.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    path = Path(file)
    if path.is_file():
        return path
    if path.parent == Path("."):
        for folder in CONFIG_FOLDERS:
            for candidate in (folder / path.name, folder / (path.name + SUFFIX)):
                if candidate.is_file():
                    return candidate
    names = sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob(f"*{SUFFIX}")})
    near = difflib.get_close_matches(path.stem, names, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"config file {str(file)!r} is not there; {guess}configs/ has {', '.join(names) or 'none'}")


@dataclass(frozen=True)
class _Place:
    """Where a binding stands: a line of a file, or an override (path None)."""

    path: Path | None
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{_shown(self.path)}:{self.line}" if self.path else f"--set {self.text}"


@dataclass(frozen=True)
class _Binding:
    """One ``Class.field = value``, or ``NAME = value`` with an empty class."""

    place: _Place
    config_class: str
    name: str
    value: Any

    @property
    def key(self) -> tuple[str, str]:
        return self.config_class, self.name

    def __str__(self) -> str:
        return f"{self.config_class}.{self.name}" if self.config_class else f"macro {self.name}"


@dataclass(frozen=True)
class _Macro:
    name: str


@dataclass(frozen=True)
class _Reference:
    name: str
    evaluate: bool

    def __repr__(self) -> str:
        return f"@{self.name}{'()' * self.evaluate}"


class _Delegate(ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


@dataclass
class _File:
    """A parsed file and all the files that it includes, directly or not."""

    bindings: list[_Binding]
    includes: set[Path]


def _parse_file(path: Path, parsed: dict[Path, _File], parents: tuple[Path, ...]) -> None:
    if path in parents:
        raise UserError(f"{_shown(parents[-1])} includes {_shown(path)}, which includes it in turn; remove one of the includes")
    if path in parsed:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"config file {_shown(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    file = _File([], set())
    for statement in _statements(text, path):
        place = _Place(path, statement.location.line_num)
        if isinstance(statement, IncludeStatement):
            if file.bindings:
                raise UserError(f"{place} includes {statement.filename!r} below a binding; move it to the top of the file")
            other = _included(statement.filename, path, place)
            _parse_file(other, parsed, (*parents, path))
            file.includes |= {other} | parsed[other].includes
        elif isinstance(statement, BindingStatement):
            file.bindings.append(_binding(statement, place))
        elif not isinstance(statement, BlockDeclaration):
            raise UserError(f"{place} imports a module, which configs here do not do; every setting is a Class.field")
    parsed[path] = file


def _included(name: str, path: Path, place: _Place) -> Path:
    other = (path.parent / name).resolve()
    if not other.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob(f"*{SUFFIX}")))
        raise UserError(f"{place} includes {name!r}, but {_shown(other)} is not there; beside it there are {there}")
    return other


def _parse_override(text: str) -> _Binding:
    place = _Place(None, 0, " ".join(text.split()))
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name):
        raise UserError(f"{place} is not of the form Class.field=value, for example --set TrainConfig.steps=100")
    if "." in name:
        config_class, field_name = name.split(".")
        hint = _known_hint(_Binding(place, config_class, field_name, None))
        form = accepts_text(hint)
        if form and not re.match(r"[-(\[{'\"@%\d]|(None|True|False)$", value):
            return _Binding(place, config_class, field_name, value if form is str else (value,))
    statements = list(_statements(f"{name} = {value}", place))
    if len(statements) != 1 or not isinstance(statements[0], BindingStatement):
        raise UserError(f"{place} holds more than one value; give each setting a --set of its own")
    return _binding(statements[0], place)


def _statements(text: str, origin: Path | _Place) -> Iterator[Any]:
    line, message = 1, ""
    try:
        parser = ConfigParser(text, _Delegate())
        while (statement := parser.parse_statement()) is not None:
            yield statement
        return
    except SyntaxError as error:
        line, message = error.lineno or 1, error.msg
    except tokenize.TokenError as error:
        message, (line, _) = error.args
    except StopIteration:
        message = "it ends in the middle of a statement"
    place = origin if isinstance(origin, _Place) else _Place(origin, line)
    if word := re.search(r"Failed to parse token '(.*)'", message):
        message = f"{word[1]} is not a value; strings are quoted ('{word[1]}'), macros begin with % and classes with @"
    raise UserError(f"{place} cannot be read: {' '.join(message.split()).rstrip('.')}")


def _binding(statement: BindingStatement, place: _Place) -> _Binding:
    if statement.scope:
        raise UserError(f"{place} sets {statement.selector}.{statement.arg_name} in a scope; scopes are not used here")
    if not statement.arg_name:
        return _Binding(place, "", statement.selector, statement.value)
    binding = _Binding(place, statement.selector, statement.arg_name, statement.value)
    _known_hint(binding)
    return binding


def _known_hint(binding: _Binding) -> Any:
    """The type of the field that a binding names, which must exist."""
    classes = _config_classes()
    if binding.config_class not in classes:
        near = difflib.get_close_matches(binding.config_class, classes, 1)
        mend = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(classes)}"
        raise UserError(f"{binding.place}: {binding.config_class} is not a config class; {mend}")
    hints = field_hints(classes[binding.config_class])
    if binding.name in hints:
        return hints[binding.name]
    elsewhere = [f"{name}.{binding.name}" for name, cls in classes.items() if binding.name in field_hints(cls)]
    near = [f"{binding.config_class}.{n}" for n in difflib.get_close_matches(binding.name, hints, 1)]
    guess = near or elsewhere
    mend = f"did you mean {guess[0]}?" if guess else f"its fields are {', '.join(hints)}"
    raise UserError(f"{binding.place}: {binding.config_class} has no field {binding.name}; {mend}")


def _config_classes() -> dict[str, type]:
    """Every class in the tree under Config, by name, parents first."""
    classes: dict[str, type] = {}
    waiting: list[type] = [Config]
    while waiting:
        config_class = waiting.pop(0)
        if classes.setdefault(config_class.__name__, config_class) is not config_class:
            raise AssertionError(f"two config classes are called {config_class.__name__}")
        nested = [nested_config(hint)[0] for hint in field_hints(config_class).values()]
        waiting += [n for n in nested if n is not None and n.__name__ not in classes]
    return classes


def _winners(bindings: Iterable[_Binding], parsed: dict[Path, _File]) -> dict[tuple[str, str], _Binding]:
    """For every name the binding that holds: the one whose file includes all others that bind it, or the override."""
    by_key: dict[tuple[str, str], list[_Binding]] = {}
    for binding in bindings:
        by_key.setdefault(binding.key, []).append(binding)
    winners = {}
    for key, rivals in by_key.items():
        first_in: dict[Path | None, _Binding] = {}
        for binding in rivals:
            _refuse_double(first_in.setdefault(binding.place.path, binding), binding)
        best = [b for b in rivals if all(o is b or _overrides(b.place, o.place, parsed) for o in rivals)]
        if not best:
            tops = [b for b in rivals if not any(_overrides(o.place, b.place, parsed) for o in rivals)]
            _refuse_double(tops[0], tops[-1])
        winners[key] = best[0]
    return winners


def _refuse_double(first: _Binding, second: _Binding) -> None:
    if first is not second:
        raise UserError(f"{first} is set twice, by {first.place} and {second.place}; remove one of them")


def _overrides(place: _Place, other: _Place, parsed: dict[Path, _File]) -> bool:
    if place.path is None or other.path is None:
        return place.path is None and other.path is not None
    return other.path in parsed[place.path].includes


class _Macros:
    """Values with the macros in them replaced."""

    def __init__(self, macros: dict[tuple[str, str], _Binding], bindings: Sequence[_Binding]) -> None:
        self._macros = {name: binding for (_, name), binding in macros.items()}
        used = {name for binding in bindings for name in _macro_names(binding.value)}
        for name, binding in self._macros.items():
            if name not in used:
                fields = [f"{c}.{name}" for c, cls in _config_classes().items() if name in field_hints(cls)]
                mend = f"a setting is named with its class: {fields[0]}" if fields else f"write %{name} where it is meant"
                raise UserError(f"{binding.place}: macro {name} is never used; {mend}")

    def replace(self, value: Any, place: _Place, within: tuple[str, ...] = ()) -> Any:
        """``value`` with every ``%NAME`` in it replaced, at any depth."""
        if isinstance(value, _Macro):
            if value.name in within:
                raise UserError(f"{place}: macro {value.name} is defined by itself; give it a value")
            if value.name not in self._macros:
                near = difflib.get_close_matches(value.name, self._macros, 1)
                mend = f"did you mean %{near[0]}?" if near else f"define it above with {value.name} = ..."
                raise UserError(f"{place}: macro %{value.name} is not defined; {mend}")
            macro = self._macros[value.name]
            return self.replace(macro.value, macro.place, (*within, value.name))
        if isinstance(value, (list, tuple)):
            return type(value)(self.replace(v, place, within) for v in value)
        if isinstance(value, dict):
            return {self.replace(k, place, within): self.replace(v, place, within) for k, v in value.items()}
        return value


def _macro_names(value: Any) -> Iterator[str]:
    if isinstance(value, _Macro):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _macro_names(entry)
    elif isinstance(value, dict):
        yield from _macro_names([*value.keys(), *value.values()])


class _Builder:
    """Makes each config class once, its nested classes first."""

    def __init__(self, bindings: dict[tuple[str, str], _Binding], macros: _Macros, origin: str) -> None:
        self._bindings, self._macros, self._origin = bindings, macros, origin
        self.made: dict[type, Any] = {}
        # Classes that a field's None takes away, with the binding that says so (None: the field's default).
        self.taken_away: dict[type, tuple[str, _Binding | None]] = {}

    def build(self, config_class: type) -> Any:
        if config_class in self.made:
            return self.made[config_class]
        values = {}
        for field in dataclasses.fields(config_class):
            hint = field_hints(config_class)[field.name]
            binding = self._bindings.get((config_class.__name__, field.name))
            nested, _ = nested_config(hint)
            if nested is not None:
                values[field.name] = self._nested(config_class, field, hint, nested, binding)
            elif binding is not None:
                values[field.name] = self._plain(binding, hint)
        try:
            self.made[config_class] = config_class(**values)
        except ValueError as error:
            raise UserError(f"{error} ({self._blame(config_class, str(error))})") from None
        return self.made[config_class]

    def _nested(self, config_class: type, field: dataclasses.Field, hint: Any, nested: type, binding: _Binding | None) -> Any:
        if binding is None:
            if field.default is not None:
                return self.build(nested)
            self._take_away(nested, f"{config_class.__name__}.{field.name}", None)
            return None
        value = self._macros.replace(binding.value, binding.place)
        if value == _Reference(nested.__name__, True):
            return self.build(nested)
        _, optional = nested_config(hint)
        if value is None and optional:
            self._take_away(nested, str(binding), binding)
            return None
        raise UserError(f"{binding.place}: {binding} = {value!r} does not fit; write @{nested.__name__}(){' or None' * optional}")

    def _plain(self, binding: _Binding, hint: Any) -> Any:
        value = self._macros.replace(binding.value, binding.place)
        if isinstance(value, _Reference):
            raise UserError(f"{binding.place}: {binding} = {value!r} is a class, {describe(hint)} is wanted")
        try:
            return convert(value, hint)
        except TypeError as error:
            raise UserError(f"{binding.place}: {binding} = {error}") from None

    def _take_away(self, config_class: type, field: str, binding: _Binding | None) -> None:
        self.taken_away[config_class] = (field, binding)
        for hint in field_hints(config_class).values():
            nested, _ = nested_config(hint)
            if nested is not None:
                self._take_away(nested, field, binding)

    def _blame(self, config_class: type, message: str) -> str:
        """Where the settings that a failed check names are set."""
        classes = {config_class.__name__, *re.findall(r"\b([A-Z]\w+)\.\w", message)}
        named = [b for b in self._bindings.values() if b.config_class in classes and re.search(rf"\b{b.name}\b", message)]
        return "; ".join(f"{b} is set by {b.place}" for b in named) or f"from {self._origin}"


def _refuse_unused(bindings: Sequence[_Binding], builder: _Builder, parsed: dict[Path, _File]) -> None:
    made = {config_class.__name__ for config_class in builder.made}
    taken_away = {config_class.__name__: why for config_class, why in builder.taken_away.items()}
    for binding in bindings:
        if binding.config_class in made:
            continue
        field, cause = taken_away[binding.config_class]
        if cause is None:
            raise UserError(f"{binding.place}: {binding} is not used, as {field} is None by default; set {field} or remove it")
        if not _overrides(cause.place, binding.place, parsed):
            raise UserError(f"{binding.place}: {binding} is not used, as {field} is None ({cause.place}); remove one of the two")


def _write_section(config: Any, sections: dict[type, str]) -> None:
    if type(config) in sections:
        return
    sections[type(config)] = ""
    name, lines = type(config).__name__, []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        shown = f"@{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)
        lines.append(f"{name}.{field.name} = {shown}\n")
    sections[type(config)] = "".join(lines)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, field.name)):
            _write_section(getattr(config, field.name), sections)


def _shown(path: Path) -> str:
    """A path as a user would type it: relative to the current folder where it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
