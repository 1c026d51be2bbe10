"""Draw the README's picture of the pruning tree: one query, the rounds of the search, the scores below.

`python notebooks/draw_tree.py` writes notebooks/tree.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "extras"))

from measuring import ScoreTable  # noqa: E402


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hip"  # the same file every time
    from matplotlib import pyplot as plt

    scores = torch.randn(64, generator=torch.Generator().manual_seed(11)).cumsum(0)
    table = ScoreTable(scores[None])
    found = table.search(4)[0].tolist()
    rounds = [blocks[0].tolist() for blocks in table.asked]

    figure, (tree, curve) = plt.subplots(
        2, 1, figsize=(8, 4), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    for r, speakers in enumerate(rounds):
        tree.scatter(speakers, [-r] * len(speakers), s=26, c="white", edgecolors="black", zorder=2)
        if r:  # a branch's representative hangs below the nearest one of the round before
            for x in speakers:
                above = min(rounds[r - 1], key=lambda y: (abs(x - y), -y))  # of pairs the right one spoke
                tree.plot([above, x], [1 - r, -r], c="0.6", lw=0.8, zorder=1)
    for axis in (tree, curve):
        for x in found:
            axis.axvspan(x - 0.5, x + 0.5, color="0.85", zorder=0)
    tree.set_yticks([-r for r in range(len(rounds))], [f"round {r + 1}" for r in range(len(rounds))])
    curve.plot(scores, c="black", lw=1)
    curve.set(xlabel="key block", ylabel="score")
    figure.suptitle("Blocks that each round scores (circles), and the four that are kept (grey)", fontsize=10)
    figure.savefig(HERE / "tree.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
