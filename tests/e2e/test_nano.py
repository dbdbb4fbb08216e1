"""The model that ships: the demo's command, twice."""

import re

import pytest

from step3rt import LLM, SamplingParams
from tests.e2e.commands import run

PROMPT = "It was a dark and stormy night, and"
TOKENS = 24


@pytest.mark.timeout(600)
def test_the_demo_prints_the_same_text_each_time_and_its_statistics() -> None:
    ended = run(
        "generate", "--model=nano", "--attention=2", "--ffn=2", "--fabric=shm", "--stats",
        f"--max-tokens={TOKENS}", "--temperature=0", PROMPT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    text, _, statistics = ended.stdout.partition("\n\nTTFT")
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + TOKENS
    assert re.search(r"^ +\d+\.\d ms$", statistics.splitlines()[0])
    assert re.search(r"^TPOT +p50 \d+\.\d ms, p99 \d+\.\d ms$", statistics, re.MULTILINE)
    assert re.search(rf"^throughput +\d+\.\d tokens/s \({TOKENS} tokens\)$", statistics, re.M)
    pairs = re.findall(r"^fabric +(attention-\d - ffn-\d): shm \(.+\)$", statistics, re.MULTILINE)
    assert sorted(pairs) == [f"attention-{a} - ffn-{f}" for a in (0, 1) for f in (0, 1)]

    with LLM("nano", use_progress=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS)
        [output, other] = llm.generate([PROMPT, "Once upon a time"], params)
    assert (PROMPT + output.outputs[0].text).strip() == text.strip()
    assert other.prompt == "Once upon a time"
    assert len(other.outputs[0].token_ids) == TOKENS
