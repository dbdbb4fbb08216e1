"""Turns the settings of `config` into flags, and flags and files back into settings."""

import argparse
import ctypes
import os
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from step3rt.config import ServeConfig, TlsPaths, build
from step3rt.errors import InvalidArgument, Unavailable
from step3rt.placement import HostConfig
from step3rt.setting import build_part, load_toml

C = TypeVar("C")

_PR_SET_PDEATHSIG = 1


def add_config_flags(
    parser: argparse.ArgumentParser,
    kind: type[Any],
    *,
    skip: Collection[str] = (),
    title: str = "settings",
) -> None:
    """Adds a flag for every setting of `kind`, with help and default from its field."""
    hints = get_type_hints(kind)
    group = parser.add_argument_group(title)
    for item in fields(kind):
        if item.name in skip:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        text = item.metadata["help"].replace("%", "%%")
        if hints[item.name] is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        if item.default is not MISSING and item.default not in (None, "", ()):
            text += f" (default: {item.default})"
        if get_origin(hints[item.name]) is tuple:
            group.add_argument(
                flag, type=_texts, metavar="A,B,…", default=argparse.SUPPRESS, help=text
            )
            continue
        group.add_argument(
            flag,
            type=_plain_type(hints[item.name]),
            choices=item.metadata["choices"],
            metavar=None
            if item.metadata["choices"]
            else _plain_type(hints[item.name]).__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )


def add_config_file_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE`."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with the settings below, dashes as underscores; flags win over it",
    )


def config_from(
    arguments: argparse.Namespace,
    kind: type[C],
    *,
    takes: Callable[[str], bool] = lambda _: True,
    defaults: Mapping[str, Any] | None = None,
) -> C:
    """The settings that flags, file and defaults give together.

    Args:
        arguments: what the flags gave.
        kind: a dataclass of settings.
        takes: whether a setting of the file is `kind`'s, if the file has others too.
        defaults: values of settings that are given nowhere, instead of the dataclass's.

    Raises:
        ConfigError: from `config.build`; the message says which source is wrong.
    """
    given = vars(arguments)
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    from_flags = {name: value for name, value in given.items() if name in names}
    file: Path | None = given.get("config")
    defaults = defaults or {}
    if file is None:
        return build(kind, {**defaults, **from_flags}, "command line")
    from_file = {
        name: value for name, value in load_toml(file).items() if takes(name.replace("-", "_"))
    }
    # Checked by itself first, so that a mistake in the file is not blamed on the command line.
    required = {**defaults, **from_flags}
    build_part(kind, {**required, **from_file}, str(file))
    return build(kind, {**defaults, **from_file, **from_flags}, "command line")


def cluster_from(
    arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None
) -> tuple[ServeConfig, HostConfig]:
    """The settings of a cluster: its coordinator's, and where its instances run.

    `defaults` are of the coordinator's settings.

    Raises:
        ConfigError: as `config_from`.
    """
    of_host = {item.name for item in fields(HostConfig)}
    host = config_from(arguments, HostConfig, takes=lambda name: name in of_host)
    serve = config_from(
        arguments,
        ServeConfig,
        takes=lambda name: name not in of_host,
        defaults={**(defaults or {}), **host.counts()},
    )
    return serve, host


def add_tenant_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--tenant`."""
    parser.add_argument(
        "--tenant",
        default="",
        metavar="NAME",
        help="whose requests these are: tenants get equal shares and share no cached prompts",
    )


def add_ca_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--ca`."""
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="CA (PEM) that issued the certificate of a coordinator that speaks TLS; default: "
        "STEP3RT_CA",
    )


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--tls-cert`, `--tls-key` and `--tls-ca`, as an instance has them."""
    for name, text in (
        ("cert", "certificate (PEM) to look at, and to speak to the coordinator with"),
        ("key", "its key (PEM)"),
        ("ca", "the cluster's CA (PEM)"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)


def tls_from(arguments: argparse.Namespace) -> TlsPaths | None:
    """The three files of `add_tls_flags`, if they were given.

    Raises:
        InvalidArgument: some were given, not all.
    """
    paths = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if all(path is None for path in paths):
        return None
    if any(path is None for path in paths):
        raise InvalidArgument(
            "Some of --tls-cert, --tls-key and --tls-ca were given. They belong together. Give all "
            "of them or none"
        )
    cert, key, ca = map(str, paths)
    return cert, key, ca


def add_exit_with_parent_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag by which a parent process makes sure that nothing outlives it."""
    parser.add_argument("--exit-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)


def exit_with_parent(parent: int | None) -> None:
    """Has the kernel end this process when its parent ends, however that happens.

    Raises:
        Unavailable: the parent ended before this could be arranged.
    """
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise Unavailable(
            f"Process {parent}, which started this one, has ended. Nobody would stop this "
            "process. Start it without --exit-with-parent to run it alone"
        )


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _plain_type(hint: Any) -> type[Any]:
    """`int` for `int | None`, and so on."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return hint  # type: ignore[no-any-return]
