"""Configuration dataclasses with strict conversion from and to JSON, and the errors for input that cannot be used."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Self


class InputError(ValueError):
    """Input of the user that cannot be used. The text is for the user, and has one line for each problem."""


class ConfigError(InputError):
    """A configuration that cannot work. The text starts with the path of the field."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        self.field = field


class Config:
    """A base class for configuration dataclasses, with strict conversion from and to JSON-like mappings."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "") -> Self:
        """Build an object of this class from a mapping. Raises ConfigError for unknown or missing keys and wrong types.

        where: the path of the mapping, for error texts
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"wanted a mapping, got {_type_name(mapping)}", where)
        assert dataclasses.is_dataclass(cls)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in mapping:
            if key not in fields:
                raise ConfigError(f"unknown key{nearest(str(key), fields)}", _join(where, str(key)))
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in mapping:
                raise ConfigError("required, but missing", _join(where, name))
        values = {key: _convert(value, hints[key], _join(where, key)) for key, value in mapping.items()}
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(error.message, _join(where, error.field)) from None

    def to_mapping(self) -> dict[str, Any]:
        """Convert to a mapping of JSON types. This is the inverse of `from_mapping`."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint " (did you mean ...?)" with the most similar of the ``known`` names; "" if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where and name else where or name


def _type_name(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """Convert `value` to the annotated type. An int is accepted as a float; a bool is not accepted as an int.

    Raises ConfigError if `value` has a different type. where: the path of the value, for error texts
    """
    if isinstance(annotation, types.UnionType):
        if value is None and types.NoneType in annotation.__args__:
            return None
        annotation = next(arg for arg in annotation.__args__ if arg is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"wanted a list, got {_type_name(value)}", where)
        item_type = typing.get_args(annotation)[0]
        return tuple(_convert(item, item_type, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return value if isinstance(value, annotation) else annotation.from_mapping(value, where)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{_type_name(value)} does not fit into 64 bits", where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ConfigError(f"wanted {annotation.__name__}, got {_type_name(value)}", where)
    return value


def at_least(config: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ConfigError(f"{value} is less than {minimum}", name)


def finite(config: object, name: str) -> None:
    value = getattr(config, name)
    if not 0 < value < float("inf"):
        raise ConfigError(f"{value} must be positive and finite", name)


def multiple(config: object, name: str, of: str) -> None:
    value, divisor = getattr(config, name), getattr(config, of)
    if value % divisor:
        raise ConfigError(f"{value} is not a multiple of {of} {divisor}", name)
