"""The Rust extension module: coordinator, instance session and fabric, behind one thin door.

Every call that may wait releases the GIL. Errors are the classes of `step3rt.errors`.
"""

from typing import Literal, Self, final

from step3rt.config import TlsPaths

__all__ = [
    "Arrival",
    "Chunk",
    "Drain",
    "Event",
    "Join",
    "LinkDown",
    "LinkUp",
    "LogitAdjustments",
    "NodeSession",
    "Sampling",
    "SequenceOutput",
    "SessionLost",
    "Settings",
    "StepPlan",
    "__version__",
    "bench_scheduler",
    "echo_link",
    "host_capabilities",
    "list_instances",
    "measure_link",
    "rdma_findings",
    "replay_traffic",
    "serve",
    "simulate",
    "tls_findings",
]

__version__: str

def serve(config_json: str) -> int:
    """Runs the coordinator until SIGTERM, SIGINT or a fatal error, and returns the exit code.

    `config_json` is `ServeConfig.to_json()`. Blocks without the GIL; signals are handled in Rust.

    Raises:
        ConfigError: a value is not usable, an address is taken, the model directory is unreadable.
    """

def host_capabilities() -> dict[str, tuple[bool, str]]:
    """What this host's fabrics can do, by trying: "shm", "tcp", "limits" -> (usable, why)."""

def rdma_findings() -> list[tuple[bool, str, str]]:
    """What decides whether this host can use RDMA: (is as it must be, what it is, what to do)."""

def tls_findings(tls: TlsPaths) -> list[tuple[Literal["ok", "note", "missing"], str, str]]:
    """What is right and wrong with certificate, key and CA: (level, what it is, what to do)."""

def list_instances(control_address: str, timeout_s: float, tls: TlsPaths | None = None) -> str:
    """`ListInstances` of the coordinator at `control_address`, as JSON; by TLS with `tls`.

    Raises:
        ConfigError: certificate, key or CA cannot be used.
        Unavailable: no coordinator answers there within `timeout_s`.
    """

def simulate(options_json: str) -> str:
    """Runs simulated seeds of the scheduler without the GIL; JSON in and out.

    Takes `first_seed`, `seeds`, `threads`, `sabotage` (a name or null) and `trace` (tell
    `first_seed` in words). Gives `violations` [{seed, what}], `faults` and `ends` by name,
    `events`, `seconds`, and `trace` if asked for.

    Raises:
        InvalidArgument: a field is missing, unknown or not usable.
    """

def bench_scheduler(options_json: str) -> str:
    """Measures what the scheduler costs per lane step, without the GIL; JSON in and out.

    Takes `sequences`, `attention`, `lanes`, `steps` and `scaling`. Times are in microseconds.

    Raises:
        InvalidArgument: a field is missing, unknown or not usable.
    """

def replay_traffic(options_json: str) -> str:
    """Replays a trace through the scheduler and a plain policy in simulated time; JSON in and out.

    Takes `trace`, `seed`, `requests`, `attention`, `kv_blocks` and `tpot_target_ms`. Gives the
    same figures for `step3rt` and `fcfs`.

    Raises:
        InvalidArgument: a field is missing, unknown or not usable.
    """

def measure_link(
    carrier: str, num_bytes: int, num_rounds: int, address: str, tls: TlsPaths | None = None
) -> tuple[list[float], float]:
    """Measures frames to and fro, without the GIL.

    Returns every round's one-way time, and the CPU time of this process per round; microseconds.
    `carrier` is shm, tcp, rdma, or a baseline without a link: socket, or flag (shared memory).
    `address` is the first line that `echo_link` has written. With `tls`, a link over tcp is
    encrypted.

    Raises:
        InvalidArgument: an argument is not usable.
        Unavailable: the ends did not link, or the other one went away.
    """

def echo_link(carrier: str, num_bytes: int, num_rounds: int, tls: TlsPaths | None = None) -> None:
    """The other process of `measure_link`, with the same arguments: sends back what comes.

    Writes two lines to standard output: its address at the start, and at the end its CPU
    microseconds per round.

    Raises:
        InvalidArgument: an argument is not usable.
        Unavailable: this end cannot be made, or the other one went away.
    """

