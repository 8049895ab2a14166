"""Loading the base model: any causal language model of Hugging Face, from a folder or from the hub, checked before use.

Weights come from safetensors only, since unpickling runs code. Whatever is chosen automatically (device, threads, padding
token) is written down with its reason in `LanguageModel.notes`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fedtune.config import RunConfig
from fedtune.embedded import embedded_path
from fedtune.errors import ModelError
from fedtune.foreign import for_screen
from fedtune.placement import loading_options, place
from fedtune.regular import ANY, LARGEST_TEXT, check_regular
from fedtune.source_names import expand

SMALL_MODEL = 20_000_000
"""Parameters below which a second thread costs more than it brings (forward passes of a few milliseconds)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LanguageModel:
    """A model ready to be tuned, in evaluation mode (no dropout), with its tokenizer.

    `notes` are one-line choices with their reasons; `source` is the folder or hub name the weights came from, and `folder`
    the local folder with their files (None: they came from no file). `threads` are those that torch works with on the CPU.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    notes: tuple[str, ...]
    source: str
    folder: Path | None = None
    threads: int = 1


def load_model(config: RunConfig) -> LanguageModel:
    """Load, check and place the model that `config.model` names; also sets torch's number of threads.

    Raises:
        ModelError: nothing there, pickled or quantised or incomplete weights, not a causal language model, no tokenizer,
            a device that does not exist, or fewer positions than `config.max_length`.
    """
    source = resolve_model(config.model)
    device, device_note = choose_device(config.device)
    folder = model_folder(config)
    with _quiet():
        model_config = read_config(folder, source, config)
        tokenizer = _read_tokenizer(folder, source, config)
        model, load_note = _read_weights(folder, source, config)
    model.config.use_cache = False
    device, place_note = place(model.eval(), config, device)
    parameters = sum(p.numel() for p in model.parameters())
    threads, thread_note = choose_threads(config.threads, parameters)
    torch.set_num_threads(threads)
    padding_note = _ensure_padding(tokenizer, model.get_input_embeddings().weight.shape[0], source)
    check_positions(model_config, config.max_length, source)
    model_note = f"model: {source} ({parameters:,} parameters, {config.dtype})"
    notes = (model_note, device_note, place_note, thread_note, padding_note, load_note)
    return LanguageModel(model, tokenizer, device, tuple(note for note in notes if note), source, folder, threads)


def model_folder(config: RunConfig) -> Path:
    """The folder with the files of `config.model`, which has weights to read; nothing is loaded yet.

    Files of a hub model are fetched first. Raises ModelError as `load_model` does, for what can be seen from the files' names.
    """
    source = resolve_model(config.model)
    folder = _local_folder(source, config)
    _check_weight_files(folder, source)
    return folder


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of `config.model` without its weights, for looking at data. Raises ModelError as `load_model` does."""
    source = resolve_model(config.model)
    folder = _local_folder(source, config)
    with _quiet():
        return _read_tokenizer(folder, source, config)


