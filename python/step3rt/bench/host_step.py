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


class _DoneEvent:
    def is_done(self) -> bool:
        return True


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


def measure(num_sequences: int, num_steps: int) -> dict[str, Any]:
    """Decodes `num_sequences` sequences of 4,096 tokens, of which all but one are computed.

    Returns:
        Microseconds per step, from a plan's arrival to the report of its tokens, by the clock and
        of this thread's time on a core.
    """
    max_blocks = -(-(CONTEXT_TOKENS + num_steps + NUM_WARM_UP_STEPS + 2) // BLOCK_SIZE_TOKENS)
    table = SequenceTable(
        num_slots=num_sequences,
        num_blocks=num_sequences * max_blocks,
        max_model_len=max_blocks * BLOCK_SIZE_TOKENS,
        vocab_size=VOCAB_SIZE,
    )
    hosts = [HostStep(num_sequences, MAX_TOP, torch.device("cpu")) for _ in range(2)]
    lane = DeviceLane(0, table, cast(AttentionLane, _NoDevice()), hosts)
    session = _NoSession(num_sequences)
    links = cast(FfnLinks, SimpleNamespace(is_ready=True, are_coming=True))
    loop = DeviceStepLoop(
        cast(_core.NodeSession, session), cast(AttentionSlots, _NoErrors()), links, [lane]
    )
    times_us, cpu_us = [], []
    for step in range(NUM_WARM_UP_STEPS + num_steps):
        plan = _plan(step, num_sequences, max_blocks)
        begun_ns, begun_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        loop.launch(plan)
        loop.collect()
        cpu_us.append((time.thread_time_ns() - begun_cpu_ns) / 1e3)
        times_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
        if len(session.outputs) != num_sequences:
            raise RuntimeError(f"step {step} gave {len(session.outputs)} outputs")
    measured = sorted(times_us[NUM_WARM_UP_STEPS:])
    return {
        "sequences": num_sequences,
        "steps": num_steps,
        "p50_us": round(statistics.median(measured)),
        "p90_us": round(measured[len(measured) * 9 // 10]),
        "cpu_p50_us": round(statistics.median(cpu_us[NUM_WARM_UP_STEPS:])),
    }


def _plan(step: int, num_sequences: int, max_blocks: int) -> _core.StepPlan:
    """The next token of every sequence; each has KV blocks of its own, one after the other."""
    joined: Iterable[Any] = ()
    if step == 0:
        joined = [_join(sequence) for sequence in range(num_sequences)]
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


def _join(sequence: int) -> Any:
    length = CONTEXT_TOKENS - sequence % BLOCK_SIZE_TOKENS
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
    arguments = parser.parse_args()
    for num_sequences in arguments.sequences:
        print(json.dumps(measure(num_sequences, arguments.steps)))  # noqa: T201


if __name__ == "__main__":
    main()
