"""The attention instance's loop: every lane's step advances when its FFN replies are complete.

Owns the order of events: a lane's steps run one after the other, the next one from the moment when
the last has sampled its tokens. It never blocks while any lane has something to compute.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from step3rt import _core
from step3rt.errors import Internal, Unavailable
from step3rt.instance.lane import Lane, Step
from step3rt.instance.node import IDLE_TIMEOUT_S, Outcome
from step3rt.instance.sampler import ChunkResult, sample_chunks
from step3rt.instance.sequences import LaneSequences, StepNotDueError
from step3rt.instance.wire import A2fLayout, F2aLayout, FrameError, slot_tensor
from step3rt.model.batch import Batch
from step3rt.model.config import Step3Config
from step3rt.model.kv_cache import KvCache
from step3rt.model.placement import place
from step3rt.model.step3 import FfnRequest, forward
from step3rt.model.weights import AttentionWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FfnPeer:
    """A linked FFN instance and, per lane, views of the slots to and from it."""

    instance_id: int
    send_slots: list[torch.Tensor]
    receive_slots: list[torch.Tensor]


class StepLoop:
    """All lanes of one session of an attention instance."""

    def __init__(
        self,
        session: _core.NodeSession,
        config: Step3Config,
        weights: AttentionWeights,
        kv: KvCache,
        layouts: tuple[A2fLayout, F2aLayout],
    ) -> None:
        self._session = session
        self._config = config
        self._weights = weights
        self._kv = kv
        self._a2f, self._f2a = layouts
        self._ep_size = session.settings.ep_size
        self._max_tokens = session.settings.max_tokens_per_micro_batch
        self._max_steps_in_flight = session.settings.max_steps_in_flight
        # Reports of steps that are over, in their order.
        self._answers: list[Callable[[], None]] = []
        self._peers: dict[int, FfnPeer] = {}
        self._is_draining = False
        self._lanes = [
            Lane(
                index,
                LaneSequences(
                    num_blocks=kv.num_blocks,
                    block_size_tokens=kv.block_size_tokens,
                    vocab_size=config.vocab_size,
                ),
            )
            for index in range(session.settings.num_lanes)
        ]

    @torch.inference_mode()
    def run(self) -> Outcome:
        """Serves plans until the session is lost or, when asked to drain, nothing is in flight."""
        while True:
            active = [lane.step for lane in self._lanes if lane.step is not None]
            if self._is_draining and not active:
                return Outcome.DRAINED
            polled_ns = time.perf_counter_ns()
            events = self._session.poll(IDLE_TIMEOUT_S)
            waited_ns = time.perf_counter_ns() - polled_ns
            for step in active:
                step.wait_ns += waited_ns
            for event in events:
                if event.kind == "session_lost":
                    logger.warning("The session with the coordinator is over: %s", event.reason)
                    return Outcome.LOST
                self._handle(event)

    def _handle(self, event: _core.Event) -> None:
        if event.kind == "arrival":
            self._on_arrival(event)
        elif event.kind == "step_plan":
            self._on_plan(event)
        elif event.kind == "link_up":
            self._on_link_up(event)
        elif event.kind == "link_down":
            self._on_link_down(event)
        elif event.kind == "drain":
            self._is_draining = True
        while self._answers:
            # Their lanes are free. What waits there is on its way before anybody is told.
            answers, self._answers = self._answers, []
            for lane in self._lanes:
                self._begin_next(lane)
            for answer in answers:
                answer()

    def _on_plan(self, plan: _core.StepPlan) -> None:
        lane = self._lanes[plan.lane]
        num_unanswered = len(lane.queued) + (lane.step is not None)
        if num_unanswered >= self._max_steps_in_flight:
            raise Internal(
                f"A plan for step {plan.step} of lane {plan.lane} arrived while {num_unanswered} "
                f"of its steps are not answered. max_steps_in_flight is "
                f"{self._max_steps_in_flight}. The coordinator's plan is wrong."
            )
        lane.queued.append(plan)
        self._begin_next(lane)

    def _begin_next(self, lane: Lane) -> None:
        if lane.step is None and lane.queued:
            self._begin(lane, lane.queued.popleft())

    def _begin(self, lane: Lane, plan: _core.StepPlan) -> None:
        try:
            planned = lane.sequences.apply(plan)
        except StepNotDueError as error:
            if plan.step >= lane.first_due_step:
                raise Internal(
                    f"Step {plan.step} of lane {plan.lane} cannot start: {error}. No step failed "
                    "that it could have been planned on. The coordinator's plan is wrong."
                ) from error
            reason = f"it was planned before a failure was known: {error}"
            self._answers.append(partial(self._session.fail_step, plan.lane, plan.step, reason))
            return
        if not planned:
            self._answers.append(
                partial(self._session.complete_step, plan.lane, plan.step, [], 0, 0, 0)
            )
            return
        num_tokens = sum(chunk.num_new_tokens for chunk in plan.chunks)
        if num_tokens > self._max_tokens:
            raise Internal(
                f"Step {plan.step} of lane {plan.lane} has {num_tokens} tokens. A slot holds "
                f"{self._max_tokens}. The coordinator's plan is wrong."
            )
        started_ns = time.perf_counter_ns()
        batch = Batch.build(
            [chunk.chunk for chunk in planned],
            self._config,
            self._kv.block_size_tokens,
            self._weights.embed_tokens.dtype,
        )
        layers = forward(batch, self._config, self._weights, self._kv)
        lane.step = Step(plan.step, planned, layers, started_ns)
        self._advance(lane, lane.step)

    def _advance(self, lane: Lane, step: Step) -> None:
        """Computes up to the next FFN and pushes its input; completes the step after the last."""
        begun_ns = time.perf_counter_ns()
        try:
            if step.request is None:
                step.request = next(step.layers)
            else:
                step.request = step.layers.send(step.ffn_output())
        except StopIteration as end:
            results = sample_chunks(end.value, step.planned, self._weights)
            step.compute_ns += time.perf_counter_ns() - begun_ns
            self._complete(lane, step, results)
            return
        self._place(step, step.request)
        for rank in list(step.unsent):
            self._push(lane, step, rank)
            if lane.step is None:
                return
        step.compute_ns += time.perf_counter_ns() - begun_ns

    def _place(self, step: Step, request: FfnRequest) -> None:
        step.placements = place(
            request.topk_ids,
            request.topk_weights,
            num_experts=self._config.num_experts,
            top_k=self._config.top_k,
            ep_size=self._ep_size,
        )
        # A rank without rows is not asked, and adds nothing.
        nothing = torch.empty(0, self._config.hidden_size, dtype=self._f2a.dtype)
        step.partial_sums = [nothing] * self._ep_size
        step.unsent = {
            rank for rank, placement in enumerate(step.placements) if placement.rows.shape[0] > 0
        }

    def _push(self, lane: Lane, step: Step, rank: int) -> None:
        """Sends a rank its rows, unless its slot is still taken; then the arrival sends them."""
        peer = self._peers.get(rank)
        if peer is None:
            self._fail(lane, step, f"FFN rank {rank} is not linked")
            return
        if peer.instance_id in lane.taken_by_peer:
            return
        request, placement = step.layer_request(), step.placements[rank]
        self._a2f.write(peer.send_slots[lane.index], request.hidden, placement)
        num_tokens = placement.rows.shape[0]
        try:
            self._session.push(
                peer.instance_id,
                lane.index,
                step.number,
                request.layer,
                num_tokens,
                self._a2f.payload_bytes(num_tokens),
            )
        except Unavailable as error:
            self._fail(lane, step, f"FFN rank {rank} cannot be reached: {error}")
            return
        lane.taken_by_peer.add(peer.instance_id)
        step.unsent.discard(rank)
        step.waiting[rank] = peer.instance_id

    def _on_arrival(self, arrival: _core.Arrival) -> None:
        lane = self._lanes[arrival.lane]
        lane.taken_by_peer.discard(arrival.peer)
        step = lane.step
        rank = self._rank_of(arrival.peer)
        if step is None or rank is None:
            return
        if step.is_due(rank, arrival):
            try:
                self._take_reply(lane, step, rank, arrival)
            except FrameError as error:
                self._fail(lane, step, f"FFN rank {rank} sent a bad reply: {error}")
                return
        elif rank in step.unsent:
            # The reply to a step that failed has freed the slot for this one.
            self._push(lane, step, rank)
        if lane.step is step and step.is_answered:
            self._advance(lane, step)

    def _take_reply(self, lane: Lane, step: Step, rank: int, arrival: _core.Arrival) -> None:
        num_rows = step.placements[rank].rows.shape[0]
        if arrival.num_tokens != num_rows:
            raise FrameError(
                f"{num_rows} rows were answered with {arrival.num_tokens}. An FFN instance answers "
                "with 0 when it cannot use a frame; its log says why."
            )
        slot = self._peers[rank].receive_slots[lane.index]
        step.partial_sums[rank] = self._f2a.read(slot, num_rows, arrival.payload_bytes)
        del step.waiting[rank]

    def _complete(self, lane: Lane, step: Step, results: list[ChunkResult]) -> None:
        for planned, result in zip(step.planned, results, strict=True):
            planned.accept(result.token_id, result.is_corrupt)
            result.is_corrupt = planned.sequence.is_corrupt
        lane.step = None
        total_ns = time.perf_counter_ns() - step.started_ns
        self._answers.append(partial(self._report, lane.index, step, results, total_ns))

    def _report(
        self, lane_index: int, step: Step, results: list[ChunkResult], total_ns: int
    ) -> None:
        outputs = [
            _core.SequenceOutput(
                result.sequence_id,
                token_id=result.token_id,
                logprob=result.logprob,
                top=result.top,
                prompt_logprobs=result.prompt_logprobs,
                is_corrupt=result.is_corrupt,
            )
            for result in results
        ]
        self._session.complete_step(
            lane_index, step.number, outputs, step.compute_ns, step.wait_ns, total_ns
        )

    def _fail(self, lane: Lane, step: Step, reason: str) -> None:
        """Gives a step up. K and V that it wrote are overwritten when it is planned again."""
        logger.warning("Step %d of lane %d fails: %s", step.number, lane.index, reason)
        step.layers.close()
        lane.step = None
        lane.first_due_step = step.number + self._max_steps_in_flight
        self._answers.append(partial(self._session.fail_step, lane.index, step.number, reason))

    def _on_link_up(self, link: _core.LinkUp) -> None:
        lanes = range(len(self._lanes))
        self._peers[link.role_rank] = FfnPeer(
            link.peer,
            [slot_tensor(self._session.send_slot(link.peer, lane)) for lane in lanes],
            [slot_tensor(self._session.receive_slot(link.peer, lane)) for lane in lanes],
        )
        for lane in self._lanes:
            lane.taken_by_peer.discard(link.peer)
        logger.info("Linked to FFN rank %d over %s: %s", link.role_rank, link.fabric, link.reason)

    def _on_link_down(self, link: _core.LinkDown) -> None:
        rank = self._rank_of(link.peer)
        if rank is not None:
            del self._peers[rank]
        for lane in self._lanes:
            lane.taken_by_peer.discard(link.peer)
            step = lane.step
            if step is None:
                continue
            if link.peer in step.waiting.values() or rank in step.unsent:
                self._fail(lane, step, f"the link to FFN instance {link.peer} is down")
        level = logging.INFO if self._is_draining else logging.WARNING
        logger.log(level, "The link to FFN instance %d is down: %s", link.peer, link.reason)

    def _rank_of(self, instance_id: int) -> int | None:
        for rank, peer in self._peers.items():
            if peer.instance_id == instance_id:
                return rank
        return None
