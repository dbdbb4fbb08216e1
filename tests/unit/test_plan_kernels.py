"""Efficiencies follow from measured kernels."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step3rt.cli import main
from step3rt.errors import ConfigError
from step3rt.plan.hardware import load_hardware
from step3rt.plan.kernel_profile import profile_from_kernels
from step3rt.plan.profile import load_profile

H200 = load_hardware()["h200"]
RESULTS = Path(__file__).parents[2] / "docs" / "results"
BASE = load_profile("paper-h800")


def kernel_file(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    values = [{"kernel": kernel, "shape": shape, "us": us} for kernel, shape, us in rows]
    path.write_text(json.dumps({"machine": "one NVIDIA H200", "rows": values}))
    return path


def test_public_kernels_give_the_shipped_h200_profile(tmp_path: Path) -> None:
    """DeepGEMM (masked) and FlashAttention 3 (paged) on one H200, as profiles.toml cites."""
    rows = [
        ("mfa_decode_bf16", "128x4096", 134.0),
        ("mfa_decode_bf16", "256x4096", 263.2),
        ("mfa_decode_bf16", "256x8192 varlen", 504.8),
        ("mfa_decode_fp8", "128x4096", 82.3),
        ("mfa_decode_fp8", "256x4096", 174.5),
        ("mfa_decode_fp8", "256x8192", 332.0),
        ("moe_fp8", "E3xT256", 98),
        ("moe_fp8", "E3xT768", 211),
        ("moe_fp8", "E3xT2048", 456),
        ("moe_fp8", "E6xT256", 174),
        ("moe_fp8", "E6xT768", 259),
        ("moe_fp8", "E6xT2048", 481),
        ("moe_fp8", "E16xT256", 451),
        ("moe_fp8", "E16xT768", 461),
        ("moe_fp8", "E16xT2048", 651),
    ]
    found = profile_from_kernels(kernel_file(tmp_path / "k.json", rows), H200, BASE)
    shipped = load_profile("peers-h200")
    for name in ("attention_bytes_bf16", "attention_bytes_fp8", "moe_bytes", "moe_flops"):
        assert getattr(found, name) == pytest.approx(getattr(shipped, name), rel=0.07), name


def test_every_efficiency_is_recovered_from_rows_that_have_it(tmp_path: Path) -> None:
    truth = replace(BASE, attention_bytes_fp8=0.9, linear_bytes=0.6, linear_flops=0.5)
    truth = replace(truth, moe_bytes=0.7, moe_flops=0.4, attention_fixed_us=12.0)

    def product_us(params: float, flops: float, share: float, flops_share: float) -> float:
        sides = (params / (H200.bytes_per_s * share), flops / (H200.peak_flops * flops_share))
        return 1e6 * float(np.hypot(*sides))

    expert, o_proj = 3 * 7168 * 5120, 16384 * 7168
    layer = 7168 * 2560 + 2048 * 16384 + o_proj + 48 * 7168
    core_us = 1e6 * 128 * 4096 * 512 / (0.9 * H200.bytes_per_s)
    rows = [("mfa_decode_fp8", "128x4096", core_us)]
    rows += [
        ("moe_fp8", f"E{e}xT{t}", product_us(e * expert, 2 * t * expert, 0.7, 0.4))
        for e, t in ((3, 256), (6, 768), (16, 2048))
    ]
    rows += [
        ("proj_fp8", f"o_proj M{m}", product_us(o_proj, 2 * m * o_proj, 0.6, 0.5))
        for m in (128, 256, 512)
    ]
    whole_us = core_us + product_us(layer, 2 * 128 * layer, 0.6, 0.5) + 12.0
    rows.append(("attention_layer_fp8", "128x4096", whole_us))
    found = profile_from_kernels(kernel_file(tmp_path / "k.json", rows), H200, BASE)
    for name, value in asdict(truth).items():
        if name != "source":
            assert getattr(found, name) == pytest.approx(value, rel=0.01), name


def test_rows_that_are_not_understood_change_nothing(tmp_path: Path) -> None:
    rows: list[tuple[str, str, Any]] = [
        ("mfa_decode_fp8", "128x4096", 82.3),
        ("moe_fp8", "3 experts", 98.0),
        ("proj_fp8", "gate M128", 10.0),
        ("moe_fp8", "E3xT256", "fast"),
        ("mystery", "1x1", 1.0),
    ]
    found = profile_from_kernels(kernel_file(tmp_path / "k.json", rows), H200, BASE)
    changed = {name for name, value in asdict(found).items() if value != asdict(BASE)[name]}
    assert changed == {"source", "attention_bytes_fp8"}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"rows": []}',
        '{"rows": [1, {"us": 1}]}',
        "[]",
        '{"rows": [{"kernel": "moe_fp8", "shape": "E0xT0", "us": 1}]}',
        '{"rows": [{"kernel": "mfa_decode_fp8", "shape": "0x4096", "us": 1}]}',
        f'{{"rows": [{{"kernel": "mfa_decode_fp8", "shape": "{"9" * 5000}x1", "us": 1}}]}}',
        f'{{"rows": [{{"kernel": "mfa_decode_fp8", "shape": "1x1", "us": 1{"0" * 400}}}]}}',
    ],
)
def test_files_without_kernels_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bench kernels"):
        profile_from_kernels(path, H200, BASE)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("kernels-h200-*.json")), ids=str)
def test_the_results_of_this_project_give_a_profile(path: Path) -> None:
    found = asdict(profile_from_kernels(path, H200, BASE))
    changed = {name for name in found if found[name] != asdict(BASE)[name]} - {"source"}
    assert changed
    for name in changed & {"attention_bytes_bf16", "attention_bytes_fp8"}:
        # A read-only stream reaches 4.53 of 4.8 TB/s; more would be a mistake in bytes.
        assert 0.5 < found[name] < 4.53 / 4.8


def test_the_command_saves_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kernel_file(tmp_path / "k.json", [("mfa_decode_fp8", "128x4096", 62.0)])
    saved = tmp_path / "mine.toml"
    command = ["plan", "kernels", str(result), "--hardware", "h200", "--save", str(saved)]
    assert main(command) == 0
    assert "attention_bytes_fp8" in capsys.readouterr().out
    assert load_profile(str(saved)).attention_bytes_fp8 == pytest.approx(0.902, abs=0.001)
