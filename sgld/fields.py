"""Fields of structs: what they are for users, and the ranges that `Meta` states, checked in the constructor, too."""

from functools import cache
from typing import Any, TypedDict, get_type_hints

import msgspec


class FieldError(ValueError):
    """A field of a struct is out of its range; `field` names it."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field} is {value!r}: {problem}")
        self.field = field


def option(description: str, **extra: Any) -> msgspec.Meta:
    """A field of a config, which is a flag and a key, too.

    :param extra: `aliases`, other spellings.
    """
    return msgspec.Meta(description=description, extra=extra or None)


def check_fields(struct: msgspec.Struct) -> None:
    """Check each field against its annotation; msgspec does that when it decodes, not in the constructor.

    :raises FieldError: for the first field that doesn't fit.
    """
    values = {name: getattr(struct, name) for name in struct.__struct_fields__}
    try:
        msgspec.convert(values, _as_typed_dict(type(struct)))
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at ")
        field = path.strip("`$.").partition("[")[0].partition(".")[0]
        raise FieldError(field, values.get(field), problem.replace("`", "")) from None


@cache
def _as_typed_dict(struct: type[msgspec.Struct]) -> Any:
    """The fields of a struct as a TypedDict: checking that one doesn't construct the struct again."""
    return TypedDict(struct.__name__, get_type_hints(struct, include_extras=True))  # type: ignore[operator]
