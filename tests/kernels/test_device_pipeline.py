"""Attention and FFN instances of the device pipeline, against the one-GPU decoder.

All instances are in this process, each lane on a stream of its own; links are real. On the CPU the
same programs run by the references behind their launchers, whose sums do not depend on batch mates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from step3rt.model import gpu_layer
from step3rt.model.gpu_decoder import GpuDecoder, StepTokens, steps_of_prompt
from step3rt.ops.sampling import SamplingRow, sample
from tests.fixtures.device_party import Party, PartyLane, chunk, join, plan
from tests.fixtures.device_reference import MAX_MODEL_LEN, assert_agrees, reference_decoder
from tests.kernels.decoder_inputs import windows

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda:0", marks=pytest.mark.gpu, id="gpu"),
]
BLOCKS_PER_SEQUENCE = MAX_MODEL_LEN // 64


def greedy(model: GpuDecoder, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The decoder's own continuations."""
    known = [list(prompt) for prompt in prompts]
    tables = [
        list(range(BLOCKS_PER_SEQUENCE * index, BLOCKS_PER_SEQUENCE * (index + 1)))
        for index in range(len(prompts))
    ]
    for ids, table in zip(known, tables, strict=True):
        ids.append(int([model.step(s) for s in steps_of_prompt(ids, table, 32)][-1][-1].argmax()))
    for _ in range(num_tokens - 1):
        rows = [
            steps_of_prompt(ids, table, MAX_MODEL_LEN)[0].rows(len(ids) - 1, len(ids))
            for ids, table in zip(known, tables, strict=True)
        ]
        sampled = model.step(StepTokens.concatenate(rows)).argmax(dim=1).tolist()
        for ids, token_id in zip(known, sampled, strict=True):
            ids.append(token_id)
    return [ids[len(prompt) :] for ids, prompt in zip(known, prompts, strict=True)]


