"""Checks of plain-dictionary configurations; every mistake is a UserError that names the field."""

from collections.abc import Mapping
from typing import Any

from trm_jax.types import UserError

REQUIRED: Any = object()  # in the place of a default


def plain(config: Any) -> Any:
    """A copy of `config` made of dicts and tuples, whatever kind of mapping or list it was."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return tuple(plain(value) for value in config)
    return config


def complete(given: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` with the defaults of `fields`; UserError for a missing or unknown field."""
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping of fields, not {given!r}")
    for name in given:
        if name not in fields:
            raise UserError(f"{where}.{name} is no field; the fields are {', '.join(fields)}")
    for name, default in fields.items():
        if default is REQUIRED and name not in given:
            raise UserError(f"{where}.{name} is missing; add it")
    return {name: given.get(name, default) for name, default in fields.items()}


def positive(section: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises UserError unless the fields are integers from 1."""
    for name in names:
        value = section[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}.{name} must be a positive integer, not {value!r}")


def multiple(value: int, of: int, where: str, of_what: str) -> None:
    """Raises UserError unless `of` divides `value`."""
    if value % of:
        raise UserError(f"{where} = {value} must be a multiple of {of_what} = {of}")


def one_of(section: Mapping[str, Any], name: str, choices: Any, where: str) -> None:
    """Raises UserError unless the field is one of `choices`."""
    if section[name] not in choices:
        raise UserError(
            f"{where}.{name} = {section[name]!r} must be one of {', '.join(sorted(choices))}"
        )


def rate(section: Mapping[str, Any], name: str, where: str) -> None:
    """Raises UserError unless the field is a number in [0, 1)."""
    value = section[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{where}.{name} must lie in [0, 1), not {value!r}")


def above_zero(section: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises UserError unless the fields are numbers above 0."""
    for name in names:
        value = section[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{where}.{name} must be a positive number, not {value!r}")
