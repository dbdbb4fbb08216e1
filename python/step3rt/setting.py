"""Settings as fields of dataclasses: what a flag and a check need to know, and the check.

Owns how a value is judged by itself; what goes together is known to the dataclass's module.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from step3rt.errors import ConfigError

C = TypeVar("C")


def setting(
    help_text: str,
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field that a user may set, with all that a flag and a check need to know."""
    metadata = {"help": help_text, "choices": choices, "minimum": minimum, "maximum": maximum}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def sms_setting(who_fills_them: str, minimum: int) -> Any:
    """A setting of how many SMs a role's largest kernels fill."""
    text = f"SMs of a GPU that {who_fills_them}; default: all but those that waits hold"
    return setting(text, None, minimum=minimum, maximum=256)


def load_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: the file is unreadable or not TOML; the message has file and line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {str(path)!r} cannot be read: {error.strerror}. "
            "Correct the path or its permissions"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {str(path)!r} is not valid TOML: {error}. Correct the file"
        ) from error


def build_part(kind: type[C], values: Mapping[str, Any], source: str) -> C:
    """Makes a dataclass of settings, checking every key, type and range.

    Args:
        kind: the dataclass.
        values: settings by name, dashes as underscores.
        source: where the values come from, for messages: a file or "command line".

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, a value out of
            range, or a missing setting.
    """
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    checked = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(_unknown_key(key, known, source))
        checked[name] = _check(name, known[name], hints[name], value, source)
    for name, item in known.items():
        if item.default is MISSING and name not in checked:
            raise ConfigError(
                f"The setting '{name}' is missing ({source}). It has no default: "
                f"{item.metadata['help']}. Give it"
            )
    return kind(**checked)


def _unknown_key(key: str, known: Mapping[str, object], source: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known are: {', '.join(sorted(known))}"
    return f"The setting '{key}' does not exist ({source}). Nothing would read it. {hint}"


def _expanded(name: str, path: Path, source: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The setting '{name}' is {str(path)!r} ({source}). It begins with somebody's home "
            "directory, and this host knows none of theirs. Write the whole path"
        ) from error


def _check(name: str, item: "Field[Any]", hint: Any, value: Any, source: str) -> Any:
    """The value in its declared type and range, or a ConfigError."""
    if get_origin(hint) is tuple:
        return _check_texts(name, value, source)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    wanted = next(kind for kind in kinds if kind is not type(None))
    if wanted is Path and isinstance(value, str | Path):
        value = _expanded(name, Path(value), source)
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(
            f"The setting '{name}' is {value!r} ({source}). It must be of type "
            f"{wanted.__name__}. Correct it"
        )
    limits = item.metadata
    if limits["choices"] and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), limits["choices"], n=1)
        hint_text = f"Did you mean {near[0]!r}?" if near else "Take one of them"
        raise ConfigError(
            f"The setting '{name}' is {value!r} ({source}). Known values are "
            f"{', '.join(limits['choices'])}. {hint_text}"
        )
    low, high = limits["minimum"], limits["maximum"]
    if low is not None and not (low <= value and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(
            f"The setting '{name}' is {value} ({source}). It must be {allowed}. Correct it"
        )
    return value


def _check_texts(name: str, value: Any, source: str) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigError(
        f"The setting '{name}' is {value!r} ({source}). It must be a list of texts. Correct it"
    )
