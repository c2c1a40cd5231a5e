"""The templates of prompts: one file for all."""

from __future__ import annotations

import string
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from retro_jax.errors import UserError

OWN = Path(__file__).with_name("templates.toml")
# Of each field the places that it must have; a passage may have its title too.
PLACES = {
    "passage": {"text"},
    "separator": set[str](),
    "question": {"question"},
    "with_passages": {"passages", "question"},
}
MAY_HAVE = {"passage": {"title"}}


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a question is asked; ``templates.toml`` says what the fields are."""

    passage: str
    separator: str
    question: str
    with_passages: str
    stop: tuple[str, ...]


def load_template(name: str, path: str | None) -> Template:
    """A template of a file; None: of the one that comes with the package.

    Raises:
        UserError: the file cannot be read, has no such template, or the template lacks a field or a place.
    """
    file = OWN if path is None else Path(path)
    try:
        templates = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"QaConfig.templates={path!r} cannot be read ({reason}); give a file like {OWN}") from None
    if not isinstance(templates.get(name), dict):
        raise UserError(f"QaConfig.template={name!r} is not in {file}; choose one of {', '.join(templates)}, or add it there")
    given = templates[name]
    for field in fields(Template):
        if field.name not in given:
            raise UserError(f"the template {name!r} in {file} has no {field.name}; {OWN} says what it is")
    for field_name in PLACES:
        _check_places(field_name, str(given[field_name]), f"{field_name} of the template {name!r} in {file}")
    stop = given["stop"]
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise UserError(f"stop of the template {name!r} in {file} is {stop!r}; give a list of texts, none of them empty")
    return Template(**{key: str(given[key]) for key in PLACES}, stop=tuple(stop))


def _check_places(field_name: str, text: str, what: str) -> None:
    try:
        places = {place for _, place, _, _ in string.Formatter().parse(text) if place is not None}
    except ValueError as error:
        raise UserError(f"{what} cannot be read ({error}); write {{{{ and }}}} for braces") from None
    needed = PLACES[field_name]
    if not needed <= places <= needed | MAY_HAVE.get(field_name, set()):
        wanted = ", ".join(f"{{{place}}}" for place in sorted(needed)) or "none"
        raise UserError(f"{what} has the places {sorted(places)}; it needs {wanted}")
