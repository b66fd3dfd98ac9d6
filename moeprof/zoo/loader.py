"""Load a built-in model, a local folder or a hub id, ready to record.

Leaves out batching (`batching`) and everything about MoE layers except the known repair of
NLLB-MoE (`dispatch`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprof.errors import MissingExtraError, MoeprofError, UsageError
from moeprof.zoo.catalog import BUILTINS, PREFIX, builtin
from moeprof.zoo.prompts import Prompt, read_prompts

TASKS = ("lm", "mt")
FIXES = ("nllb-dispatch",)
DTYPES = ("float32", "float16", "bfloat16")
HUB_TIMEOUT_S = 5

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with all that a recording needs to know about it.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        task: ``lm`` or ``mt``.
        name: What the user called it.
        prompts: Held-out prompts that ship with it; empty for models that are not built in.
        architecture: Class name, as in the model's configuration.
        fixes: Repairs applied to the library's code for this model.
        weight_hash: SHA-256 of the weights on disk, or the revision on the hub.
    """

    model: Any
    tokenizer: Any
    task: str
    name: str
    prompts: list[Prompt]
    architecture: str
    fixes: tuple[str, ...]
    weight_hash: str


def load(
    name: str,
    *,
    task: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    fixes: Sequence[str] = ("auto",),
) -> LoadedModel:
    """Loads a model for evaluation.

    Only safetensors weights are read and no code that comes with a model is run.

    Args:
        name: ``zoo:lm``, ``zoo:mt``, a folder in the format of transformers, or a hub id.
        task: ``lm`` or ``mt``; guessed from the configuration when None.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``float16`` or ``bfloat16``; when None, float32 on the CPU and the
            type of the stored weights elsewhere.
        fixes: ``nllb-dispatch`` corrects the experts that NLLB-MoE executes (see
            `moeprof.zoo.dispatch`). ``auto`` does so for built-in models where the installed
            transformers needs it; an empty sequence repairs nothing.

    Raises:
        MoeprofError: The model cannot be had; the message says why.
        UsageError: An argument makes no sense.
    """
    _check_arguments(task, dtype, fixes)
    known = builtin(name) if name.startswith(PREFIX) else None
    source = str(known.folder) if known else _locate(name)
    torch, transformers = _import_libraries()
    target = _device(torch, device)
    origin = _Origin(name, source, offline=Path(source).is_dir() or not _hub_answers(name))
    with _quiet(transformers):
        config = _read_config(transformers, origin)
        found_task = "mt" if getattr(config, "is_encoder_decoder", False) else "lm"
        if task is not None and task != found_task:
            raise UsageError(
                f"{name} is {_kind(found_task)}, not {_kind(task)}",
                hint=f"leave out the task or say {found_task}",
            )
        wanted = getattr(torch, dtype) if dtype else None
        if wanted is None:
            wanted = torch.float32 if target.type == "cpu" else "auto"
        model = _read_weights(transformers, origin, config, wanted).to(target)
        tokenizer = _read_tokenizer(transformers, origin)
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        task=found_task,
        name=name,
        prompts=read_prompts(known.prompts_path) if known else [],
        architecture=(config.architectures or [type(model).__name__])[0],
        fixes=_apply_fixes(model, name, fixes),
        weight_hash=_weight_hash(source, config),
    )


@dataclass(frozen=True)
class _Origin:
    """Where the files of a model come from.

    Attributes:
        name: What the user called it.
        source: Folder or hub id.
        offline: True when nothing may be fetched.
    """

    name: str
    source: str
    offline: bool

    def options(self) -> dict[str, Any]:
        """Returns what every ``from_pretrained`` gets."""
        return {"trust_remote_code": False, "local_files_only": self.offline}

    def explain(self, error: Exception, part: str) -> MoeprofError:
        """Returns a one-line error for whatever transformers said."""
        reason = str(error).strip().split("\n", maxsplit=1)[0][:200]
        if "trust_remote_code" in str(error):
            return MoeprofError(
                f"{self.name} brings its own code, which is not run",
                hint="give a model whose architecture is part of transformers",
            )
        if Path(self.source).is_dir():
            return MoeprofError(
                f"cannot load the {part} of {self.name}: {reason}",
                hint="the folder must be what save_pretrained() wrote for a model and a tokenizer",
            )
        return MoeprofError(
            f"cannot fetch the {part} of {self.name!r} from the hub: {reason}",
            hint=f"check the id, or give a folder or one of {', '.join(BUILTINS)}",
        )


