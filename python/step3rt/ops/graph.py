"""A step as one launch: a captured CUDA graph, or on the CPU the calls that it would hold.

Owns the capture and the replay; never the buffers that the launches read and write, which have to
stay where they are.
"""

from collections.abc import Callable

import torch

from step3rt.ops.stream import Stream


class StepGraph:
    """A captured sequence of launches, replayed as often as wanted."""

    def __init__(
        self,
        launch: Callable[[], None],
        stream: Stream | None,
        captured: torch.cuda.CUDAGraph | None,
    ) -> None:
        """`StepGraph.capture` makes it."""
        self._launch = launch if captured is None else captured.replay
        self._stream = stream

    @classmethod
    def capture(
        cls, device: torch.device, launch: Callable[[], None], stream: Stream | None = None
    ) -> "StepGraph":
        """Captures what `launch` launches on the current stream.

        On a GPU `launch` is called twice: once for its effect, which loads kernels and lets cuBLAS
        choose, both impossible in a capture; then once to be captured, which computes nothing.
        Let the buffers hold what the first call may harmlessly compute; a launch that awaits a peer
        needs one that answers, or to be told not to wait. On the CPU it is not called: a replay
        calls it.

        Other streams may be at work meanwhile: nothing here waits for them.

        Args:
            device: Of all that `launch` touches.
            launch: Launches kernels and copies between fixed buffers; the host waits for nothing.
            stream: Where replays run; None: on the stream that is current then, and on the CPU in
                the caller's thread.

        Raises:
            RuntimeError: something was launched that a graph cannot hold.
        """
        if device.type != "cuda":
            return cls(launch, stream, None)
        side = (stream or Stream(device)).cuda_stream()
        if side is None:
            raise ValueError(
                f"The stream is of the CPU, the graph of {device}. A graph replays on its own "
                "device. Pass a stream of it."
            )
        side.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            launch()
            side.synchronize()
            # Not torch.cuda.graph: it waits for the whole device, where other lanes may be parked.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        return cls(launch, stream, graph)

    def replay(self) -> None:
        """Launches the step; returns before it is computed, except in the caller's thread.

        Raises:
            Exception: what earlier work of the stream has raised.
        """
        if self._stream is None:
            self._launch()
        else:
            self._stream.run(self._launch)
