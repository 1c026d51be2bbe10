"""Draw the README's picture of the pruning tree: one query, the rounds of the search, the scores below.

    python extras/draw_tree.py        writes extras/tree.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hip  # noqa: E402

BLOCKS = 64


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hip"  # the same file every time
    from matplotlib import pyplot as plt

    generator = torch.Generator().manual_seed(11)
    scores = torch.randn(BLOCKS, generator=generator).cumsum(0)
    cfg = hip.HiPConfig(top_k=4, block_k=1, stride_k=1, beam=1, sink=0, window=1)
    rounds = []

    def score(blocks: torch.Tensor) -> torch.Tensor:
        rounds.append(sorted(blocks[0].tolist()))
        return scores[blocks]

    found, _ = hip.search(score, 0, torch.tensor([BLOCKS]), cfg)
    figure, (tree, curve) = plt.subplots(
        2, 1, figsize=(8, 4), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    for r, speakers in enumerate(rounds):
        tree.scatter(speakers, [-r] * len(speakers), s=26, c="white", edgecolors="black", zorder=2)
        if r:  # a branch's representative hangs below the nearest one of the round before
            for x in speakers:
                above = min((abs(x - y), y) for y in rounds[r - 1])[1]
                tree.plot([above, x], [1 - r, -r], c="0.6", lw=0.8, zorder=1)
    for axis in (tree, curve):
        for x in sorted(found[0].tolist()):
            axis.axvspan(x - 0.5, x + 0.5, color="0.85", zorder=0)
    tree.set_yticks([-r for r in range(len(rounds))], [f"round {r + 1}" for r in range(len(rounds))])
    curve.plot(scores, c="black", lw=1)
    curve.set(xlabel="key block", ylabel="score")
    figure.suptitle("Blocks that each round scores (circles), and the four that are kept (grey)", fontsize=10)
    figure.savefig(Path(__file__).parent / "tree.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
