"""The Rust extension module: coordinator, instance session and fabric, behind one thin door.

Every call that may wait releases the GIL. Errors are the classes of `step3rt.errors`.
"""

from typing import Literal, final

__version__: str

def serve(config_json: str) -> int:
    """Runs the coordinator until SIGTERM, SIGINT or a fatal error, and returns the exit code.

    `config_json` is `ServeConfig.to_json()`. Blocks without the GIL; signals are handled in Rust.

    Raises:
        ConfigError: a value is not usable, an address is taken, the model directory is unreadable.
    """

def host_capabilities() -> dict[str, object]:
    """What this host's fabrics can do, for `step3rt doctor`: shm, tcp, limits, with reasons."""

def list_instances(control_address: str, timeout_s: float) -> str:
    """`ListInstances` of the coordinator at `control_address`, as JSON."""

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
    """A link to `peer` is usable. `role_rank` is the peer's position in its role."""

    kind: Literal["link_up"]
    peer: int
    role_rank: int
    fabric: str
    reason: str

@final
class LinkDown:
    """The link to `peer` is over; what was in flight on it will not arrive."""

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

    def __init__(
        self,
        sequence_id: int,
        token_id: int | None = None,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
        prompt_logprobs: list[tuple[int, float, list[tuple[int, float]]]] | None = None,
        is_corrupt: bool = False,
    ) -> None: ...

@final
class Settings:
    """The cluster's settings as the coordinator fixed them (`ClusterSettings` in the protocol)."""

    num_lanes: int
    max_tokens_per_micro_batch: int
    block_size_tokens: int
    max_model_len: int
    ep_size: int
    compute_dtype: str
    a2f_dtype: str
    f2a_dtype: str
    kv_dtype: str
    fabric: str

@final
class NodeSession:
    """One instance's session with the coordinator, and its fabric endpoint.

    Belongs to one thread, the instance's loop. Heartbeats run in Rust, but the watchdog is fed
    only by `poll`, so that a stuck loop is seen.
    """

    instance_id: int
    role_rank: int
    epoch: int
    settings: Settings

    def __init__(self, options_json: str) -> None:
        """Connects, retrying until the coordinator answers, and returns after Welcome.

        `options_json`: {"coordinator": "host:port" | "unix:/path", "role": "attention" | "ffn",
        "data_host": str, "runtime_dir": str, "connect_timeout_s": float, "spin_us": int,
        "model_fingerprint": str, "model": {…fields of ModelSummary…}}.

        Raises:
            Unavailable: no coordinator within `connect_timeout_s`.
            ConfigError: the coordinator refuses this instance (other model, no free FFN rank…).
        """

    def set_status(self, text: str) -> None:
        """Shows `text` in heartbeats and as the systemd STATUS; extends the start time-out."""

    def bind(self, a2f_slot_bytes: int, f2a_slot_bytes: int) -> None:
        """Binds the data listeners; a slot of each direction per lane and peer has these sizes."""

    def ready(self, num_kv_blocks: int) -> None:
        """Reports that weights are loaded and steps (attention) or frames (FFN) may come."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Waits until there is news, at most `timeout_s`, and takes all of it, in order."""

    def send_slot(self, peer: int, lane: int) -> memoryview:
        """The writable slot for the next push to `peer` on `lane`; the same memory every time."""

    def receive_slot(self, peer: int, lane: int) -> memoryview:
        """The slot where arrivals from `peer` on `lane` lie; the same memory every time."""

    def push(
        self, peer: int, lane: int, step: int, layer: int, num_tokens: int, payload_bytes: int
    ) -> None:
        """Publishes the send slot's first `payload_bytes` bytes.

        Raises:
            Unavailable: the link is down; a `LinkDown` event says why.
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
        """Reports a step's outputs, one per chunk in the plan's order."""

    def fail_step(self, lane: int, step: int, reason: str) -> None:
        """Reports that a step had no effect; the coordinator plans it again."""

    def close(self) -> None:
        """Ends the session and every link; idempotent."""
