"""The README's figures are those of the recorded measurements, and its links lead somewhere."""

import json
import re
from pathlib import Path

from step3rt.plan.decode_table import BEGIN, END, load_points, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_kernel_table_is_the_recorded_run() -> None:
    run = json.loads((ROOT / "docs/results/kernels-h200-2026-11-23.json").read_text())
    rows = {(row["kernel"], row["shape"]): row for row in run["rows"]}
    table = re.findall(r"^\| (\d+x\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    assert len(table) == 4
    for shape, fp8_us, bf16_us, cudnn_us in table:
        bf16 = rows["mfa_decode_bf16", shape]
        assert float(fp8_us) == rows["mfa_decode_fp8", shape]["us"]
        assert float(bf16_us) == bf16["us"]
        assert float(cudnn_us) == bf16["peers"]["sdpa_cudnn_contiguous"]


def test_every_other_kernel_row_is_of_the_recorded_run_too() -> None:
    run = json.loads((ROOT / "docs/results/kernels-h200-2026-11-23.json").read_text())
    rows = {(row["kernel"], row["shape"]): row for row in run["rows"]}
    table = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| ([\d.]+) \| ([\d.]*) ?\|$", README, re.M)
    assert len(table) == 11
    for kernel, shape, us, peer_us in table:
        row = rows[kernel, shape]
        assert float(us) == row["us"]
        assert bool(peer_us) == bool(row["peers"])
        assert not peer_us or float(peer_us) == min(row["peers"].values())


def test_decode_table_and_plot_are_those_of_the_recorded_runs() -> None:
    files = sorted((ROOT / "docs/results").glob("decode-*.json"))
    _, _, after = README.partition(BEGIN)
    found, mark, _ = after.partition(END)
    assert mark
    if not files:
        assert not found.strip()
        return
    assert table(load_points(files), ROOT) in found
    # By: step3rt plan plot docs/results --plot docs/plots/decode.svg --into README.md
    assert "](docs/plots/decode.svg)" in found
    assert (ROOT / "docs/plots/decode.svg").exists()


def test_links_to_files_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
