"""An FFN rank's end of the links: rows of all sources in, each row's sum back to its source.

Every call on a lane is a launch on the current stream (on a CPU it runs at once), the same in every
step, so that a captured step replays. kernels/link/afd.cuh tells who may touch what when.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from step3rt.errors import InvalidArgument
from step3rt.ops import launch
from step3rt.ops.afd_endpoint import REPORT_WORDS, AfdEndpoint
from step3rt.ops.afd_host_lane import HostFlag, HostLane
from step3rt.ops.afd_reference import FfnHostLane, SourceSlot
from step3rt.ops.afd_region import HostWords
from step3rt.ops.afd_slots import AFD_PEER, MAX_PEERS, SEQUENCE_BITS, AfdShape, Role
from step3rt.ops.device_link import StopWord
from step3rt.ops.moe_fp8 import MoeTokens, MoeWorkspace

DEFAULT_STEP_LIMIT_NS = 400_000_000
"""Less than half of an attention instance's limit, so that losing a source costs no other one."""
DEFAULT_JOIN_WINDOW_NS = 10_000_000
"""Longer than what is between an instance's last layer and its next step's first rows: the head,
the sampler and a layer's attention, beside other lanes. With less, two sources that once fell out
of step would take turns for ever, each waiting out the other's steps."""

_MAX_PUSH_CTAS = 264  # two of 448 threads on every SM of an H200

_WAIT = launch.Kernel(
    "link/sm90_i32_afd_wait_tokens.cu", num_threads=512, is_dependent=True, leaves_shared=True
)
_PUSH = launch.Kernel("moe/sm90_bf16_moe_combine_push.cu", num_threads=448, is_dependent=True)

# struct AfdTokensParams of kernels/link/sm90_i32_afd_wait_tokens.cu.
_TOKENS_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("lane", "ids", "weights", "own_ids", "own_weights")),
        *((name, np.int32) for name in ("num_columns", "is_first_layer")),
    ],
    align=True,
)
# struct MoePushParams of kernels/moe/sm90_bf16_moe_combine_push.cu.
_PUSH_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("lane", "expert_out", "token_rows", "ids", "weights")),
        *((name, np.int32) for name in ("num_columns", "num_slices", "row_capacity", "width")),
        ("num_rows", np.int32),
    ],
    align=True,
)


