"""Offline generation: a local cluster and a client behind one object.

Owns neither processes (`LocalCluster` does) nor the wire; it queues prompts and keeps order.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from step3rt.client import Client, GenerationStream
from step3rt.codec import Prompt, check_prompt, sampling_of
from step3rt.config import DISAGGREGATED, ServeConfig, build
from step3rt.errors import InvalidArgument, Unavailable
from step3rt.local_cluster import LocalCluster
from step3rt.placement import HostConfig
from step3rt.results import RequestOutput
from step3rt.sampling import SamplingParams

MAX_OPEN_STREAMS = 256
"""Streams that are open at once; more prompts wait here, not in the server's queue."""


def shows_progress() -> bool:
    """Whether a progress bar helps: on a terminal, unless STEP3RT_NO_PROGRESS is set."""
    return sys.stderr.isatty() and not os.environ.get("STEP3RT_NO_PROGRESS")


class LLM:
    """A model on this host, ready to generate.

    Starts a coordinator, attention and FFN instances as processes of their own, and stops them
    on `close()`, at the end of the `with` block, or when this process ends.

    Args:
        model: checkpoint directory, or "nano".
        attention: attention instances; default: one, or colocated, one for each device.
        ffn: FFN instances, which share the experts; default: one, or as many.
        lanes: micro-batch lanes per attention instance.
        dtype: "float32" (exact) or "bfloat16".
        precision: "exact" or "production"; see `ServeConfig`.
        fabric: "auto", "cuda_ipc", "shm", "rdma" or "tcp".
        max_model_len: longest sequence; default: the model's.
        threads: threads for one instance's computation.
        placement: "disaggregated" or "colocated"; see `HostConfig`.
        devices: what the processes compute on, e.g. ["cuda:0", "cuda:1"]; other devices than
            "reference" need dtype="bfloat16" and precision="production".
        random_weights: weights are made up, of the sizes in the model's config.json.
        use_progress: progress bars on stderr; default: when it is a terminal and
            STEP3RT_NO_PROGRESS is not set.

    Raises:
        ConfigError: the checkpoint or a setting cannot be used.
        Unavailable: the cluster did not come up.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        attention: int | None = None,
        ffn: int | None = None,
        lanes: int = 3,
        dtype: str = "float32",
        precision: str = "exact",
        fabric: str = "auto",
        max_model_len: int | None = None,
        threads: int = 1,
        placement: str = DISAGGREGATED,
        devices: Sequence[str] = (),
        random_weights: bool = False,
        use_progress: bool | None = None,
    ) -> None:
        placed = {
            "placement": placement,
            "devices": devices,
            "random_weights": random_weights,
            "threads": threads,
        }
        host = build(HostConfig, placed, "LLM")
        counts = {"attention": attention, "ffn": ffn}
        settings = {
            "model": model,
            "listen": "127.0.0.1:0",
            **host.counts(),
            **{role: count for role, count in counts.items() if count is not None},
            "lanes": lanes,
            "dtype": dtype,
            "precision": precision,
            "fabric": fabric,
            "max_model_len": max_model_len,
        }
        serve = build(ServeConfig, settings, "LLM")
        self._use_progress = shows_progress() if use_progress is None else use_progress
        with tqdm(
            bar_format="{desc} [{elapsed}]", desc="starting", disable=not self._use_progress
        ) as bar:
            self._cluster = LocalCluster(
                serve,
                **host.options(),
                on_status=lambda text: bar.set_description_str(text),
            )
        # Never by TLS: it speaks to its own children on this host.
        self._client = Client(self._cluster.address, ca="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the coordinator listens; other clients may use it too."""
        return self._cluster.address

    def close(self) -> None:
        """Stops everything; idempotent."""
        self._client.close()
        self._cluster.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Generates continuations of all prompts, together, and returns them in order.

        Args:
            prompts: one prompt or several; a prompt is text or a sequence of token ids.
            params: sampling and stopping, the same for all.
            use_tqdm: a progress bar over prompts; default: as `use_progress`.

        Raises:
            InvalidArgument: `prompts` mixes prompts and token ids.
            Step3Error: the first request that failed; the others are cancelled.
        """
        batch = _as_batch(prompts)
        params = sampling_of(params, {})
        return self._run(
            [partial(self._client.generate, prompt, params) for prompt in batch], use_tqdm
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
    ) -> RequestOutput:
        """Generates the next turn of one conversation (OpenAI message format).

        Raises:
            Step3Error: the request failed.
        """
        [output] = self._run([partial(self._client.chat, messages, params)], use_tqdm=False)
        return output

    def _run(
        self, starts: Sequence[Callable[[], GenerationStream]], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        is_shown = self._use_progress if use_tqdm is None else use_tqdm
        streams: list[GenerationStream] = []
        outputs: list[RequestOutput | None] = [None] * len(starts)
        num_tokens = 0
        has_failed = threading.Event()

        def run(index: int) -> int:
            stream = starts[index]()
            streams.append(stream)
            # Whoever sets the flag closes the streams that it then sees; this one may come after.
            if has_failed.is_set():
                stream.close()
            outputs[index] = stream.result()
            return index

        with (
            tqdm(total=len(starts), desc="generating", disable=not is_shown) as bar,
            ThreadPoolExecutor(min(MAX_OPEN_STREAMS, max(1, len(starts)))) as pool,
        ):
            futures = [pool.submit(run, index) for index in range(len(starts))]
            try:
                for future in self._cluster.as_completed(futures):
                    output = outputs[future.result()]
                    assert output is not None, "a finished run has stored its output"
                    num_tokens += sum(len(item.token_ids) for item in output.outputs)
                    rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                    bar.update()
            except BaseException as error:
                has_failed.set()
                for future in futures:
                    future.cancel()
                for stream in streams:
                    stream.close()
                if isinstance(error, Unavailable):
                    self._cluster.check()  # how a child died says more than that it is missing
                raise
        return [output for output in outputs if output is not None]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, text or ids, becomes a batch of one.

    Raises:
        InvalidArgument: prompts and token ids are mixed, or a prompt is neither.
    """
    check_prompt(prompts)
    if isinstance(prompts, str):
        return [prompts]
    token_ids: list[int] = []
    batch: list[Prompt] = []
    for item in prompts:
        if isinstance(item, int | Integral):  # numpy's, too
            token_ids.append(int(item))
        else:
            check_prompt(item)
            batch.append(item if isinstance(item, str) else list(item))
    if token_ids and batch:
        raise InvalidArgument(
            f"Prompts and token ids are mixed: {len(batch)} prompts and {len(token_ids)} ids in "
            "one sequence. A prompt of token ids is a sequence of its own. Put the ids into a list"
        )
    return [token_ids] if token_ids else batch
