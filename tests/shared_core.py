"""A stand-in for a core that something else runs on too."""

from __future__ import annotations

import numpy as np


class SharedCore:
    """Stands in for `moeprof.live.core_binding.QuietCore`: one look of five finds it slow."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.num_given_up = 0

    def __enter__(self) -> SharedCore:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settle(self) -> None:
        pass

    def give_up(self) -> None:
        self.num_given_up += 1

    def is_quiet(self) -> bool:
        return bool(self.generator.random() >= 0.2)
