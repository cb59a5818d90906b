"""Options that are declared once: a dataclass field also describes its flag."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def option(value: Any, text: str, *, flag: str = "", **argument: Any) -> Any:
    """Return a dataclass field from which :func:`util.args.add_option` makes a flag.

    Args:
        value: default of the field.
        text: what the option means; it is the help of the flag.
        flag: name of the flag if it differs from the name of the field: ``--quant_bits``.
        argument: arguments of ``add_argument`` besides help and type: ``choices``, or a ``default``
            of the flag that differs from that of the field.
    """
    metadata = {"flag": flag, "argument": {"help": text, **argument}}
    return dataclasses.field(default=value, metadata=metadata)


def field_of(options: type, name: str) -> dataclasses.Field:
    """Return the field ``name`` of a dataclass."""
    return next(field for field in dataclasses.fields(options) if field.name == name)


def option_names(options: type) -> list[str]:
    """Return the names of the fields of a dataclass, in order."""
    return [field.name for field in dataclasses.fields(options)]


def check_choices(options: Any) -> None:
    """Raise ValueError if an option of an instance is neither a choice nor its default."""
    for field in dataclasses.fields(options):
        choices = field.metadata.get("argument", {}).get("choices", ())
        value = getattr(options, field.name)
        if choices and value not in (field.default, *choices):
            raise ValueError(f"{field.name} is one of {choices}, not {value!r}")


def check_numbers(options: Any) -> None:
    """Raise ValueError if an option of an instance has another type of number than its default."""
    for field in dataclasses.fields(options):
        value, default = getattr(options, field.name), field.default
        kinds = {int: (Integral, "a whole number"), float: (Real, "a number")}
        if isinstance(default, tuple):
            pair = isinstance(value, Sequence) and not isinstance(value, str)
            if not pair or len(value) != len(default):
                raise ValueError(f"{field.name} takes {len(default)} numbers, as in {default}")
        elif type(default) in kinds:
            kind, name = kinds[type(default)]
            if not isinstance(value, kind):
                raise ValueError(f"{field.name} is {name}, not of type {type(value).__name__}")
