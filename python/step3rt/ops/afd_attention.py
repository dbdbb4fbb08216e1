"""An attention instance's end of the links: rows to the FFN ranks that compute them, sums back.

Every call on a lane is a launch on the current stream (on a CPU it runs at once), the same in every
step, so that a captured step replays. kernels/link/afd.cuh tells who may touch what when.
"""

from collections.abc import Sequence

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.afd_endpoint import DEFAULT_WAIT_LIMIT_NS, REPORT_WORDS, AfdEndpoint
from step3rt.ops.afd_host_lane import HostFlag, HostLane
from step3rt.ops.afd_reference import AttentionHostLane, RankSlot
from step3rt.ops.afd_slots import AFD_PEER, SEQUENCE_BITS, AfdShape, Role
from step3rt.ops.device_link import StopWord
from step3rt.ops.rmsnorm_quantize import QuantizedRows

_MAX_SEND_CTAS = 32
_ROWS_PER_SEND_CTA = 4

_SEND = launch.Kernel("link/sm90_fp8_afd_send.cu", num_threads=512, is_dependent=True)
_WAIT = launch.Kernel(
    "link/sm90_u64_afd_wait_sums.cu", num_threads=32, is_dependent=True, leaves_shared=True
)

# struct AfdSendParams of kernels/link/sm90_fp8_afd_send.cu.
_SEND_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("lane", "hidden", "scales", "topk_ids", "topk_weights")),
        *((name, np.uint64) for name in ("num_rows", "present")),
        *((name, np.int32) for name in ("row_capacity", "hidden_size", "top_k", "num_experts")),
        ("is_first_layer", np.int32),
    ],
    align=True,
)


