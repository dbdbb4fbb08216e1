"""step3rt: an inference runtime for Step-3 with Attention-FFN Disaggregation.

Importing this package loads neither torch, CuPy nor gRPC; the names below load what they need
when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step3rt.aio import AsyncClient
    from step3rt.client import Client
    from step3rt.errors import Step3Error
    from step3rt.llm import LLM
    from step3rt.local_cluster import LocalCluster
    from step3rt.results import (
        CompletionOutput,
        GenerationEvent,
        RequestOutput,
        TokenLogprob,
        Usage,
    )
    from step3rt.sampling import SamplingParams

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "CompletionOutput",
    "GenerationEvent",
    "LocalCluster",
    "RequestOutput",
    "SamplingParams",
    "Step3Error",
    "TokenLogprob",
    "Usage",
    "__version__",
]

_HOME = {
    "AsyncClient": "step3rt.aio",
    "Client": "step3rt.client",
    "CompletionOutput": "step3rt.results",
    "GenerationEvent": "step3rt.results",
    "LLM": "step3rt.llm",
    "LocalCluster": "step3rt.local_cluster",
    "RequestOutput": "step3rt.results",
    "SamplingParams": "step3rt.sampling",
    "Step3Error": "step3rt.errors",
    "TokenLogprob": "step3rt.results",
    "Usage": "step3rt.results",
    "__version__": "step3rt._core",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'step3rt' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
