"""`step3rt doctor`: what this host can do, what is missing, and how to get it."""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from step3rt.cli import flags
from step3rt.cli.cuda_findings import cuda_findings
from step3rt.cli.finding import Finding
from step3rt.config import TlsPaths, resolve_model
from step3rt.errors import ConfigError, Step3Error

_DESCRIPTION = """\
Check this host: packages, processors, fabrics, and, when asked, a checkpoint and a coordinator.
Every line that is not ok says what to do. Exits with 1 if something that step3rt needs is missing.
"""

_MARKS = {"ok": "ok  ", "note": "note", "missing": "FAIL"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check what this host can do and what is missing",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="also check this checkpoint's headers")
    parser.add_argument("--control-address", help="also ask the coordinator at host:port")
    flags.add_tls_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; returns 0 if nothing needed is missing."""
    tls = flags.tls_from(arguments)
    findings = [*_host(), *_packages(), *_fabrics(), *_tls(tls), *cuda_findings()]
    if arguments.model is not None:
        findings.append(_checkpoint(arguments.model))
    if arguments.control_address is not None:
        findings.append(_coordinator(arguments.control_address, tls))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for item in findings:
            print(f"{_MARKS[item.level]}  {item.subject:<12} {item.found}")
            if item.fix:
                print(f"      {'':<12} -> {item.fix}")
    return int(any(item.level == "missing" for item in findings))


def _host() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = platform.release()
    yield Finding("ok", "host", f"{cores} cores, {memory_gib:.0f} GiB, Linux {kernel}")


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from step3rt import _core

    yield Finding("ok", "extension", f"step3rt {_core.__version__}")
    for name, use, extra in (
        ("torch", "instances compute with it", "worker"),
        ("safetensors", "instances read checkpoints with it", "worker"),
    ):
        try:
            yield Finding("ok", name, version_of(name))
        except PackageNotFoundError:
            yield Finding(
                "note",
                name,
                f"not installed; {use}, client and coordinator do not need it",
                f"pip install 'step3rt[{extra}]'",
            )


def _fabrics() -> Iterator[Finding]:
    from step3rt import _core

    for name, (is_usable, why) in _core.host_capabilities().items():
        yield Finding("ok" if is_usable else "missing", name, why)
    for is_good, found, fix in _core.rdma_findings():
        yield Finding("ok" if is_good else "note", "rdma", found, fix)


def _tls(tls: TlsPaths | None) -> Iterator[Finding]:
    from step3rt import _core

    if tls is None:
        yield Finding(
            "note",
            "tls",
            "no certificate given; without TLS, control channel, clients and links over tcp are in "
            "clear text, which is for trusted networks",
            "make certificates as docs/deployment.md says, then give --tls-cert, --tls-key and "
            "--tls-ca",
        )
        return
    for level, found, fix in _core.tls_findings(tls):
        yield Finding(level, "tls", found, fix)


def _checkpoint(model: Path) -> Finding:
    try:
        from step3rt.model.checkpoint import describe_checkpoint
    except ModuleNotFoundError as error:
        without = f"cannot be checked without {error.name}"
        return Finding("missing", "checkpoint", without, "pip install 'step3rt[worker]'")
    try:
        return Finding("ok", "checkpoint", describe_checkpoint(resolve_model(model)))
    except ConfigError as error:
        return Finding("missing", "checkpoint", str(error))


def _coordinator(control_address: str, tls: TlsPaths | None) -> Finding:
    from step3rt import _core

    try:
        snapshot = json.loads(_core.list_instances(control_address, 5.0, tls))
    except Step3Error as error:
        return Finding(
            "missing", "coordinator", str(error), "if none runs there: step3rt serve MODEL"
        )
    level: Literal["ok", "note"] = "ok" if snapshot["is_serving"] else "note"
    return Finding(level, "coordinator", str(snapshot["status"]))
