"""The settings of every process: one frozen dataclass each, from defaults, TOML and flags.

Owns names, defaults, help texts and validation; starts nothing. A value comes from the command
line, else from the TOML file, else from the default here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from step3rt.errors import ConfigError
from step3rt.setting import build_part, setting, sms_setting

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("exact", "production")
KV_DTYPES = ("auto", "float32", "bfloat16", "fp8")
FABRICS = ("auto", "cuda_ipc", "shm", "rdma", "tcp")
DISAGGREGATED = "disaggregated"
COLOCATED = "colocated"
PLACEMENTS = (DISAGGREGATED, COLOCATED)
ROLES = ("attention", "ffn", COLOCATED)
REFERENCE_DEVICE = "reference"
LOG_FORMATS = ("text", "json")
DEFAULT_TRACE_STEPS = 64
MAX_TRACE_STEPS = 4096

C = TypeVar("C")

_TLS_SETTINGS = ("tls_cert", "tls_key", "tls_ca")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the coordinator; the instances get theirs from it when they connect."""

    model: Path = setting("checkpoint directory, or the name of a model that ships (nano)")
    model_name: str = setting("name that requests may ask for; default: the directory's name", "")
    listen: str = setting("host:port for clients; port 0 takes a free one", "127.0.0.1:50051")
    control_listen: str = setting("host:port for instances", "127.0.0.1:50052")
    ready_file: Path | None = setting("file that gets the bound addresses as JSON", None)
    attention: int = setting(
        "attention instances needed before requests are accepted", 1, minimum=1, maximum=1024
    )
    ffn: int = setting(
        "FFN instances that share the experts between them", 1, minimum=1, maximum=1024
    )
    lanes: int = setting("micro-batch lanes per attention instance", 3, minimum=1, maximum=8)
    dtype: str = setting("type of the computation", "float32", choices=DTYPES)
    precision: str = setting(
        "exact: nothing is quantised on the way; production: FP8 activations to the FFN "
        "instances, BF16 back, and FP8 KV unless --kv-dtype says otherwise",
        "exact",
        choices=PRECISIONS,
    )
    kv_dtype: str = setting(
        "type of the KV cache; auto follows --precision", "auto", choices=KV_DTYPES
    )
    fabric: str = setting(
        "how activations travel; auto takes, within a host, device memory where both ends have it, "
        "else shared memory; between hosts RDMA where both ends have it, else TCP",
        "auto",
        choices=FABRICS,
    )
    max_model_len: int | None = setting(
        "longest sequence in tokens; default: the model's", None, minimum=2
    )
    max_tokens_per_micro_batch: int = setting(
        "tokens of one lane's step, prefill and decode together", 512, minimum=16, maximum=65536
    )
    max_steps_in_flight: int = setting(
        "steps of one lane planned and not answered: above 1, the next step starts without "
        "waiting for the coordinator to hear of the last",
        2,
        minimum=1,
        maximum=4,
    )
    target_tpot_ms: int = setting(
        "milliseconds per output token that prompts must leave to those that decode",
        50,
        minimum=1,
        maximum=60_000,
    )
    max_sequences_per_lane: int | None = setting(
        "sequences of one lane; default: 256, or fewer if a micro-batch has fewer tokens",
        None,
        minimum=1,
        maximum=65536,
    )
    max_waiting_requests: int = setting(
        "requests that may wait before new ones are refused", 1024, minimum=1, maximum=1_000_000
    )
    lease_ms: int = setting(
        "silence after which an instance is lost", 3000, minimum=100, maximum=600_000
    )
    step_timeout_ms: int = setting(
        "time after which a step's instance is lost; at least --lease-ms",
        60_000,
        minimum=100,
        maximum=3_600_000,
    )
    recovery_timeout_ms: int = setting(
        "time for which streams wait for a lost instance to return",
        30_000,
        minimum=0,
        maximum=3_600_000,
    )
    drain_timeout_s: float = setting(
        "time for running streams to finish after SIGTERM", 30.0, minimum=0, maximum=86_400
    )
    reflection: bool = setting("serve gRPC reflection", False)
    metrics_listen: str | None = setting(
        "HOST:PORT of metrics for Prometheus, GET /metrics by plain HTTP; default: none", None
    )
    tls_cert: Path | None = setting(
        "the coordinator's certificate (PEM); with it, clients and instances are spoken to by TLS "
        "alone",
        None,
    )
    tls_key: Path | None = setting("its key (PEM)", None)
    tls_ca: Path | None = setting(
        "the cluster's CA (PEM): only instances with a certificate of it are let in", None
    )
    insecure_bind: bool = setting("allow plaintext on an address that is not loopback", False)
    log_format: str = setting(
        "log lines for people, or one JSON object per line", "text", choices=LOG_FORMATS
    )
    assume_computed_prompts: bool = setting(
        "for measurements only: decode at once, as if every prompt had been computed; what is "
        "generated means nothing",
        False,
    )

    def wire_dtypes(self) -> tuple[str, str, str]:
        """(A2F, F2A, KV) types that `precision`, `dtype` and `kv_dtype` name together."""
        is_exact = self.precision == "exact"
        a2f = self.dtype if is_exact else "fp8"
        f2a = self.dtype if is_exact else "bfloat16"
        if self.kv_dtype != "auto":
            return a2f, f2a, self.kv_dtype
        return a2f, f2a, self.dtype if is_exact else "fp8"

    def to_json(self) -> str:
        """The coordinator's configuration as the extension module takes it."""
        a2f_dtype, f2a_dtype, kv_dtype = self.wire_dtypes()
        model = resolve_model(self.model)
        values = {
            "model_path": str(model),
            "model_name": self.model_name or model.name,
            "num_attention": self.attention,
            "ep_size": self.ffn,
            "num_lanes": self.lanes,
            "block_size_tokens": 64,
            "compute_dtype": self.dtype,
            "a2f_dtype": a2f_dtype,
            "f2a_dtype": f2a_dtype,
            "kv_dtype": kv_dtype,
        }
        paths = ("ready_file", *_TLS_SETTINGS)
        values |= {name: _text(getattr(self, name)) for name in paths}
        same = (
            "listen control_listen metrics_listen fabric max_model_len max_tokens_per_micro_batch "
            "max_steps_in_flight target_tpot_ms max_sequences_per_lane max_waiting_requests "
            "lease_ms step_timeout_ms recovery_timeout_ms drain_timeout_s reflection insecure_bind "
            "log_format assume_computed_prompts"
        )
        values |= {name: getattr(self, name) for name in same.split()}
        return json.dumps({name: value for name, value in values.items() if value is not None})

    @property
    def tls(self) -> "TlsPaths | None":
        """Certificate, key and CA, if the coordinator speaks TLS."""
        return _tls(self.tls_cert, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Settings of one instance; everything else comes from the coordinator."""

    role: str = setting(
        "what this instance does; colocated: both, on one device, as two instances of one process",
        choices=ROLES,
    )
    model: Path = setting("checkpoint directory, or the name of a model that ships (nano)")
    coordinator: str = setting("the coordinator's --control-listen", "127.0.0.1:50052")
    device: str = setting(
        "reference: any precision, on the CPU; cuda, cuda:N: FP8 kernels on a GPU, whole steps "
        "without the host; cpu: the GPU's program, by the references of its kernels",
        REFERENCE_DEVICE,
    )
    random_weights: bool = setting(
        "make weights up, of the sizes in the model's config.json, instead of reading them; needs "
        "a --device other than reference",
        False,
    )
    attention_sms: int | None = sms_setting("the attention kernel fills", minimum=1)
    ffn_sms: int | None = sms_setting("the experts' kernels fill", minimum=2)
    data_host: str = setting("address that peers on other hosts reach this one at", "127.0.0.1")
    kv_blocks: int | None = setting(
        "KV blocks of 64 tokens; default: as --kv-memory-mb allows", None, minimum=1
    )
    kv_memory_mb: int = setting("memory for KV blocks in MiB", 1024, minimum=1)
    trace_dir: Path | None = setting(
        "directory for the times of a device instance's last steps, written when its session ends; "
        "see `step3rt trace`",
        None,
    )
    trace_steps: int = setting(
        "steps of each lane in a trace", DEFAULT_TRACE_STEPS, minimum=2, maximum=MAX_TRACE_STEPS
    )
    random_kv: bool = setting(
        "for measurements only: start with random K and V in all blocks, for prompts that a "
        "coordinator with --assume-computed-prompts never lets compute",
        False,
    )
    connect_timeout_s: float = setting(
        "how long to look for the coordinator before giving up", 60.0, minimum=0
    )
    tls_cert: Path | None = setting(
        "this instance's certificate (PEM), for the coordinator and for links over tcp", None
    )
    tls_key: Path | None = setting("its key (PEM)", None)
    tls_ca: Path | None = setting("the cluster's CA (PEM)", None)
    threads: int = setting("threads for one instance's computation", 1, minimum=1, maximum=1024)
    spin_us: int = setting(
        "microseconds to poll before sleeping; only worth it with a core per instance",
        0,
        minimum=0,
        maximum=50,
    )


TlsPaths = tuple[str, str, str]
"""Certificate, key and CA."""


def _tls(cert: Path | None, key: Path | None, ca: Path | None) -> TlsPaths | None:
    if cert is None or key is None or ca is None:
        return None
    return str(cert), str(key), str(ca)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def shipped_model(name: str) -> Path | None:
    """The directory of a model that ships inside the package, if there is one of that name."""
    directory = Path(__file__).parent / "data" / name
    return directory if (directory / "config.json").is_file() else None


def resolve_model(model: Path) -> Path:
    """The checkpoint directory that `model` means.

    Raises:
        ConfigError: neither a directory with a config.json nor the name of a shipped model, or
            not for this process's user to read.
    """
    try:
        if (model / "config.json").is_file():
            return model.absolute()
    except PermissionError as error:
        raise ConfigError(
            f"The model directory {str(model)!r} cannot be read: {error.strerror}. It and all "
            "above it must be open to the user that this process runs as; that of systemd units "
            "has no access to /home and /root at all. Correct the permissions, or move the model"
        ) from error
    if len(model.parts) == 1 and (shipped := shipped_model(model.name)) is not None:
        return shipped
    found = "has no config.json" if model.is_dir() else "does not exist"
    raise ConfigError(
        f"The model directory {str(model)!r} {found}. A checkpoint is a directory in Hugging "
        "Face layout. Give its path, or 'nano' for the model that ships"
    )


def build(kind: type[C], values: Mapping[str, Any], source: str) -> C:
    """Makes a `kind` of `values`, checking every key, type and range, and what goes together.

    Args:
        kind: one of the dataclasses of this module.
        values: settings by name.
        source: where the values come from, for messages: a file or "command line".

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, a value out of
            range, a missing setting, or two values that contradict each other.
    """
    config = build_part(kind, values, source)
    if isinstance(config, ServeConfig):
        _check_timeouts(config, source)
    if isinstance(config, ServeConfig | NodeConfig):
        _check_tls(config, source)
    return config


def _check_timeouts(config: ServeConfig, source: str) -> None:
    if config.step_timeout_ms < config.lease_ms:
        raise ConfigError(
            f"The setting 'step_timeout_ms' is {config.step_timeout_ms} and 'lease_ms' is "
            f"{config.lease_ms} ({source}). An instance that stands still is known by heartbeats, "
            "and a lease forgives their absence for lease_ms: a step that had less time than that "
            "would end instances that are only slow. Raise step_timeout_ms to at least lease_ms, "
            "or lower lease_ms"
        )


def _check_tls(config: ServeConfig | NodeConfig, source: str) -> None:
    given = [name for name in _TLS_SETTINGS if getattr(config, name) is not None]
    missing = [name for name in _TLS_SETTINGS if name not in given]
    if given and missing:
        raise ConfigError(
            f"The setting '{given[0]}' is set and '{missing[0]}' is not ({source}). A member of a "
            "cluster shows a certificate, and checks those of its peers. Set tls_cert, tls_key and "
            "tls_ca, or none of them"
        )


def describe(config: ServeConfig | NodeConfig) -> dict[str, str | int | float | bool | None]:
    """The settings as plain values, for JSON output."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(config).items()
    }
