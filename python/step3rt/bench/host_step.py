"""Times what a step of the device pipeline costs the attention instance's host, without a device.

`python -m step3rt.bench.host_step` plans decode steps of one lane by hand and runs the instance's
own loop over them; in place of the device is a lane that computes nothing and is done at once. The
coordinator's side, its messages and links are not in it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch

from step3rt import _core
from step3rt.instance.device_links import FfnLinks
from step3rt.instance.device_loop import DeviceLane, DeviceStepLoop
from step3rt.instance.sequence_table import SequenceTable
from step3rt.model.device_attention import AttentionLane, PromptScores, StepOrder
from step3rt.model.device_inputs import HostStep
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS
from step3rt.ops.sample import MAX_TOP
from step3rt.ops.stream import Event

CONTEXT_TOKENS = 4096
VOCAB_SIZE = 128_815
NUM_WARM_UP_STEPS = 16
NUM_SMS = 132  # of the H200 that is not there: they decide which chunks the prefill kernel takes


class _DoneEvent:
    def is_done(self) -> bool:
        return True

    def elapsed_ns(self, since: Event) -> int:
        return 0


class _NoDevice:
    """A lane whose steps are done when they are launched."""

    def launch(self, host: HostStep, order: StepOrder) -> tuple[Event, PromptScores | None]:
        host.pad(order.num_rows, order.num_rows)
        return cast(Event, _DoneEvent()), None


class _NoErrors:
    def errors(self) -> list[Any]:
        return [SimpleNamespace(is_ok=True)]


class _NoSession:
    """Takes reports, and has settings of one lane."""

    def __init__(self, num_sequences: int) -> None:
        self.settings = SimpleNamespace(
            max_tokens_per_micro_batch=num_sequences, max_steps_in_flight=2
        )
        self.outputs: list[_core.SequenceOutput] = []

    def complete_step(self, *report: Any) -> None:
        self.outputs = report[2]


def measure(num_sequences: int, num_steps: int, chunk_tokens: int = 0) -> dict[str, Any]:
    """Decodes `num_sequences` sequences of 4,096 tokens, of which all but one are computed.

    Args:
        num_sequences: Decode in every step.
        num_steps: That are measured.
        chunk_tokens: Prompt of one more sequence, which joins for a step and leaves after it.

    Returns:
        Microseconds per step, from a plan's arrival to the report of its tokens, by the clock and
        of this thread's time on a core.
    """
    max_blocks = -(-(CONTEXT_TOKENS + num_steps + NUM_WARM_UP_STEPS + 2) // BLOCK_SIZE_TOKENS)
    table = SequenceTable(
        num_slots=num_sequences + 1,
        num_blocks=(num_sequences + 1) * max_blocks,
        max_model_len=max_blocks * BLOCK_SIZE_TOKENS,
        vocab_size=VOCAB_SIZE,
    )
    num_rows = num_sequences + chunk_tokens
    device = torch.device("cpu")
    hosts = [HostStep(num_rows, MAX_TOP, device, prefill_ctas=NUM_SMS) for _ in range(2)]
    lane = DeviceLane(0, table, cast(AttentionLane, _NoDevice()), hosts)
    session = _NoSession(num_rows)
    links = cast(FfnLinks, SimpleNamespace(is_ready=True, are_coming=True))
    loop = DeviceStepLoop(
        cast(_core.NodeSession, session), cast(AttentionSlots, _NoErrors()), links, [lane]
    )
    times_us, cpu_us = [], []
    for step in range(NUM_WARM_UP_STEPS + num_steps):
        plan = _plan(step, num_sequences, max_blocks)
        if chunk_tokens:
            _add_chunk(plan, step, num_sequences, chunk_tokens)
        begun_ns, begun_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        loop.launch(plan)
        loop.collect()
        cpu_us.append((time.thread_time_ns() - begun_cpu_ns) / 1e3)
        times_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
        if len(session.outputs) != num_sequences + (chunk_tokens > 0):
            raise RuntimeError(f"step {step} gave {len(session.outputs)} outputs")
    measured = sorted(times_us[NUM_WARM_UP_STEPS:])
    return {
        "sequences": num_sequences,
        "chunk": chunk_tokens,
        "steps": num_steps,
        "p50_us": round(statistics.median(measured)),
        "p90_us": round(measured[len(measured) * 9 // 10]),
        "cpu_p50_us": round(statistics.median(cpu_us[NUM_WARM_UP_STEPS:])),
    }


def _plan(step: int, num_sequences: int, max_blocks: int) -> _core.StepPlan:
    """The next token of every sequence; each has KV blocks of its own, one after the other."""
    joined: Iterable[Any] = ()
    if step == 0:
        joined = [
            _join(sequence, CONTEXT_TOKENS - sequence % BLOCK_SIZE_TOKENS)
            for sequence in range(num_sequences)
        ]
    # Lengths differ, so that about as many sequences need a block in every step.
    firsts = [
        CONTEXT_TOKENS - 1 - sequence % BLOCK_SIZE_TOKENS for sequence in range(num_sequences)
    ]
    chunks = []
    for sequence, first in enumerate(firsts):
        position = first + step
        blocks = [position // BLOCK_SIZE_TOKENS] if position % BLOCK_SIZE_TOKENS == 0 else []
        if step == 0:
            blocks = list(range(position // BLOCK_SIZE_TOKENS + 1))
        chunks.append(
            SimpleNamespace(
                sequence_id=sequence,
                num_computed_tokens=position,
                num_new_tokens=1,
                new_block_ids=[sequence * max_blocks + block for block in blocks],
                samples=True,
            )
        )
    plan = SimpleNamespace(lane=0, step=step, left=[], joined=joined, chunks=chunks)
    return cast(_core.StepPlan, plan)


def _add_chunk(plan: Any, step: int, num_sequences: int, chunk_tokens: int) -> None:
    """A whole prompt; its sequence goes by the step's number."""
    sequence = num_sequences + step
    plan.left = [sequence - 1] if step else []
    plan.joined = [*plan.joined, _join(sequence, chunk_tokens)]
    plan.chunks.append(
        SimpleNamespace(
            sequence_id=sequence,
            num_computed_tokens=0,
            num_new_tokens=chunk_tokens,
            new_block_ids=list(range(-(-chunk_tokens // BLOCK_SIZE_TOKENS))),
            samples=True,
        )
    )


def _join(sequence: int, length: int) -> Any:
    sampling = SimpleNamespace(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, min_tokens=0, top_logprobs=None,
        prompt_logprobs=None, stop_token_ids=[], adjustments=None,
    )  # fmt: skip
    return SimpleNamespace(
        sequence_id=sequence, token_ids=[5] * length, num_prompt_tokens=length, sampling=sampling
    )


def main() -> None:
    """Prints one line of JSON for each number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt in every step")
    arguments = parser.parse_args()
    for num_sequences in arguments.sequences:
        print(json.dumps(measure(num_sequences, arguments.steps, arguments.chunk)))  # noqa: T201


if __name__ == "__main__":
    main()