class AttentionSlots(AfdEndpoint):
    """An attention instance's end: one link to each FFN rank, over all lanes."""

    _role = Role.ATTENTION

    def __init__(
        self,
        shape: AfdShape,
        source: int,
        device: torch.device,
        stop: StopWord,
        wait_limit_ns: int = DEFAULT_WAIT_LIMIT_NS,
    ) -> None:
        """Allocates the region, with no link.

        Args:
            shape: Of the deployment.
            source: This instance, 0 <= source < A.
            device: A CPU, or a CUDA device with an index.
            stop: Ends the waits; made for the same device.
            wait_limit_ns: How long sums may take. A source that comes while others are in a step
                waits that step out, and ranks may wait for a dead one: longer than their limit.
        """
        super().__init__(shape, source, device, stop, shape.num_ranks)
        self._wait_limit_ns = wait_limit_ns
        self._present = torch.zeros(
            shape.num_lanes, shape.max_tokens, dtype=torch.int32, device=device
        )
        self._sections = [shape.attention_sections(lane) for lane in range(shape.num_lanes)]
        self._lanes: list[AttentionHostLane] = []
        if self._is_on_cpu:
            self._lanes = [self._host_lane(lane) for lane in range(shape.num_lanes)]
        else:
            for kernel in (_SEND, _WAIT):
                kernel.load(device)
        self.reset()

    def _host_lanes(self) -> Sequence[HostLane]:
        return self._lanes

    def _host_lane(self, lane: int) -> AttentionHostLane:
        admission = HostFlag(self._region.view(self._sections[lane].admission))
        own = AttentionHostLane(
            self.shape,
            self.index,
            admission,
            self._present[lane],
            lambda: self._stop.is_set,
            self._report,
            lane * REPORT_WORDS,
        )
        own.wait_limit_ns = self._wait_limit_ns
        return own

    def connect(self, rank: int, peer_handle: bytes, epoch: int) -> None:
        """Links to an FFN rank. No lane may be in a step; errors of the lanes stay until `reset`.

        Args:
            rank: Of the peer, 0 <= rank < F.
            peer_handle: Its `FfnSlots.handle`.
            epoch: Of this incarnation of the link, the same on both ends, above all before.

        Raises:
            InvalidArgument: the handle or epoch does not fit.
            Unavailable: the peer is gone, or out of reach.
        """
        self._wait_for_lanes()
        mapping = self._map(rank, peer_handle, epoch)
        for lane in range(self.shape.num_lanes):
            ours, theirs = self._sections[lane], self.shape.ffn_sections(lane)
            flag, peer_flag = ours.flags.at(rank), theirs.flags.at(self.index)
            hidden, scales, ids, weights = (
                section.at(self.index)
                for section in (theirs.hidden, theirs.scales, theirs.ids, theirs.weights)
            )
            if self._is_on_cpu:
                host = self._lanes[lane]
                with host.lock:
                    host.connect(rank, epoch)
                    host.ranks[rank] = RankSlot(
                        hidden=mapping.view(hidden),
                        scales=mapping.view(scales),
                        ids=mapping.view(ids),
                        weights=mapping.view(weights),
                        peer_flag=HostFlag(mapping.view(peer_flag)),
                        flag=HostFlag(self._region.view(flag)),
                    )
                continue
            peer = np.zeros(1, dtype=AFD_PEER)
            peer["slots"] = [mapping.address(slot) for slot in (hidden, scales, ids, weights)]
            peer["peer_flag"] = mapping.address(peer_flag)
            peer["flag"] = self._region.address(flag)
            peer["epoch_bits"] = epoch << SEQUENCE_BITS
            self._write_peer(lane, rank, peer)

    def reset(self) -> None:
        """Clears all errors and links, when no lane runs: every rank has to be connected anew."""
        self._wait_for_lanes()
        for lane in range(self.shape.num_lanes):
            if self._is_on_cpu:
                self._lanes[lane].reset()
                self._lanes[lane].ranks = [None] * self.shape.num_ranks
                continue
            header = self._lane_header(lane, self._wait_limit_ns)
            header["admission"] = self._region.address(self._sections[lane].admission)
            self._write_lane(lane, header)
            self._clear_report(lane, 0, REPORT_WORDS)

    def send(
        self,
        lane: int,
        hidden: QuantizedRows,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_rows: torch.Tensor,
        num_experts: int,
        *,
        is_first_layer: bool,
    ) -> None:
        """Writes each row to the ranks that compute it, all in one launch, and publishes.

        Each rank gets the frame of every layer, even without a row for it. Of a step's first layer,
        ranks above 0 get it when `wait` has learned whom rank 0 admitted to the step.

        Args:
            lane: Whose slots.
            hidden: values e4m3[B, H], scales f32[B, H / 128], B <= T.
            topk: ids i32[B, K] and weights f32[B, K]; None in a dense layer.
            num_rows: i32[1] on the device: rows that are sent, at most B.
            num_experts: Routed experts of the layer, E; 0 in a dense layer.
            is_first_layer: Whether this begins a step.

        Raises:
            ValueError: a shape, dtype, device or layout does not fit.
        """
        capacity = hidden.values.shape[0]
        if not 1 <= capacity <= self.shape.max_tokens or (topk is None) != (num_experts == 0):
            raise ValueError(
                f"{capacity} rows for {num_experts} experts cannot be sent. Slots hold 1 to "
                f"{self.shape.max_tokens} rows, and a dense layer has neither experts nor choices. "
                "Pass what the docstring names."
            )
        hidden.check(capacity, self.shape.hidden_size, self.device)
        launch.check_tensor("num_rows", num_rows, (1,), torch.int32, self.device)
        if topk is not None:
            shape = (capacity, self.shape.top_k)
            launch.check_tensor("topk ids", topk[0], shape, torch.int32, self.device)
            launch.check_tensor("topk weights", topk[1], shape, torch.float32, self.device)
        if self._is_on_cpu:
            self._lanes[lane].send(
                hidden, topk, num_rows, num_experts, is_first_layer=is_first_layer
            )
            return
        params = np.zeros(1, dtype=_SEND_DTYPE)
        params["lane"] = self._lane_pointer(lane)
        params["hidden"] = hidden.values.data_ptr()
        params["scales"] = hidden.scales.data_ptr()
        if topk is not None:
            params["topk_ids"], params["topk_weights"] = topk[0].data_ptr(), topk[1].data_ptr()
        params["num_rows"] = num_rows.data_ptr()
        params["present"] = self._present[lane].data_ptr()
        params["row_capacity"] = capacity
        params["hidden_size"] = self.shape.hidden_size
        params["top_k"] = self.shape.top_k
        params["num_experts"] = num_experts
        params["is_first_layer"] = is_first_layer
        num_ctas = min(-(-capacity // _ROWS_PER_SEND_CTA), _MAX_SEND_CTAS)
        _SEND.launch(self.device, num_ctas, (params,))

    def wait(self, lane: int, *, is_first_layer: bool) -> None:
        """Lets the stream wait for the sums of the frame that was sent last, from every rank.

        Args:
            lane: Whose slots.
            is_first_layer: As of the `send` before.
        """
        if self._is_on_cpu:
            self._lanes[lane].wait(is_first_layer=is_first_layer)
            return
        arguments = (np.uint64(self._lane_pointer(lane)), np.int32(is_first_layer))
        _WAIT.launch(self.device, 1, arguments)

    def sums(self, lane: int) -> torch.Tensor:
        """Returns bf16[F, T, H], a view of the region: what each rank made of each row.

        Only the sums that `present` names are of this layer. They stay until the next `send`.
        """
        return self._region.view(self._sections[lane].sums)

    def present(self, lane: int) -> torch.Tensor:
        """Returns i32[T]: bit f is set if rank f answers the row; of the last `send`'s B rows."""
        return self._present[lane]