def _check_arguments(task: str | None, dtype: str | None, fixes: Sequence[str]) -> None:
    if task is not None and task not in TASKS:
        raise UsageError(f"there is no task {task!r}", hint=f"choose one of {', '.join(TASKS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", hint=f"choose one of {', '.join(DTYPES)}")
    for fix in fixes:
        if fix not in {"auto", *FIXES}:
            raise UsageError(f"there is no fix {fix!r}", hint=f"choose one of {', '.join(FIXES)}")


def _kind(task: str) -> str:
    return (
        "an encoder-decoder model (task mt)" if task == "mt" else "a decoder-only model (task lm)"
    )


def _locate(name: str) -> str:
    """Returns a folder or hub id that transformers can be asked for."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MoeprofError(
                f"the folder {name} holds no config.json, so it is no model of transformers",
                hint="give the folder that save_pretrained() wrote",
            )
        return str(path)
    if path.exists():
        raise MoeprofError(
            f"{name} is a file; a model is a folder or a hub id",
            hint="give the folder that holds config.json and the safetensors",
        )
    if not _HUB_ID.match(name):
        raise MoeprofError(
            f"there is no folder {name}",
            hint=f"give {', '.join(BUILTINS)}, a folder or a hub id such as owner/model",
        )
    return name


def _import_libraries() -> tuple[Any, Any]:
    # Both are read once, at import: an unreachable hub must not hold anybody up for minutes.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(HUB_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtraError("torch", extra="record", purpose="loading a model") from None
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("transformers", extra="record", purpose="loading a model") from None
    return torch, transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the terminal."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _device(torch: Any, device: str) -> Any:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}", hint="say cpu, cuda or auto") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise MoeprofError(
            f"torch sees no GPU, so nothing can run on {device}",
            hint="say --device cpu, or install a torch built for your GPU",
        )
    return target


def _hub_answers(name: str) -> bool:
    """Asks the hub once, for the hub's own client tries for half a minute.

    Raises:
        MoeprofError: The hub does not answer and nothing of the model is in the local cache.
    """
    import httpx
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    reason = "offline mode is on"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except (httpx.HTTPError, OSError) as error:
            reason = str(error)
        else:
            return True
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return False
    raise MoeprofError(
        f"cannot reach the hub to fetch {name!r}: {reason}",
        hint=f"check the network, or give a folder or one of {', '.join(BUILTINS)}",
    )


def _read_config(transformers: Any, origin: _Origin) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(origin.source, **origin.options())
    except (OSError, ValueError, KeyError) as error:
        raise origin.explain(error, "configuration") from None


def _read_weights(transformers: Any, origin: _Origin, config: Any, dtype: Any) -> Any:
    auto = transformers.AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        auto = transformers.AutoModelForSeq2SeqLM
    options = {"attn_implementation": "eager"} if config.model_type == "nllb-moe" else {}
    try:
        return auto.from_pretrained(
            origin.source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            **origin.options(),
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise origin.explain(error, "weights") from None


def _read_tokenizer(transformers: Any, origin: _Origin) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(origin.source, **origin.options())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise origin.explain(error, "tokenizer") from None


def _apply_fixes(model: Any, name: str, fixes: Sequence[str]) -> tuple[str, ...]:
    from moeprof.zoo.dispatch import fix_nllb_dispatch, needs_nllb_dispatch_fix

    automatic = "auto" in fixes and name in BUILTINS and needs_nllb_dispatch_fix(model)
    if "nllb-dispatch" not in fixes and not automatic:
        return ()
    if fix_nllb_dispatch(model) == 0:
        raise MoeprofError(
            f"{name} has no NLLB-MoE layers, so the fix nllb-dispatch does not apply",
            hint="leave out the fix",
        )
    return ("nllb-dispatch",)


def _weight_hash(source: str, config: Any) -> str:
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if not files:
        return str(getattr(config, "_commit_hash", None) or "")
    digests = [_sha256(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