@final
class Chunk:
    """Computes known tokens [num_computed_tokens, num_computed_tokens + num_new_tokens)."""

    sequence_id: int
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: list[int]
    samples: bool

@final
class Sampling:
    """Validated sampling parameters; the meanings are those of `SamplingState` in the protocol."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    top_logprobs: int | None
    prompt_logprobs: int | None
    min_tokens: int
    stop_token_ids: list[int]
    adjustments: LogitAdjustments | None

@final
class LogitAdjustments:
    """What is added to logits before a token is chosen; the rules are in `ops.logit_adjust`.

    `bias_token_ids` ascend; `biases` has one entry for each.
    """

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_token_ids: list[int]
    biases: list[float]

@final
class Join:
    """A sequence that the lane learns: all known tokens and how to sample."""

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling

@final
class StepPlan:
    """One lane's next step: forget `left`, learn `joined`, compute `chunks`."""

    kind: Literal["step_plan"]
    lane: int
    step: int
    left: list[int]
    joined: list[Join]
    chunks: list[Chunk]

@final
class Arrival:
    """A checked frame lies in the receive slot of (peer, lane), until the next push there."""

    kind: Literal["arrival"]
    peer: int
    lane: int
    sequence: int
    step: int
    layer: int
    num_tokens: int
    payload_bytes: int

@final
class LinkUp:
    """A link to `peer` is usable. `role_rank` is the peer's position in its role.

    `epoch` names this incarnation of the link: the same at both ends, in 1..2**24 - 1, and above
    those of all links that either process had before; device links count frames under it.
    `device_offer` is what the peer gave `bind()`, if `fabric` is "cuda_ipc", else None. Such a link
    says when the peer ends, like any other, and its slots have one byte.
    """

    kind: Literal["link_up"]
    peer: int
    role_rank: int
    fabric: str
    reason: str
    epoch: int
    device_offer: bytes | None

@final
class LinkDown:
    """The link to `peer` is over; what was in flight on it will not arrive.

    After a reset, `reason` is "reset: " and why, and a `LinkUp` under a new epoch follows.
    """

    kind: Literal["link_down"]
    peer: int
    reason: str

@final
class Drain:
    """The coordinator or a signal asks to finish: what is in flight, then `close()`."""

    kind: Literal["drain"]

@final
class SessionLost:
    """The coordinator is gone: every sequence is void; a new session is needed."""

    kind: Literal["session_lost"]
    reason: str

Event = StepPlan | Arrival | LinkUp | LinkDown | Drain | SessionLost

@final
class SequenceOutput:
    """What a chunk gave. `top` pairs are (token id, logprob), most likely first."""

    def __new__(
        cls,
        sequence_id: int,
        token_id: int | None = None,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
        prompt_logprobs: list[tuple[int, float, list[tuple[int, float]]]] | None = None,
        is_corrupt: bool = False,
    ) -> Self: ...

@final
class Settings:
    """The cluster's settings as the coordinator fixed them (`ClusterSettings` in the protocol)."""

    num_lanes: int
    max_tokens_per_micro_batch: int
    block_size_tokens: int
    max_model_len: int
    ep_size: int
    max_steps_in_flight: int
    compute_dtype: str
    a2f_dtype: str
    f2a_dtype: str
    kv_dtype: str
    fabric: str
    num_attention: int