def resolve_model(name: str) -> str:
    """The folder or hub name that the setting `model` means: variables expanded, 'embedded' replaced by its folder."""
    return str(embedded_path("model")) if name == "embedded" else expand(name)


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device for the setting `device`, and a line that says why.

    Raises:
        ModelError: there is no such device on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        if cuda:
            return torch.device("cuda", 0), f"device: cuda:0 ({torch.cuda.get_device_name(0)} is available)"
        if mps:
            return torch.device("mps"), "device: mps (available, and there is no CUDA device)"
        return torch.device("cpu"), "device: cpu (there is no CUDA or MPS device)"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f"device = '{asked}' is not a device: use auto, cpu, cuda, cuda:N or mps.", device=asked) from None
    there = {"cpu": True, "cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not there.get(device.type, False):
        raise ModelError(f'device = \'{asked}\' is not on this machine: set device = "auto" or "cpu".', device=asked)
    return device, f"device: {device} (as asked)"


def choose_threads(asked: int, parameters: int) -> tuple[int, str]:
    """The number of CPU threads for the setting `threads` and a model of this size, and a line that says why."""
    if asked:
        return asked, f"threads: {asked} (as asked)"
    if parameters < SMALL_MODEL:
        return 1, f"threads: 1 (below {SMALL_MODEL // 10**6} million parameters more threads do not pay)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores, f"threads: {cores} (all cores that this process may use)"


def _local_folder(source: str, config: RunConfig) -> Path:
    """The folder with the files of `source`; files of a hub model are fetched first (never pickles)."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model = '{source}' is a file: give the folder with config.json and model.safetensors.", model=source)
    if source.startswith((".", "/", "~", "\\")) or source.count("/") > 1:
        ours = path.parent.parts[-2:] == ("fedtune", "models")  # what a program of simulations.models makes lies there
        made = "make it (`python -m simulations.models.smollm2`)" if ours else "correct the path"
        raise ModelError(f"There is no model folder '{source}': {made}, or give a hub name such as org/name.", model=source)
    code = ["*.py"] if config.trust_remote_code else []
    try:
        fetched = snapshot_download(
            source,
            revision=config.revision or None,
            allow_patterns=_HUB_FILES + code,
            ignore_patterns=["*/*", "consolidated*"],
        )
        return Path(fetched)
    except LocalEntryNotFoundError:
        raise ModelError(
            f"There is no folder '{source}', and the hub cannot be reached to fetch a model of that name: "
            "give a local folder, or connect once so that the model is cached.",
            model=source,
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"There is no folder '{source}', and the hub gave no such model ({_first_line(error)}): check model and revision.",
            model=source,
        ) from None


def _check_weight_files(folder: Path, source: str) -> None:
    _check_plain(folder, source)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{source}' has no config.json: give a folder written by save_pretrained.", model=source)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"'{source}' has an adapter (adapter_config.json), which would bring another base model: merge the two, "
            "and give the folder of the result.",
            model=source,
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"'{source}' has only pickled weights ({pickled[0]}), which can run code when loaded: "
            "convert them with save_pretrained, which writes safetensors.",
            model=source,
            files=tuple(pickled),
        )
    raise ModelError(f"'{source}' has no weights: a *.safetensors file was expected next to config.json.", model=source)


def _check_plain(folder: Path, source: str) -> None:
    """Refuse a folder in which a loader could wait for a pipe, or read a device or a text without end."""
    for path in sorted(folder.iterdir()):
        text = path.suffix in (".json", ".jinja", ".model", ".txt")
        try:
            state = path.stat()
            if not path.is_dir():
                check_regular(state, path, LARGEST_TEXT if text else ANY)
        except FileNotFoundError:
            continue  # a link to nothing: what is needed is missed by whoever needs it
        except OSError as error:
            raise ModelError(
                f"'{path.name}' in the model folder '{source}' cannot be used: {error.strerror}. "
                "Remove it, or copy the model again.",
                model=source,
            ) from None


def read_config(folder: Path, source: str, config: RunConfig) -> Any:
    """The model's configuration, refused unless it belongs to a causal language model with plain weights."""
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        own_code = "trust_remote_code" in str(error)
        fix = "set trust_remote_code = true if you trust it" if own_code else "it needs a model type that transformers knows"
        raise ModelError(
            f"The configuration of '{source}' cannot be used ({_first_line(error)}): {fix}.", model=source
        ) from None
    _check_causal(found, source, config.trust_remote_code)
    kernel = getattr(found, "_attn_implementation", None)
    if kernel is not None and "/" in str(kernel) and not config.trust_remote_code:
        raise ModelError(
            f"The configuration of '{source}' names a kernel of the hub ('{for_screen(str(kernel), 80)}'), which is code that "
            "would run: set trust_remote_code = true if you trust it, or remove attn_implementation from its config.json.",
            model=source,
        )
    if getattr(found, "quantization_config", None):
        raise ModelError(
            f"'{source}' is quantised, and fedtune tunes all weights: give the model in float32, bfloat16 or float16.",
            model=source,
        )
    return found


def _check_causal(found: Any, source: str, remote_code: bool) -> None:
    if remote_code and "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.model_type, ())
    causal = {known} if isinstance(known, str) else set(known)
    built = set(found.architectures or causal)
    if not built & causal:
        is_a = ", ".join(sorted(built)) or found.model_type
        raise ModelError(
            f"'{source}' is a {is_a}, not a causal language model: "
            "give one whose architecture ends in ForCausalLM or LMHeadModel.",
            model=source,
            architecture=is_a,
        )


def _read_tokenizer(folder: Path, source: str, config: RunConfig) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"The tokenizer of '{source}' cannot be loaded ({_first_line(error)}): "
            "put tokenizer.json and tokenizer_config.json into the folder.",
            model=source,
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of '{source}' has no end-of-text token, which every response ends with: "
            "name its eos_token in tokenizer_config.json.",
            model=source,
        )
    return tokenizer


def _read_weights(folder: Path, source: str, config: RunConfig) -> tuple[Any, str]:
    """The model with every weight read from the files (none left at random), and a note on weights that were not used."""
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = read(
            folder,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **loading_options(config),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"The weights of '{source}' cannot be loaded ({_first_line(error)}): get them again.", model=source
        ) from None
    missing = sorted(str(name) for name in (*loading["missing_keys"], *loading["mismatched_keys"]))
    if missing:
        raise ModelError(
            f"The weights of '{source}' lack {len(missing)} tensors of its architecture, or have them in another shape "
            f"(first: {missing[0]}): give the complete model.",
            model=source,
            missing=tuple(missing),
        )
    unused = sorted(loading["unexpected_keys"])
    return (
        model,
        f"weights: {len(unused)} tensors in the files belong to no module and are not used ({unused[0]})" if unused else "",
    )


def _ensure_padding(tokenizer: Any, rows: int, source: str) -> str:
    """Give the tokenizer a padding token that the embeddings have a row for, and say which; padding is never trained on."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        return ""
    for role in ("eos_token", "unk_token"):
        token = getattr(tokenizer, role)
        if token is not None and tokenizer.convert_tokens_to_ids(token) < rows:
            tokenizer.pad_token = token
            return f"padding: {token} (the tokenizer has no padding token that the model knows; {role} serves, and is masked)"
    raise ModelError(
        f"The model of '{source}' has no row for its tokenizer's end-of-text token: give the tokenizer it was trained with."
    )


def check_positions(model_config: Any, max_length: int, source: str) -> None:
    """Raise ModelError if samples of `max_length` tokens do not fit the model."""
    positions = position_limit(model_config)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"max_length = {max_length}, but '{source}' has {positions} positions: set max_length to {positions} or less.",
            max_length=max_length,
            positions=positions,
        )


def position_limit(model_config: Any) -> int | None:
    """The longest sequence of the model in tokens, or None where its configuration names none."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice of transformers while loading; what matters in it is checked and raised or noted here."""
    log: Any = transformers_logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
