"""Reading back what `describe` writes: `insert-masks{density=0.1, allocation='erk'}; pack-weights`.

The text of a pass is its name, and in braces the options that differ from the defaults, as keyword arguments whose
values are Python literals. Nothing in a text is ever run.
"""

import ast
import dataclasses
import difflib
import math
import re
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from fedmef_fx.display.printable import shortened, visible
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pipeline import Pass

__all__ = ["read_pass", "split_passes"]

_FORM: Final = re.compile(r"\s*([^\s{};]+)\s*(?:\{(.*)\})?\s*", re.DOTALL)
_LONGEST: Final = 100_000
_OPENING: Final = "([{"
_CLOSING: Final = ")]}"


def split_passes(text: str) -> list[str]:
    """The texts of single passes in one text, where `;` stands between them.

    Raises:
        ConfigError: Nothing before, between or after two `;`.
    """
    if not text.strip():
        return []
    parts, start = [], 0
    for end in _separators(text):
        parts.append(text[start:end])
        start = end + 1
    parts.append(text[start:])
    for part in parts:
        if not part.strip():
            raise ConfigError(f"passes: got {_shown(text)}; expected a pass before and after each ';'")
    return parts


def _separators(text: str) -> Iterator[int]:
    """Where `;` stands outside of braces and strings."""
    quote, depth, is_escaped = "", 0, False
    for position, character in enumerate(text):
        if is_escaped:
            is_escaped = False
        elif quote:
            is_escaped = character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _OPENING or character in _CLOSING:
            depth += 1 if character in _OPENING else -1
        elif character == ";" and depth <= 0:
            yield position


def read_pass(text: str, known: Sequence[type[Pass]]) -> Pass:
    """The pass that a text describes; options that it leaves out take their defaults.

    Args:
        text: As `describe` writes it.
        known: The passes that can be named.

    Raises:
        ConfigError: Another form, an unknown pass or option, or a value of another type; the message says which, and
            what was expected.
    """
    if not isinstance(text, str):
        raise ConfigError(f"passes: got {type(text).__name__}; expected text such as 'insert-masks{{density=0.1}}'")
    form = _FORM.fullmatch(text) if len(text) <= _LONGEST else None
    if form is None:
        raise ConfigError(f"passes: got {_shown(text)}; expected name or name{{option=value, ...}}")
    name, body = form.groups()
    classes = {kind.name: kind for kind in known}
    if name not in classes:
        raise ConfigError(f"passes: no pass is named {_shown(name)}; {_choices(name, list(classes))}")
    kind = classes[name]
    options = _options(name, body or "")
    _check_options(kind, options)
    return kind(**options)


def _options(name: str, body: str) -> dict[str, Any]:
    """The options in the braces of a text, by name."""
    got = shortened(visible(body), longest=120)
    form = f"pass {name}: got {{{got}}}; expected {name}{{option=value, ...}} with Python literals"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an escape that Python does not know
            call = ast.parse(f"f({body})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError, Warning) as error:
        raise ConfigError(form) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ConfigError(form)
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ConfigError(form)
        if keyword.arg in options:
            raise ConfigError(f"pass {name}: option {keyword.arg} is given twice; expected it once")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"pass {name}: {keyword.arg}: expected a Python literal, such as 0.5, 'text' or ('a', 'b')"
            ) from error
    return options


def _check_options(kind: type[Pass], options: Mapping[str, Any]) -> None:
    fields: list[dataclasses.Field[Any]] = []
    if dataclasses.is_dataclass(kind):
        fields = [field for field in dataclasses.fields(kind) if field.init]
    names = [field.name for field in fields]
    hints = _hints(kind)
    for name, value in options.items():
        if name not in names:
            raise ConfigError(f"pass {kind.name}: no option is named {_shown(name)}; {_choices(name, names)}")
        if not _fits(value, hints.get(name, Any)):
            raise ConfigError(
                f"pass {kind.name}: {name}: got {_shown(value)}; expected {_expected(hints.get(name, Any))}"
            )
    missing = dataclasses.MISSING
    for field in fields:
        if field.name not in options and field.default is missing and field.default_factory is missing:
            raise ConfigError(f"pass {kind.name}: got no {field.name}; expected {kind.name}{{{field.name}=...}}")


def _hints(kind: type[Pass]) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a class of the caller's whose annotations exist for type checkers alone
        return {}


def _fits(value: object, hint: Any) -> bool:
    """Whether a literal is a value of an annotated option; types that no literal has are taken as they come."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments if argument is not type)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return is_number and (isinstance(value, int) or math.isfinite(value))  # type: ignore[arg-type]  # a number
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(argument) for argument in arguments if argument is not type)
    if origin is tuple:
        return "a tuple such as ('a', 'b')" if str in (*get_args(arguments[0]), arguments[0]) else "a tuple"
    names = {int: "an integer", float: "a finite number", str: "text in quotes", bool: "True or False"}
    return names.get(hint, "None" if hint is type(None) else str(hint))


def _choices(name: str, names: Sequence[str]) -> str:
    """What may stand in the place of a name that is none."""
    if not names:
        return "expected none"
    close = difflib.get_close_matches(name[:100], names, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"expected {', '.join(names)}{hint}"


def _shown(value: object) -> str:
    return shortened(visible(repr(value)), longest=120)
