"""Where the Step-3 paper (arXiv 2507.19427v1) disagrees with itself or with a model's shape.

Owns the list; each entry's numbers are recomputed in `tests/unit/test_plan_paper.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One of them.

    Attributes:
        where: section or table.
        text: what it says, and what follows from its own numbers.
        models: models whose cost it concerns; empty if none's.
    """

    where: str
    text: str
    models: tuple[str, ...] = ()


DISAGREEMENTS = (
    Disagreement(
        "tables 2, 3",
        "MLA's attention FLOPs count 576 columns for the values as for the keys; the values have "
        "512. The tables (and this planner, to match them) are 5.9 % above the exact FLOPs, and "
        "the intensity of 512 would be 484.",
        ("deepseek-v3", "kimi-k2"),
    ),
    Disagreement(
        "tables 2, 3",
        "Lightning attention's states count 10 FLOPs an element, and are read and written; the "
        "paper states neither. Both follow from its numbers.",
        ("minimax-m1",),
    ),
    Disagreement(
        "section 5.2",
        "It speaks of 8 layers of full attention in MiniMax M1; section 4.3, table 2 and the "
        "model's configuration have 10.",
        ("minimax-m1",),
    ),
    Disagreement(
        "section 1",
        "Qwen3 MoE on H20 is said to be 10 % cheaper than DeepSeek-V3 on H800. Table 6 has it 10 % "
        "dearer at 8K (0.075 against 0.068) and 2 % cheaper at 32K (0.206 against 0.211). With AFD "
        "(H20 and H800) it is 9 % cheaper at 8K.",
        ("qwen3-235b-a22b", "deepseek-v3"),
    ),
    Disagreement(
        "section 1",
        "Step-3 is said to cost about 40 % less than both. Table 6 gives 19 % and 11 % at 8K, and "
        "39 % and 33 % at 32K.",
        ("step3",),
    ),
    Disagreement(
        "section 5.3",
        "The sparsity of 8 in 256 experts plus a shared one is 9/256 there and 9/257 by section "
        "5.4's formula, which the planner follows.",
        ("deepseek-v3",),
    ),
    Disagreement(
        "table 8",
        "4A2F at 8K is 2643 tokens/s/GPU in the table and 2693 in the text, which derives it from "
        "2A2F by the number of GPUs.",
        ("step3",),
    ),
    Disagreement(
        "section 7.3",
        "The network is said to sustain 3,072 tokens of a micro-batch for each FFN instance. "
        "Section 5.4's formula gives 5,062. An attention instance that sends 1,024 tokens to each "
        "of 4 FFN instances needs 275 us of 272 at 40 GB/s a NIC, which may be what was meant.",
    ),
)
