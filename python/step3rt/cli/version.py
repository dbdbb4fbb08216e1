"""`step3rt version`."""

import argparse
import json
import platform

_PACKAGES = (
    "numpy",
    "grpcio",
    "protobuf",
    "torch",
    "safetensors",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser("version", help="print the version")
    parser.add_argument("--json", action="store_true", help="with Python, platform and packages")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints and returns 0."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from step3rt import _core

    if not arguments.json:
        print(f"step3rt {_core.__version__}")
        return 0
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version_of(name)
        except PackageNotFoundError:
            packages[name] = None
    report = {
        "step3rt": _core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }
    print(json.dumps(report, indent=2))
    return 0
