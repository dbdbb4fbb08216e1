"""`step3rt generate`: prompts in, text or one JSON object out, on a cluster of its own or another.

The JSON object is an interface that other programs compare against: keys are only ever added.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from step3rt.cli import flags
from step3rt.cli.sampling_flags import add_sampling_flags, sampling_from
from step3rt.cli.signals import unwound_by_signals
from step3rt.client import Client
from step3rt.codec import Prompt
from step3rt.config import ServeConfig, describe
from step3rt.errors import InvalidArgument, Unavailable
from step3rt.llm import MAX_OPEN_STREAMS, shows_progress
from step3rt.local_cluster import LocalCluster
from step3rt.placement import HostConfig
from step3rt.results import CompletionOutput, GenerationEvent, RequestOutput, TokenLogprob
from step3rt.sampling import SamplingParams
from step3rt.timing import StreamTimer, summarise

_DESCRIPTION = """\
Generate text. Starts a whole cluster of processes on this host, generates, and stops it again;
with --address it uses a running coordinator instead.
"""

_EPILOG = """\
examples:
  step3rt generate --model nano "Once upon a time"
  step3rt generate --model nano --attention 2 --ffn 2 --fabric shm --stats "It was a"
  step3rt generate --model DIR --prompt-token-ids 1,2,3 --temperature 0 --logprobs 5 --output json
  step3rt generate --address 127.0.0.1:50051 "Hello"
