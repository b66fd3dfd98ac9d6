"""Draws what a router that works and experts that do not look like: the figure of the README.

transformers 5.17 to 5.23 route NLLB-MoE correctly and run experts 0 and 1 only. The built-in
translation model is recorded as transformers runs it (``--fix none``); one layer is drawn twice,
as routed and as executed, with the translation quality before and after the correct dispatch as
measured by `analysis/zoo/evaluate.py`.

    python -m analysis.nllb_dispatch [TRACE] [-o docs/nllb-dispatch.png]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

import moeprof
from moeprof.trace.reader import Trace

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "analysis" / "results" / "zoo_mt.json"
OUTPUT = ROOT / "docs" / "nllb-dispatch.png"
NUM_STEPS = 64
NUM_PROMPTS = 24
DPI = 160


def record_unfixed(path: Path) -> None:
    """Records the translation model as transformers runs it."""
    command = [sys.executable, "-m", "moeprof", "record", "zoo:mt", "--fix", "none", "--no-profile",
               "--limit", str(NUM_PROMPTS), "--force", "-q", "-o", str(path)]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)


def shares(trace: Trace, site: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns [steps, experts] shares of a step's rows, as routed and as executed."""
    executed = trace.executed
    executed = executed[executed["site"] == site]
    steps = np.sort(executed["step"].unique())[:NUM_STEPS]
    executed = executed[executed["step"].isin(steps)]

    def grid(column: str) -> np.ndarray:
        table = executed.pivot_table(index="step", columns="expert", values=column)
        values = table.to_numpy(dtype=float)
        return values / np.maximum(values.sum(axis=1, keepdims=True), 1.0)

    return grid("num_routed_rows"), grid("num_executed_rows")


def quality() -> str:
    """Returns chrF2 on held-out help text per language, before and after the correct dispatch."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    before, after = data["help_without_dispatch_fix"], data["held_out"]["help"]
    parts = [
        f"{language[:3]} {before[language]['chrf2']:.1f} \u2192 {after[language]['chrf2']:.1f}"
        for language in sorted(before)
    ]
    return "chrF2 as shipped \u2192 with the correct dispatch: " + ", ".join(parts)


def draw(trace: Trace, path: Path) -> None:
    """Draws the figure of the last decoder site of ``trace`` into ``path``."""
    site = trace.info.sites_of("decoder")[-1]
    routed, executed = shares(trace, site.site)
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.9), sharey=True, layout="constrained")
    titles = (
        f"routed: {np.count_nonzero(routed.sum(axis=0))} of {site.num_experts} experts chosen",
        f"executed: {np.count_nonzero(executed.sum(axis=0))} of {site.num_experts} experts ran",
    )
    image = None
    for axis, grid, title in zip(axes, (routed, executed), titles, strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="magma", vmin=0.0, vmax=0.3)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, site.num_experts, 3))
    axes[0].set_ylabel("forward pass of the decoder")
    assert image is not None
    bar = figure.colorbar(image, ax=axes, fraction=0.04)
    bar.set_label("share of the layer's rows (0.3 and above)")
    figure.suptitle(
        f"NLLB-MoE in transformers {trace.info.versions.get('transformers', '')}, decoder layer "
        f"{site.layer}\n{quality()}",
        fontsize=11.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Records if no trace is given, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("trace", nargs="?", help="a trace of zoo:mt recorded with --fix none")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.trace or Path(folder) / "unfixed.moeprof")
        if options.trace is None:
            record_unfixed(path)
        trace = moeprof.open(path)
        counts: pd.Series[float] = trace.executed.groupby("expert")["num_executed_rows"].sum()
        print(f"experts that ran: {np.flatnonzero(counts.to_numpy()).tolist()}")
        draw(trace, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
