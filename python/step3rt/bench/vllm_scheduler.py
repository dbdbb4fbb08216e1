"""Times vLLM's scheduler, in whatever interpreter has vLLM; it needs no GPU and no model.

It is run as a program and imports nothing of step3rt, which that interpreter need not have: the
load comes as JSON on standard input, the times in microseconds go to standard output.
"""

import gc
import json
import os
import sys
import time
from importlib import import_module, metadata
from itertools import count
from types import SimpleNamespace
from typing import Any

_SAMPLED_TOKEN = 1


def main() -> None:
    """Reads the load, prints `{"version", "times_us"}`."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    load = json.load(sys.stdin)
    times_us = _run(**load)
    report = {"version": metadata.version("vllm"), "times_us": times_us}
    print(json.dumps(report))  # noqa: T201 - a program's output


def _run(
    lives: list[int], num_sequences: int, num_prompt_tokens: int, num_warmup: int, num_steps: int
) -> list[float]:
    """Microseconds per step of `num_sequences` sequences, of which those that end are replaced.

    Measured is the thread's CPU time in `add_request`, `schedule` and `update_from_output`, and not
    what runs in between.
    """
    max_tokens = num_sequences + num_prompt_tokens * (8 + num_sequences // 16)
    scheduler, block_hasher = _scheduler(num_sequences, max_tokens, block_size_tokens=64)
    output_of = import_module("vllm.v1.outputs").ModelRunnerOutput
    request_of = import_module("vllm.v1.request").Request
    parameters = import_module("vllm.sampling_params").SamplingParams
    numbers = count()

    def new_request() -> Any:
        number = next(numbers)
        sampling = parameters(
            max_tokens=lives[number % len(lives)], ignore_eos=True, temperature=0.0
        )
        prompt = [number] * num_prompt_tokens
        return request_of(str(number), prompt, sampling, None, block_hasher=block_hasher)

    for _ in range(num_sequences):
        scheduler.add_request(new_request())
    times_us = []
    num_ended = 0
    for step in range(num_warmup + num_steps):
        if step == num_warmup:
            gc.freeze()  # as its engine does, or collections would walk all that is loaded
        joining = [new_request() for _ in range(num_ended)]
        started = time.thread_time()
        for request in joining:
            scheduler.add_request(request)
        plan = scheduler.schedule()
        planned = time.thread_time()
        ids = list(plan.num_scheduled_tokens)
        answer = output_of(
            req_ids=ids,
            req_id_to_index={request: index for index, request in enumerate(ids)},
            sampled_token_ids=[_sampled(scheduler.requests[request]) for request in ids],
        )
        answered = time.thread_time()
        outputs = scheduler.update_from_output(plan, answer)
        times_us.append((time.thread_time() - answered + planned - started) * 1e6)
        entries = (entry for client in outputs.values() for entry in client.outputs)
        num_ended = sum(entry.finish_reason is not None for entry in entries)
        if len(scheduler.requests) != num_sequences - num_ended:
            raise RuntimeError(f"{len(scheduler.requests)} requests live after {num_ended} ended")
    return times_us[num_warmup:]


def _sampled(request: Any) -> list[int]:
    return [_SAMPLED_TOKEN] if request.num_computed_tokens >= request.num_tokens else []


def _scheduler(num_sequences: int, max_tokens: int, block_size_tokens: int) -> tuple[Any, Any]:
    """Its scheduler with its own configuration, and the function that hashes blocks of requests.

    The model is stood in for: the scheduler asks it for its length and for what it is not.
    """
    config = import_module("vllm.config")
    kv_cache = import_module("vllm.v1.kv_cache_interface")
    num_blocks = 5 * num_sequences
    max_model_len = 65_536
    cache_config = config.CacheConfig(block_size=block_size_tokens, enable_prefix_caching=True)
    whole = config.VllmConfig(
        scheduler_config=config.SchedulerConfig(
            max_num_seqs=num_sequences + num_sequences // 8,
            max_num_batched_tokens=max_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        cache_config=cache_config,
        device_config=config.DeviceConfig(device="cpu"),
    )
    cache_config.num_gpu_blocks = num_blocks
    whole.model_config = SimpleNamespace(
        enable_return_routed_experts=False,
        is_diffusion=False,
        is_encoder_decoder=False,
        is_multimodal_model=False,
        max_model_len=max_model_len,
        multimodal_config=None,
        return_sampling_mask=False,
        runner_type="generate",
        skip_tokenizer_init=True,
        supports_multimodal_inputs=False,
        uses_mrope=False,
    )
    attention = kv_cache.FullAttentionSpec(
        block_size=block_size_tokens, num_kv_heads=1, head_size=1, dtype=import_module("torch").half
    )
    blocks = kv_cache.KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[kv_cache.KVCacheGroupSpec(["attention"], attention)],
    )
    utils = import_module("vllm.v1.core.kv_cache_utils")
    hash_of = import_module("vllm.utils.hashing").get_hash_fn_by_name(
        cache_config.prefix_caching_hash_algo
    )
    utils.init_none_hash(hash_of)
    structured_output = import_module("vllm.v1.structured_output")
    scheduler = import_module("vllm.v1.core.sched.scheduler").Scheduler(
        vllm_config=whole,
        kv_cache_config=blocks,
        structured_output_manager=structured_output.StructuredOutputManager(whole),
        block_size=block_size_tokens,
    )
    return scheduler, utils.get_request_block_hasher(block_size_tokens, hash_of)


if __name__ == "__main__":
    main()