"""

_MODEL = Path("nano")
# Flags besides the settings that shape a cluster of its own.
_CLUSTER_FLAGS = ("config", "log_dir", *(item.name for item in fields(HostConfig)))
_SKIPPED_SETTINGS = (
    "model",
    "listen",
    "control_listen",
    "metrics_listen",
    "ready_file",
    "insecure_bind",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "generate",
        help="generate text, on a cluster of its own or a running one",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--prompt-token-ids",
        action="append",
        type=_token_ids,
        default=[],
        metavar="1,2,3",
        help="a prompt as token ids; may be given several times; needs no tokenizer",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"checkpoint directory (default: {_MODEL})",
    )
    parser.add_argument(
        "--address",
        help="use the coordinator at host:port instead of starting one; its settings are its own",
    )
    flags.add_tenant_flag(parser)
    flags.add_ca_flag(parser)
    add_sampling_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--n", type=int, default=1, metavar="INT", help="continuations of each prompt (default: 1)"
    )
    _add_logprob_flags(output)
    output.add_argument(
        "--output", choices=("text", "json"), default="text", help="(default: %(default)s)"
    )
    output.add_argument(
        "--stats", action="store_true", help="print times, throughput and fabrics at the end"
    )
    output.add_argument(
        "--log-dir",
        type=Path,
        default=argparse.SUPPRESS,
        help="keep the logs of the cluster's processes here",
    )
    flags.add_config_file_flag(parser)
    flags.add_config_flags(parser, HostConfig, title="placement")
    flags.add_config_flags(parser, ServeConfig, skip=_SKIPPED_SETTINGS)
    parser.set_defaults(run=run)


def _add_logprob_flags(group: "argparse._ArgumentGroup") -> None:
    for flag, text in (
        ("--logprobs", "each token's logprob and those of this many rivals; json only"),
        ("--prompt-logprobs", "the same for the prompt's tokens"),
    ):
        group.add_argument(flag, type=int, metavar="INT", help=text)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of token ids. Write integers with commas, like 1,2,3"
        ) from error


@dataclass(frozen=True, slots=True)
class _Generated:
    output: RequestOutput
    timer: StreamTimer


def run(arguments: argparse.Namespace) -> int:
    """Generates and prints; returns the exit code."""
    prompts: list[Prompt] = [*arguments.prompts, *arguments.prompt_token_ids]
    if not prompts:
        raise InvalidArgument(
            "No prompt was given. There is nothing to continue. Give a text, or --prompt-token-ids"
        )
    if arguments.address is not None:
        _refuse_cluster_flags(arguments)
    serve, host = flags.cluster_from(
        argparse.Namespace(**{**vars(arguments), "listen": "127.0.0.1:0"}), {"model": _MODEL}
    )
    params = replace(
        sampling_from(arguments),
        n=arguments.n,
        logprobs=arguments.logprobs,
        prompt_logprobs=arguments.prompt_logprobs,
    )
    is_json = arguments.output == "json"
    with ExitStack() as stack:
        stack.enter_context(unwound_by_signals())
        begun_s = time.perf_counter()
        cluster: LocalCluster | None = None
        if arguments.address is None:
            cluster = stack.enter_context(
                LocalCluster(
                    serve,
                    **host.options(),
                    log_dir=getattr(arguments, "log_dir", None),
                    on_status=_show_status,
                )
            )
            _show_status("")
        start_s = time.perf_counter() - begun_s
        address = arguments.address if cluster is None else cluster.address
        ca = arguments.ca if cluster is None else serve.tls_ca or ""
        client = stack.enter_context(Client(address, tenant=arguments.tenant, ca=ca))
        begun_s = time.perf_counter()
        is_streamed = not is_json and len(prompts) == 1 and params.n == 1
        on_event = _print_event if is_streamed else None
        try:
            done = as_completed if cluster is None else cluster.as_completed
            generated = _generate(client, prompts, params, on_event, done)
        except Unavailable:
            if cluster is not None:
                cluster.check()  # how a child died says more than that it is missing
            raise
        elapsed_s = time.perf_counter() - begun_s
        links = [] if cluster is None else cluster.instances()
        if is_json or not is_streamed:
            token_ids = [_prompt_token_ids(client, item.output) for item in generated]
    timing = {"start_s": start_s, **summarise([item.timer for item in generated], elapsed_s)}
    topology: dict[str, object] = (
        {"address": address} if cluster is None else {**describe(serve), "instances": links}
    )
    if is_json:
        results = [
            _result(item.output, completion, ids)
            for item, ids in zip(generated, token_ids, strict=True)
            for completion in item.output.outputs
        ]
        print(json.dumps({"results": results, "topology": topology, "timing": timing}))
        return 0
    if is_streamed:
        print()
    else:
        for item in generated:
            for completion in item.output.outputs:
                print(f"--- {item.output.prompt or item.output.prompt_token_ids}")
                print(completion.text or " ".join(map(str, completion.token_ids)))
    if arguments.stats:
        _print_stats(timing, links)
    return 0


def _refuse_cluster_flags(arguments: argparse.Namespace) -> None:
    """Flags of a cluster of its own have no effect on a running one, and are not passed over."""
    names = [*_CLUSTER_FLAGS, *(item.name for item in fields(ServeConfig))]
    for name in names:
        if getattr(arguments, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidArgument(
                f"{flag} was given with --address. It shapes a cluster that generate starts, and "
                f"the one at {arguments.address} runs already. Leave {flag} or --address out"
            )


def _generate(
    client: Client,
    prompts: list[Prompt],
    params: SamplingParams,
    on_event: Callable[[Prompt, GenerationEvent], None] | None,
    done: Callable[[list[Future[_Generated]]], Iterable[Future[_Generated]]],
) -> list[_Generated]:
    """Runs all prompts at once; results in order. `done` gives those that are done."""

    def run_one(prompt: Prompt) -> _Generated:
        timer = StreamTimer()
        with client.generate(prompt, params) as stream:
            for event in stream:
                timer.add(len(event.token_ids))
                if on_event is not None:
                    on_event(prompt, event)
            return _Generated(stream.result(), timer)

    with ThreadPoolExecutor(min(MAX_OPEN_STREAMS, len(prompts))) as pool:
        futures = [pool.submit(run_one, prompt) for prompt in prompts]
        try:
            for future in done(futures):
                future.result()
        except BaseException:
            # The pool waits for its threads, and they for streams, which end with the client.
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise
        return [future.result() for future in futures]


def _print_event(prompt: Prompt, event: GenerationEvent) -> None:
    if event.position == 0 and event.token_ids and isinstance(prompt, str):
        print(prompt, end="")
    text = event.text
    if not text and event.token_ids and not isinstance(prompt, str):
        # Without a tokenizer there is no text to stream.
        text = " " * (event.position > 0) + " ".join(map(str, event.token_ids))
    print(text, end="", flush=True)


def _show_status(text: str) -> None:
    """One line on the terminal that the next one replaces; cut, for a wrapped line would stay."""
    if shows_progress():
        width = shutil.get_terminal_size().columns
        print(f"\r\x1b[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)


def _prompt_token_ids(client: Client, output: RequestOutput) -> list[int]:
    if output.prompt_token_ids is not None:
        return output.prompt_token_ids
    return client.tokenize(output.prompt or "")


def _result(
    output: RequestOutput, completion: CompletionOutput, prompt_token_ids: list[int]
) -> dict[str, object]:
    return {
        "prompt": output.prompt,
        "prompt_token_ids": prompt_token_ids,
        "index": completion.index,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": [_logprob(item) for item in completion.logprobs],
        "prompt_logprobs": [_logprob(item) for item in output.prompt_logprobs],
    }


def _logprob(item: TokenLogprob) -> dict[str, object]:
    return {
        "token_id": item.token_id,
        "logprob": item.logprob,
        "top": [list(pair) for pair in item.top],
    }


def _milliseconds(value: object) -> str:
    return f"{value:.1f} ms" if isinstance(value, float) else "-"


def _print_stats(timing: dict[str, object], instances: list[dict[str, object]]) -> None:
    ttft, tpot = timing["ttft_ms"], timing["tpot_ms"]
    print()
    if isinstance(ttft, dict) and isinstance(tpot, dict):
        print(f"TTFT        {_milliseconds(ttft['p50'])}")
        print(f"TPOT        p50 {_milliseconds(tpot['p50'])}, p99 {_milliseconds(tpot['p99'])}")
    rate = timing["tokens_per_s"]
    if isinstance(rate, float):
        print(f"throughput  {rate:.1f} tokens/s ({timing['tokens']} tokens)")
    names = {item["instance_id"]: f"{item['role']}-{item['role_rank']}" for item in instances}
    for item in instances:
        links = item["links"]
        for link in links if isinstance(links, list) else []:
            pair = f"{names[item['instance_id']]} - {names.get(link['peer_instance_id'], '?')}"
            print(f"fabric      {pair}: {link['fabric']} ({link['reason']})")
