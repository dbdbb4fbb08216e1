"""The measurement of the device pipeline's host side runs the instance's own loop."""

from step3rt.bench import host_step


def test_every_step_reports_every_sequence() -> None:
    report = host_step.measure(num_sequences=5, num_steps=70)
    assert report["sequences"] == 5
    assert 0 < report["p50_us"] <= report["p90_us"]


def test_a_prompt_may_join_every_step() -> None:
    report = host_step.measure(num_sequences=5, num_steps=10, chunk_tokens=300)
    assert report["chunk"] == 300
    assert 0 < report["p50_us"] <= report["p90_us"]
