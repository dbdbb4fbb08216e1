"""`step3rt chat`: a conversation in the terminal."""

import argparse
import sys

from step3rt.cli.flags import add_ca_flag, add_tenant_flag
from step3rt.cli.sampling_flags import add_sampling_flags, sampling_from
from step3rt.client import DEFAULT_ADDRESS, Client
from step3rt.errors import Step3Error

_DESCRIPTION = """\
Talk to the model behind a running coordinator. An empty line, Ctrl-D or Ctrl-C ends the
conversation; while an answer is being written, Ctrl-C stops the answer.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a running coordinator",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help=f"(default: {DEFAULT_ADDRESS})")
    parser.add_argument("--system", help="system message that opens the conversation")
    add_tenant_flag(parser)
    add_ca_flag(parser)
    add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads turns from standard input until it ends; returns the exit code."""
    params = sampling_from(arguments)
    messages: list[dict[str, object]] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    with Client(arguments.address, tenant=arguments.tenant) as client:
        print(f"{client.model_info().model} at {arguments.address}", file=sys.stderr)
        while (text := _read_turn()) is not None:
            messages.append({"role": "user", "content": text})
            with client.chat(messages, params) as stream:
                try:
                    for event in stream:
                        print(event.text, end="", flush=True)
                except KeyboardInterrupt:
                    pass
                except Step3Error as error:
                    # The turn is lost, not the conversation.
                    print(f"error: {error}", file=sys.stderr)
                    messages.pop()
                    continue
                print()
                messages.append({"role": "assistant", "content": stream.text})
    return 0


def _read_turn() -> str | None:
    """The next line; `None` at its end: nothing on it, Ctrl-D or Ctrl-C at the prompt."""
    try:
        return input("> ") or None
    except RuntimeError:  # there is no standard input (`<&-`), or no output
        return None
    except (EOFError, KeyboardInterrupt):
        print()  # leaves the prompt's line to the conversation, not to the shell
        return None
