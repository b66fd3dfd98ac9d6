"""The built-in models: what they are called and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moeprof.errors import MoeprofError

PREFIX = "zoo:"


@dataclass(frozen=True)
class BuiltinModel:
    """A trained model that ships with moeprof.

    Attributes:
        name: What the command line calls it.
        task: ``lm`` or ``mt``.
        folder: Weights, configuration, tokenizer, prompts and model card.
        summary: One line for lists.
    """

    name: str
    task: str
    folder: Path
    summary: str

    @property
    def prompts_path(self) -> Path:
        """The held-out prompts that ship with the model."""
        return self.folder / "prompts.jsonl"


_HERE = Path(__file__).resolve().parent

BUILTINS: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        "zoo:lm": BuiltinModel(
            name="zoo:lm",
            task="lm",
            folder=_HERE / "lm",
            summary="Qwen3-MoE, 5 MoE layers of 32 experts, top-4, six domains of English",
        ),
        "zoo:mt": BuiltinModel(
            name="zoo:mt",
            task="mt",
            folder=_HERE / "mt",
            summary="NLLB-MoE, 2 + 2 MoE layers of 16 experts, top-2, English to de, fr, es",
        ),
    }
)


def builtin(name: str) -> BuiltinModel:
    """Returns the built-in model called ``name``.

    Raises:
        MoeprofError: No built-in model has that name.
    """
    try:
        return BUILTINS[name]
    except KeyError:
        raise MoeprofError(
            f"there is no built-in model {name!r}", hint=f"choose one of {', '.join(BUILTINS)}"
        ) from None
