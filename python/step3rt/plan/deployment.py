"""One way to place a model on cards, and whether it fits their memory.

Owns the vocabulary of placements and the memory bound; never how fast it runs (`stages`).
"""

from dataclasses import dataclass
from typing import Literal

from step3rt.errors import InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.cost import Precision, layer_kv_bytes
from step3rt.plan.hardware import Hardware

Placement = Literal["disaggregated", "colocated"]
FfnParallelism = Literal["ep", "tp_ep"]

# Left to the driver, kernels' workspaces, slots and fragmentation, of every card.
_RESERVED_BYTES = 4e9
_USABLE_SHARE = 0.95
_LM_HEAD_BYTES_PER_WEIGHT = 2  # the published FP8 checkpoint keeps embedding and LM head in BF16
MAX_LANES = 8  # as `step3rt serve` has it
MAX_GPUS = 65_536
MAX_CONTEXT_TOKENS = 1_000_000_000
MAX_BATCH = 10_000_000  # each sequence of a workload has a length in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A deployment unit: what serves one copy of the model.

    Attributes:
        placement: "disaggregated" has attention and FFN on different GPUs; "colocated" has both
            on every GPU (data-parallel attention, expert-parallel FFN).
        attention_card: card of the attention GPUs, or of all GPUs if colocated.
        ffn_card: card of the FFN GPUs.
        num_attention_gpus: attention GPUs, or all GPUs if colocated.
        num_ffn_gpus: FFN GPUs; 0 if colocated.
        lanes: micro-batches in flight.
        ffn_parallelism: "ep" spreads experts over all FFN GPUs and sends tokens to owners only;
            "tp_ep" splits every expert over the GPUs of a host, and experts over hosts, and
            sends every token to every host (the paper's deployment). Colocated, experts are
            always spread; "tp_ep" splits dense FFNs over all GPUs, "ep" copies them to each.
    """

    placement: Placement
    attention_card: Hardware
    ffn_card: Hardware
    num_attention_gpus: int
    num_ffn_gpus: int
    lanes: int
    ffn_parallelism: FfnParallelism = "ep"

    def __post_init__(self) -> None:
        """Checks the counts.

        Raises:
            InvalidArgument: a count is impossible.
        """
        low = 0 if self.placement == "colocated" else 1
        if not (
            1 <= self.num_attention_gpus <= MAX_GPUS and low <= self.num_ffn_gpus <= MAX_GPUS
        ) or (self.placement == "colocated" and self.num_ffn_gpus):
            raise InvalidArgument(
                f"The deployment has {self.num_attention_gpus} attention and {self.num_ffn_gpus} "
                f"FFN GPUs ({self.placement}). Disaggregated ones have from 1 to {MAX_GPUS} of "
                "each, colocated ones no FFN GPUs of their own. Correct the counts"
            )
        if not 1 <= self.lanes <= MAX_LANES:
            raise InvalidArgument(
                f"The deployment has {self.lanes} lanes. `step3rt serve` takes 1 to {MAX_LANES}. "
                "Correct the number"
            )

    @property
    def is_colocated(self) -> bool:
        """Whether attention and FFN share the GPUs."""
        return self.placement == "colocated"

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        return self.num_attention_gpus + self.num_ffn_gpus

    @property
    def usd_per_hour(self) -> float:
        """Price of all GPUs."""
        return (
            self.num_attention_gpus * self.attention_card.usd_per_hour
            + self.num_ffn_gpus * self.ffn_card.usd_per_hour
        )

    @property
    def is_one_host(self) -> bool:
        """Whether all GPUs are of one host, so that transfers take NVLink."""
        per_host = min(self.attention_card.gpus_per_host, self.ffn_card.gpus_per_host)
        is_uniform = self.is_colocated or self.attention_card.key == self.ffn_card.key
        return is_uniform and self.num_gpus <= per_host

    @property
    def num_ffn_hosts(self) -> int:
        """Hosts of the FFN side."""
        gpus = self.num_attention_gpus if self.is_colocated else self.num_ffn_gpus
        return -(-gpus // self.ffn_card.gpus_per_host)

    @property
    def label(self) -> str:
        """Short name, e.g. "16A+16F h800 tp_ep x3"."""
        if self.is_colocated:
            split = " split" if self.ffn_parallelism == "tp_ep" else ""
            name = f"{self.num_attention_gpus} colocated {self.attention_card.key}"
            return f"{name}{split} x{self.lanes}"
        cards = self.attention_card.key
        if self.ffn_card.key != cards:
            cards += f"/{self.ffn_card.key}"
        counts = f"{self.num_attention_gpus}A+{self.num_ffn_gpus}F"
        return f"{counts} {cards} {self.ffn_parallelism} x{self.lanes}"


def _usable_bytes(card: Hardware) -> float:
    return _USABLE_SHARE * card.memory_bytes - _RESERVED_BYTES


def expert_places(deployment: Deployment) -> tuple[int, float]:
    """(places, GPUs of a place) of the experts; a place is what shares its rows evenly.

    With EP a place is a GPU; with TP in a host it is the host.
    """
    if deployment.is_colocated:
        return deployment.num_attention_gpus, 1.0
    if deployment.ffn_parallelism == "ep":
        return deployment.num_ffn_gpus, 1.0
    places = deployment.num_ffn_hosts
    return places, deployment.num_ffn_gpus / places


def most_experts(num_experts: int, places: int) -> int:
    """Experts of the fullest place: each is in one place, whole, so 48 in 5 are 10, not 9.6."""
    return -(-num_experts // places)


def ffn_weight_bytes_per_gpu(model: Model, deployment: Deployment) -> float:
    """FFN weights that the fullest FFN GPU holds, one byte each."""
    places, gpus_of_place = expert_places(deployment)
    gpus = deployment.num_ffn_gpus or deployment.num_attention_gpus
    # Beside whole experts, instances have whole dense layers.
    is_copied = deployment.ffn_parallelism == "ep" and (
        deployment.is_colocated or model.sparsity is not None
    )
    total = 0.0
    for group in model.groups:
        ffn = group.ffn
        if not ffn.num_experts:
            total += group.count * ffn.dense_params / (1 if is_copied else gpus)
            continue
        routed = most_experts(ffn.num_experts, places) * ffn.expert_params
        total += group.count * (routed + ffn.dense_params) / gpus_of_place
    return total


def kv_bytes_per_sequence(model: Model, context_tokens: float, precision: Precision) -> float:
    """KV and state that one sequence occupies in all layers."""
    return sum(
        group.count
        * (
            layer_kv_bytes(group.attention, context_tokens, precision)
            # A state is moved twice a step and stored once.
            - group.attention.state_elements * precision.state_bytes
        )
        for group in model.groups
    )


def max_batch_by_memory(
    model: Model, deployment: Deployment, context_tokens: float, precision: Precision
) -> float:
    """Sequences of `context_tokens` that fit into all GPUs together; 0 if weights do not fit.

    No more than a workload takes, however small the model.
    """
    tables = 1 if model.is_tied else 2
    weights = (
        float(model.attention_params) + tables * model.embedding_params * _LM_HEAD_BYTES_PER_WEIGHT
    )
    ffn_weights = ffn_weight_bytes_per_gpu(model, deployment)
    if deployment.is_colocated:
        weights += ffn_weights
    elif ffn_weights > _usable_bytes(deployment.ffn_card):
        return 0.0
    free_bytes = _usable_bytes(deployment.attention_card) - weights
    per_gpu = free_bytes / kv_bytes_per_sequence(model, context_tokens, precision)
    return min(max(0.0, per_gpu * deployment.num_attention_gpus), float(MAX_BATCH))