@final
class NodeSession:
    """One instance's session with the coordinator, and its fabric endpoint.

    Belongs to one thread, the instance's loop; a second thread inside of it is a `RuntimeError`.
    Heartbeats run in Rust, but the watchdog is fed only by `poll`, so that a stuck loop is seen.
    """

    instance_id: int
    role_rank: int
    epoch: int
    settings: Settings

    def __new__(cls, options_json: str) -> Self:
        """Connects, retrying until the coordinator answers, and returns after Welcome.

        `options_json`: {"coordinator": "host:port" | "unix:/path", "role": "attention" | "ffn",
        "data_host": IP address, "connect_timeout_s": float, "spin_us": int,
        "model_fingerprint": str, "model": {…fields of ModelSummary…}}, all of them.

        Raises:
            Unavailable: no coordinator, or none with a free FFN rank, within `connect_timeout_s`.
            ConfigError: an option is not usable, or the coordinator refuses this instance (other
                model, other version…).
            Cancelled: a signal that an earlier session of this process took over.
        """

    def set_status(self, text: str) -> None:
        """Shows `text` in heartbeats and as the systemd STATUS; extends the start time-out.

        Raises:
            Cancelled: a signal asked to stop that an earlier session of this process took over.
        """

    def bind(
        self, a2f_slot_bytes: int, f2a_slot_bytes: int, device_offer: bytes | None = None
    ) -> None:
        """Binds the data listeners; a slot of each direction per lane and peer has these sizes.

        `device_offer` is what all peers are told of this instance's device memory, at most 4096
        bytes that are not looked into. Where both ends of a link have one, on one host, the link's
        fabric is "cuda_ipc". The cluster's `fabric` setting may keep it from that, or ask for it.

        Raises:
            ConfigError: `data_host` is not of this host, no slot can have such a size, or the
                `fabric` setting is "cuda_ipc" and there is no offer.
            InvalidArgument: the listeners are bound already, or the offer is too long.
        """

    def ready(self, num_kv_blocks: int) -> None:
        """Reports that weights are loaded and steps (attention) or frames (FFN) may come.

        On the main thread it also takes SIGTERM and SIGINT over for the rest of the process: the
        first one is a `Drain` event, the second one exits at once with 128 + its number. Until
        then nothing is in flight, and signals do what they do to any Python process.

        Raises:
            Unavailable: the session is over.
            InvalidArgument: before `bind()`, or for the second time.
        """

    def poll(self, timeout_s: float) -> list[Event]:
        """Waits until there is news, at most `timeout_s`, and takes all of it, in order.

        What the coordinator said comes first, then what links did (a link's own events in their
        order), then `SessionLost`, after which there is nothing to do but `close()`.

        Raises:
            InvalidArgument: before `ready()` or after `close()`.
        """

    def send_slot(self, peer: int, lane: int) -> memoryview:
        """The writable slot for the next push to `peer` on `lane`; the same memory every time."""

    def receive_slot(self, peer: int, lane: int) -> memoryview:
        """The slot where arrivals from `peer` on `lane` lie; the same memory every time.

        Read-only: over shared memory it is the peer's own send slot. A view stays readable after
        the link is down.
        """

    def push(
        self, peer: int, lane: int, step: int, layer: int, num_tokens: int, payload_bytes: int
    ) -> None:
        """Publishes the send slot's first `payload_bytes` bytes.

        Raises:
            Unavailable: the link is down; a `LinkDown` event says why.
            InvalidArgument: the last push on this lane is not answered yet (attention), nothing
                arrived to answer (FFN), or the payload is larger than the slot.
        """

    def reset_link(self, peer: int, reason: str) -> None:
        """Has the link to `peer` replaced, as when one of its device lanes has failed.

        From now on nothing of the old link arrives, and pushes are refused. The next poll has a
        `LinkDown` with `reason`, a later one a `LinkUp` under a new epoch; so has the peer's. Of a
        reason longer than 255 bytes the peer hears the beginning. Other links stay as they are.

        Raises:
            Unavailable: the link is down, perhaps as the peer's loop has asked for the same.
        """

    def complete_step(
        self,
        lane: int,
        step: int,
        outputs: list[SequenceOutput],
        compute_ns: int,
        wait_ns: int,
        total_ns: int,
    ) -> None:
        """Reports a step's outputs, one per chunk in the plan's order.

        Raises:
            Unavailable: the session is over.
        """

    def fail_step(self, lane: int, step: int, reason: str) -> None:
        """Reports that a step had no effect; the coordinator plans it again."""

    def close(self) -> None:
        """Sends what is reported, then ends the session and every link; idempotent."""