@dataclass
class Scripted:
    """A sequence that a test drives: tokens computed and known, as a coordinator counts them."""

    number: int
    prompt: list[int]
    start_step: int
    chunk_tokens: int
    max_tokens: int
    first_block: int
    computed: int = 0
    known: int = 0
    cached_blocks: list[int] = field(default_factory=list)
    has_left: bool = False
    generated: list[int] = field(default_factory=list)

    def next_chunk(self, is_joining: bool) -> Any:
        cached = []
        if is_joining:
            self.known = len(self.prompt)
            cached = self.cached_blocks
            self.computed = 64 * len(cached)
        end = min(self.known, self.computed + self.chunk_tokens)
        blocks = range(-(-self.computed // 64), -(-end // 64))
        made = chunk(
            self.number,
            self.computed,
            end,
            known=self.known,
            blocks=[*cached, *(self.first_block + block for block in blocks)],
        )
        self.computed = end
        self.known += made.samples
        return made

    @property
    def is_planned_out(self) -> bool:
        return self.known - len(self.prompt) >= self.max_tokens


class Conductor:
    """Plans the steps of one lane, each while the one before is in flight."""

    def __init__(self, lane: PartyLane, sequences: list[Scripted]) -> None:
        self.lane = lane
        self.waiting = list(sequences)
        self.running: list[Scripted] = []
        self.planned: list[list[Scripted]] = []
        self.step = 0

    def advance(self) -> bool:
        """Launches a step and takes the results of the one before; False when all is done."""
        left = [one for one in self.running if one.is_planned_out]
        self.running = [one for one in self.running if not one.is_planned_out]
        joined = [one for one in self.waiting if one.start_step <= self.step]
        self.waiting = [one for one in self.waiting if one.start_step > self.step]
        self.step += 1
        self.running += joined
        if self.running:
            chunks = [one.next_chunk(one in joined) for one in self.running]
            self.lane.launch(
                plan(
                    self.step,
                    chunks,
                    [join(one.number, one.prompt) for one in joined],
                    [one.number for one in left],
                )
            )
            self.planned.append(list(self.running))
        while len(self.lane.in_flight) > (1 if self.running else 0):
            for one, (number, token_id) in zip(
                self.planned.pop(0), self.lane.collect(), strict=True
            ):
                assert number == one.number
                if token_id is not None:
                    one.generated.append(token_id)
        return bool(self.running or self.waiting)


def scripts(lane: int, num_tokens: int) -> list[Scripted]:
    """Sequences that join at different steps, whole prompts and chunks of them, one over a block.

    Each has KV blocks of its own, whatever the `lane` of its instance; the last one begins behind
    a block of another one's, which is computed by then.
    """
    texts = windows()
    shapes = [(0, 9, 16), (0, 1, 16), (2, 70, 13), (3, 17, 16)]
    sequences = [
        Scripted(
            number=index,
            prompt=texts[(lane + index) % len(texts)][:length],
            start_step=start,
            chunk_tokens=chunk_tokens,
            max_tokens=num_tokens + index,
            first_block=BLOCKS_PER_SEQUENCE * (len(shapes) * lane + index),
        )
        for index, (start, length, chunk_tokens) in enumerate(shapes)
    ]
    owner = sequences[2]
    late = replace(
        owner,
        number=len(shapes),
        start_step=9,
        chunk_tokens=16,
        max_tokens=num_tokens,
        first_block=owner.first_block + BLOCKS_PER_SEQUENCE - 2,
        cached_blocks=[owner.first_block],
        generated=[],
    )
    return [*sequences, late]


def run(party: Party, lanes: list[tuple[PartyLane, list[Scripted]]]) -> None:
    """Runs all lanes to their end; those that are done take part no more."""
    conductors = [Conductor(lane, sequences) for lane, sequences in lanes]
    while conductors:
        conductors = [conductor for conductor in conductors if conductor.advance()]
    for source in party.sources:
        assert all(errors.is_ok for errors in source.slots.errors())
    for rank in party.ranks:
        assert all(errors.is_ok for errors in rank.slots.errors())


def check(model: GpuDecoder, sequences: list[Scripted]) -> None:
    assert all(len(one.generated) == one.max_tokens for one in sequences)
    assert_agrees(model, [(one.prompt, one.generated) for one in sequences])


@pytest.fixture
def make_party() -> Iterator[Any]:
    parties: list[Party] = []

    def make(*sizes: int, device: str, **options: Any) -> Party:
        party = Party(
            *sizes,
            device=torch.device(device),
            max_model_len=MAX_MODEL_LEN,
            num_blocks=sizes[2] * 4 * BLOCKS_PER_SEQUENCE,
            **options,
        )
        parties.append(party)
        return party

    yield make
    for party in parties:
        party.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("is_fp8_kv", "prefill_ctas"), [(True, 1), (False, 1), (True, 132)])
def test_one_rank_gives_the_decoders_own_tokens(
    make_party: Any, device: str, is_fp8_kv: bool, prefill_ctas: int
) -> None:
    """Whether chunks go through the prefill kernel or, too small for 132 CTAs, through decode's."""
    party = make_party(1, 1, 1, device=device, is_fp8_kv=is_fp8_kv, prefill_ctas=prefill_ctas)
    sequences = scripts(0, 5)
    run(party, [(party.sources[0].lanes[0], sequences)])
    party.close()  # to load the decoder's kernels may take a device on which nothing waits
    model = reference_decoder(device, is_fp8_kv=is_fp8_kv)
    if device == "cpu" and is_fp8_kv:
        # The same sums in the same order: bit for bit, whatever the batch and the chunks.
        for one in sequences:
            [expected] = greedy(model, [one.prompt], one.max_tokens)
            assert one.generated == expected
    check(model, sequences)


def test_only_steps_with_chunks_launch_the_prefill_kernel_or_copy_its_work(
    make_party: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = list[str]()
    for name in ("mfa_decode_fp8", "mfa_prefill_fp8", "quantize_groups_fp8"):
        launcher = getattr(gpu_layer, name)

        def launch(*args: Any, name: str = name, launcher: Any = launcher) -> None:
            launched.append(name)
            launcher(*args)

        monkeypatch.setattr(gpu_layer, name, launch)
    party = make_party(1, 1, 1, device="cpu")
    lane = party.sources[0].lanes[0]
    prompts = [windows()[0][:9], windows()[1][:1]]
    joined = [join(number, prompt) for number, prompt in enumerate(prompts)]
    chunks = [chunk(0, 0, 9, known=9, blocks=[3]), chunk(1, 0, 1, known=1, blocks=[5])]
    launched.clear()  # of what warms a lane up
    lane.launch(plan(1, chunks, joined))
    lane.collect()
    num_layers = party.sources[0].pool.config.num_layers
    assert launched == ["mfa_decode_fp8", "mfa_prefill_fp8", "quantize_groups_fp8"] * num_layers
    assert int(lane.device._inputs.num_prefill_items) == 5
    launched.clear()
    lane.launch(plan(2, [chunk(0, 9, 10, known=10), chunk(1, 1, 2, known=2)]))
    lane.collect()
    assert launched == ["mfa_decode_fp8"] * num_layers  # which quantises its own output
    assert int(lane.device._inputs.num_prefill_items) == 5  # as the step before left it


def test_requests_get_the_samples_and_scores_that_they_ask_for(make_party: Any) -> None:
    """Of the decoder's own logits, which one rank computes too."""
    party = make_party(1, 1, 1, device="cpu")
    lane = party.sources[0].lanes[0]
    prompt = windows()[0][:8]
    wishes = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "seed": 5, "top_k": 20, "top_logprobs": 3},
        {"prompt_logprobs": 2},
        {"min_tokens": 1, "stop_token_ids": [2]},
    ]
    blocks = [BLOCKS_PER_SEQUENCE * index for index in range(len(wishes))]
    lane.launch(
        plan(
            1,
            [chunk(n, 0, 8, known=8, blocks=[block]) for n, block in enumerate(blocks)],
            [join(n, prompt, **wish) for n, wish in enumerate(wishes)],
        )
    )
    _, host, event, scores = lane.in_flight[0]
    event.wait()
    logits = reference_decoder("cpu").step(steps_of_prompt(prompt, [3], 32)[0]).float()
    logprobs = logits.log_softmax(-1)
    last = logits[-1:]
    rows = [
        SamplingRow(temperature=1.0, seed=3, position=8),
        SamplingRow(temperature=0.7, seed=5, top_k=20, position=8),
        SamplingRow(position=8),
        SamplingRow(masked_token_ids=(2,), position=8),
    ]
    expected = sample(last.expand(4, -1), rows)
    assert [token_id for _, token_id in lane.collect()] == expected
    top = logprobs[-1].topk(3)
    assert host.results.top_ids[1, :3].tolist() == top.indices.tolist()
    torch.testing.assert_close(host.results.top_logprobs[1, :3], top.values)
    torch.testing.assert_close(host.results.logprobs[1], logprobs[-1, expected[1]])
    assert scores is not None
    torch.testing.assert_close(
        scores.logprobs, logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    )
    torch.testing.assert_close(scores.top_logprobs, logprobs[:-1].topk(2).values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 3), (2, 2, 2)], ids=str)
def test_sources_ranks_and_lanes_give_the_decoders_tokens(
    make_party: Any, device: str, sizes: tuple[int, int, int]
) -> None:
    party = make_party(*sizes, device=device)
    driven = [
        (lane, scripts(index, 3 + number))
        for number, source in enumerate(party.sources)
        for index, lane in enumerate(source.lanes)
    ]
    run(party, driven)
    party.close()  # to load the decoder's kernels may take a device on which nothing waits
    model = reference_decoder(device)
    for _, sequences in driven:
        check(model, sequences)
