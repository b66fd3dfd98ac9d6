"""What both training scripts share: pace by the clock, learning rate, options, balance of loads."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

LOOKS = 12  # times a run is looked at and saved before its end


@dataclass
class Pace:
    """How far a run is, by time or by steps, whichever is further.

    Attributes:
        limit_s: Seconds the run may take.
        max_steps: Steps the run may take.
        start: When it started.
        step: Steps taken.
    """

    limit_s: float
    max_steps: int
    start: float = field(default_factory=time.perf_counter)
    step: int = 0
    looked: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def progress(self) -> float:
        """Share of the run that is over; 1 or more at its end."""
        return max(self.seconds / self.limit_s, self.step / self.max_steps)

    def rate(self, peak: float, warmup: int) -> float:
        """Return the learning rate: linear warm-up, then a cosine down to a hundredth."""
        decayed = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        return peak * min(1.0, (self.step + 1) / warmup) * decayed

    def look_due(self) -> bool:
        """Tell, a dozen times a run, that it is time for a look."""
        due = time.perf_counter() - self.looked > max(self.limit_s / LOOKS, 5)
        if due:
            self.looked = time.perf_counter()
        return due


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both scripts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=Path(".zoo-pack"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--max-seconds", type=float, default=520.0, help="training time, set-up apart"
    )
    parser.add_argument("--deadline-s", type=float, help="stop this long after the start, at most")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", type=json.loads, default={}, help="overrides, for a tiny test")
    parser.add_argument("--every", type=int, default=None, help="keep every n-th row only")
    parser.add_argument("--bf16", action="store_true", help="autocast without a GPU too")
    return parser


def paced(args: argparse.Namespace, began: float) -> Pace:
    """Start the clock of a run whose set-up began at `began`."""
    limit_s = args.max_seconds
    if args.deadline_s is not None:
        limit_s = min(limit_s, args.deadline_s - (time.perf_counter() - began))
    return Pace(limit_s=limit_s, max_steps=args.max_steps)


def adamw(
    tensors: dict[str, torch.Tensor], decayed: set[str], lr: float, decay: float, **settings: object
) -> torch.optim.AdamW:
    """Return a fused AdamW that decays the named tensors only."""
    groups = [
        {"params": [t for n, t in tensors.items() if n in decayed], "weight_decay": decay},
        {"params": [t for n, t in tensors.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True, **settings)  # type: ignore[arg-type]


def update(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], lr: float) -> None:
    """Clip the gradients, take one step, drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def balance(usage: torch.Tensor) -> str:
    """Describe how unequally the worst layer uses its experts (rows: layers)."""
    rare = (usage < 0.1 * usage.mean(1, keepdim=True)).float().mean(1).max()
    most = (usage.amax(1) / usage.mean(1)).max()
    return f"rare {float(rare):.2f} max/mean {float(most):.2f}"


def summary(args: argparse.Namespace, pace: Pace, device: torch.device, **figures: object) -> str:
    """Return what a run did as JSON."""
    facts = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "steps": pace.step,
        "seconds": round(pace.seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    return json.dumps(facts | figures, indent=1) + "\n"


def values(figures: dict[str, float]) -> str:
    """Return named figures on one line."""
    return " ".join(f"{name} {value:.3f}" for name, value in figures.items())