class FfnSlots(AfdEndpoint):
    """An FFN rank's end: one link to each attention instance, over all lanes."""

    _role = Role.FFN

    def __init__(
        self,
        shape: AfdShape,
        rank: int,
        device: torch.device,
        stop: StopWord,
        wait_limit_ns: int = DEFAULT_STEP_LIMIT_NS,
        join_window_ns: int = DEFAULT_JOIN_WINDOW_NS,
        idle_limit_ns: int = 0,
    ) -> None:
        """Allocates the region, with no link.

        Args:
            shape: Of the deployment.
            rank: This instance, 0 <= rank < F. Rank 0 decides who takes part in a step.
            device: A CPU, or a CUDA device with an index.
            stop: Ends the waits; made for the same device.
            wait_limit_ns: How long after the first source of a layer another may come before the
                step goes on without it; twice as long while none comes. Shorter than the limit of
                the attention instances.
            join_window_ns: How long rank 0, with the first source of a step at hand, waits for
                those that took part in one of the last two steps.
            idle_limit_ns: How long a step's first wait lasts while no source comes; then the step
                ends with nothing, and who comes later begins the next one. 0: without a limit.
        """
        super().__init__(shape, rank, device, stop, shape.num_sources)
        self._limits_ns = (wait_limit_ns, join_window_ns, idle_limit_ns)
        control = HostWords(MAX_PEERS + shape.num_lanes, device)
        self._control = control
        # The epoch under which each source may send, or 0; then whether each lane is paused.
        self._active, self._paused = control.values[:MAX_PEERS], control.values[MAX_PEERS:]
        sizes = (shape.num_lanes, shape.num_rows, shape.num_columns)
        self._ids = torch.full(sizes, -1, dtype=torch.int32, device=device)
        self._weights = torch.zeros(sizes, device=device)
        self._sections = [shape.ffn_sections(lane) for lane in range(shape.num_lanes)]
        self._lanes: list[FfnHostLane] = []
        if self._is_on_cpu:
            self._lanes = [self._host_lane(lane) for lane in range(shape.num_lanes)]
        else:
            for kernel in (_WAIT, _PUSH):
                kernel.load(device)
        self.reset()

    def _host_lanes(self) -> Sequence[HostLane]:
        return self._lanes

    def _host_lane(self, lane: int) -> FfnHostLane:
        sections = self._sections[lane]
        own = FfnHostLane(
            self.shape,
            self.index,
            (self._region.view(sections.ids), self._region.view(sections.weights)),
            (self._ids[lane], self._weights[lane]),
            (self._active, self._paused[lane : lane + 1]),
            lambda: self._stop.is_set,
            self._report,
            lane * REPORT_WORDS,
        )
        own.wait_limit_ns, own.join_window_ns, own.idle_limit_ns = self._limits_ns
        return own

    def connect(self, source: int, peer_handle: bytes, epoch: int) -> None:
        """Links to an attention instance and lets it take part; others' steps go on.

        On a GPU this waits until the lanes are between steps, at most for the limit of a wait, and
        holds them there, all at once: see `holds_in_turn`. The peer may send only after this has
        returned on every rank.

        Args:
            source: Of the peer, 0 <= source < A.
            peer_handle: Its `AttentionSlots.handle`.
            epoch: Of this incarnation of the link, the same on both ends, above all before.

        Raises:
            InvalidArgument: the handle or epoch does not fit.
            Unavailable: the peer is gone, or out of reach.
        """
        with self._between_steps():
            self._active[source] = 0
            mapping = self._map(source, peer_handle, epoch)
            for lane in range(self.shape.num_lanes):
                ours, theirs = self._sections[lane], self.shape.attention_sections(lane)
                flag, peer_flag = ours.flags.at(source), theirs.flags.at(self.index)
                sums = theirs.sums.at(self.index)
                if self._is_on_cpu:
                    host = self._lanes[lane]
                    with host.lock:
                        host.connect(source, epoch)
                        host.sources[source] = SourceSlot(
                            sums=mapping.view(sums),
                            peer_flag=HostFlag(mapping.view(peer_flag)),
                            peer_admission=HostFlag(mapping.view(theirs.admission)),
                            flag=HostFlag(self._region.view(flag)),
                        )
                    continue
                peer = np.zeros(1, dtype=AFD_PEER)
                peer["slots"][0, 0] = mapping.address(sums)
                peer["peer_flag"] = mapping.address(peer_flag)
                peer["peer_admission"] = mapping.address(theirs.admission)
                peer["flag"] = self._region.address(flag)
                peer["epoch_bits"] = epoch << SEQUENCE_BITS
                self._write_peer(lane, source, peer)
            self._active[source] = epoch

    def set_active(self, source: int, is_active: bool) -> None:
        """Says whether a linked source may still send; `connect` says that it may.

        A source that may not send leaves the step that it takes part in as soon as it is waited
        for in vain, and the others go on. It comes back with `connect`.

        Args:
            source: Which one.
            is_active: False when it is lost; True confirms what `connect` said.

        Raises:
            InvalidArgument: it is to become active without having been linked since it was not.
        """
        if not is_active:
            self._active[source] = 0
        elif not self._active[source]:
            raise InvalidArgument(
                f"Source {source} is not linked. Its sequence numbers are unknown once it has been "
                "lost. Connect it under a new epoch"
            )

    @property
    def holds_in_turn(self) -> bool:
        """Whether lanes are to be paused one after the other, each once those before it are idle.

        Ranks but the first begin steps in no order of their own. Two that paused all lanes at once
        could each be in a step that the other one does not begin any more, and wait for its end.
        """
        return self.index > 0 and self.shape.num_ranks > 2

    def pause(self, lane: int | None = None) -> None:
        """Lets a lane begin no step: a first layer's wait returns at once, with nothing to do.

        A step in progress ends. One that rank 0 has admitted is begun after `resume`.

        Args:
            lane: Which one; None: all.
        """
        self._paused[slice(None) if lane is None else lane] = 1

    def resume(self) -> None:
        """Lets all lanes begin steps again."""
        self._paused[:] = 0

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        were_paused = self._paused.copy()
        self.pause()
        try:
            self._wait_for_lanes()
            yield
        finally:
            self._paused[:] = were_paused

    def reset(self) -> None:
        """Clears all errors and links, when no lane runs: every source has to be connected anew."""
        with self._between_steps():
            self._active[:] = 0
            for lane in range(self.shape.num_lanes):
                if self._is_on_cpu:
                    self._lanes[lane].reset()
                    self._lanes[lane].sources = [None] * self.shape.num_sources
                    continue
                header = self._lane_header(lane, self._limits_ns[0])
                header["join_window_ns"], header["idle_limit_ns"] = self._limits_ns[1:]
                header["active"] = self._control.address
                header["pause"] = self._control.address + 4 * (MAX_PEERS + lane)
                self._write_lane(lane, header)
                self._clear_report(lane, 0, REPORT_WORDS)

    def wait(self, lane: int, is_first_layer: bool) -> None:
        """Lets the stream wait for a layer's rows, of all sources that take part in the step.

        Without an idle limit a step's first wait has none, so nothing else may wait for the whole
        GPU meanwhile: allocate, and launch every kernel once, before. After an error nobody takes
        part.

        Args:
            lane: Whose slots.
            is_first_layer: Whether a step begins: then it waits for any source, up to the idle
                limit if there is one.
        """
        if self._is_on_cpu:
            self._lanes[lane].wait(is_first_layer=is_first_layer)
            return
        sections = self._sections[lane]
        params = np.zeros(1, dtype=_TOKENS_DTYPE)
        params["lane"] = self._lane_pointer(lane)
        params["ids"] = self._region.address(sections.ids)
        params["weights"] = self._region.address(sections.weights)
        params["own_ids"] = self._ids[lane].data_ptr()
        params["own_weights"] = self._weights[lane].data_ptr()
        params["num_columns"] = self.shape.num_columns
        params["is_first_layer"] = is_first_layer
        _WAIT.launch(self.device, 1, (params,))

    def tokens(self, lane: int) -> MoeTokens:
        """Returns the layer's A * T rows: hidden states in place, the lane's own ids and weights.

        Source a's rows begin at a * T. Rows that nobody asked for have ids of -1 and weights of 0;
        their hidden states may change at any time.
        """
        sections = self._sections[lane]
        return MoeTokens(
            self._region.view(sections.hidden).flatten(0, 1),
            self._region.view(sections.scales).flatten(0, 1),
            self._ids[lane],
            self._weights[lane],
        )

    def push(self, lane: int, sums: torch.Tensor) -> None:
        """Writes each row's sum back to the source that asked for it, and publishes.

        Args:
            lane: Whose slots.
            sums: bf16[A * T, H], contiguous; rows that nobody asked for are not read.

        Raises:
            ValueError: the shape, dtype, device or layout does not fit.
        """
        shape = (self.shape.num_rows, self.shape.hidden_size)
        launch.check_tensor("sums", sums, shape, torch.bfloat16, self.device)
        if self._is_on_cpu:
            self._lanes[lane].push(sums)
            return
        params = self._push_params(lane)
        params["expert_out"] = sums.data_ptr()
        params["num_slices"] = 1
        self._launch_push(params)

    def push_experts(self, lane: int, workspace: MoeWorkspace) -> None:
        """Adds up what the experts made of each row, straight into the sources' memory.

        Args:
            lane: Whose slots.
            workspace: After `moe_down`, on a GPU, for at least A * T tokens of C columns.
        """
        num_slices, capacity, _ = workspace.expert_out.shape
        params = self._push_params(lane)
        params["expert_out"] = workspace.expert_out.data_ptr()
        params["token_rows"] = workspace.token_rows.data_ptr()
        params["num_slices"] = num_slices
        params["row_capacity"] = capacity
        self._launch_push(params)

    def _push_params(self, lane: int) -> np.ndarray[Any, Any]:
        params = np.zeros(1, dtype=_PUSH_DTYPE)
        params["lane"] = self._lane_pointer(lane)
        params["ids"] = self._ids[lane].data_ptr()
        params["weights"] = self._weights[lane].data_ptr()
        params["num_columns"] = self.shape.num_columns
        params["width"] = self.shape.hidden_size
        params["num_rows"] = self.shape.num_rows
        return params

    def _launch_push(self, params: np.ndarray[Any, Any]) -> None:
        _PUSH.launch(self.device, min(self.shape.num_rows, _MAX_PUSH_CTAS), (params,))
