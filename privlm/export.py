"""``privlm export``: the released weights of a finished run, with a card that states the guarantee.

What leaves is the weights alone. Optimiser state, checkpoints, ledger and notes about steps are
private and stay; noise is part of no file.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
from safetensors.torch import load_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as _Library
from torch import nn

from privlm.card import Spent, card
from privlm.checkpoint import save_weights
from privlm.config import ConfigError, TrainConfig
from privlm.data import Tokenizer, load_tokenizer
from privlm.data.tokenization import BpeTokenizer, symbol_of_byte
from privlm.dp.history import LedgerError
from privlm.dp.ledger import read_ledger
from privlm.dp.plan import Guarantee
from privlm.materials import adapted, new_model
from privlm.models import TinyDecoder
from privlm.models.adapters import CONFIG as ADAPTER_CONFIG
from privlm.models.adapters import save_adapters
from privlm.models.architectures import LanguageModel, ModelInputs
from privlm.models.pretrained import FolderTokenizer, load, save
from privlm.run_folder import RunFolder, RunRecord
from privlm.runs import RunResult
from protocols.files import write_atomically

Format = Literal["transformers", "peft", "privlm"]

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written.

    Attributes:
        out: the folder.
        format: who loads it: transformers, peft (adapters alone) or this toolkit.
        files: relative to ``out``.
        guarantee: None if the run was unprotected.
        spent: on the data set, by this and all other runs on the ledger; None without protection.
        hyperparameters: how they were chosen, as the exporter said; None if he did not.
    """

    out: str
    format: Format
    files: tuple[str, ...]
    guarantee: Guarantee | None
    spent: Spent | None
    hyperparameters: str | None


def export_run(
    run: Path, out: Path, *, insecure_no_guarantee: bool = False, hyperparameters: str | None = None
) -> Exported:
    """Write the trained weights of ``run``, its tokenizer and a model card.

    Args:
        run: the folder of a finished run.
        out: made if missing; has to be empty.
        insecure_no_guarantee: a run without protection may be exported too.
        hyperparameters: how they were chosen; the card repeats it.

    Raises:
        ConfigError: no finished run, an unprotected one, or ``out`` is in use.
        LedgerError: the ledger does not say what was spent.
        ModelError: the base model is not where it was.
    """
    folder = RunFolder(run)
    record = folder.read(folder.record, RunRecord)
    if not (folder.result.exists() and folder.weights.exists()):
        raise ConfigError(
            f"{run}: the run is not finished, and its checkpoints are private; go on with "
            "`privlm train --resume`, and export then"
        )
    result = folder.read(folder.result, RunResult)
    if result.guarantee is None and not insecure_no_guarantee:
        raise ConfigError(
            f"{run}: trained without protection, so that its weights may give away any of its "
            "documents; add --insecure-no-guarantee to export them all the same"
        )
    spent = None if record.plan is None else _spent(folder, record, result)
    model, inputs, tokenizer = _released(folder, record.config)
    _make_empty(out)
    kind = _write(record.config, model, inputs, tokenizer, out)
    text = card(
        record, result, spent, library=kind, hyperparameters=hyperparameters, version=_version()
    )
    write_atomically(out / "README.md", text.encode(), mode=0o644)  # last: no card, no export
    return Exported(
        out=str(out),
        format=kind,
        files=tuple(sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())),
        guarantee=result.guarantee,
        spent=spent,
        hyperparameters=hyperparameters,
    )


def _version() -> str:
    return importlib.metadata.version("privlm")


def _spent(folder: RunFolder, record: RunRecord, result: RunResult) -> Spent:
    assert record.plan is not None  # the run is a private one
    path = folder.ledger(record.ledger)
    history = read_ledger(path)
    if history.dataset != record.dataset or history.steps(record.run) < result.steps:
        raise LedgerError(
            f"{path}: does not hold the {result.steps} steps of this run; restore it from a backup"
        )
    together = history.spent(record.plan.delta)
    return Spent(
        epsilon=together.value,
        delta=record.plan.delta,
        accountant=together.accountant,
        runs=len(history.releases),
    )


def _released(
    folder: RunFolder, config: TrainConfig
) -> tuple[nn.Module, ModelInputs, Tokenizer | FolderTokenizer]:
    """The model with the trained weights."""
    tokenizer: Tokenizer | FolderTokenizer
    if config.model.path is not None:
        loaded = load(config.model.path)
        model, inputs, tokenizer = loaded.model, loaded.inputs, loaded.tokenizer
    else:
        tokenizer = load_tokenizer(folder.tokenizer)
        model, inputs = new_model(config.model, tokenizer, config.corpus.context, seed=config.seed)
    model = adapted(model, config.lora, seed=config.seed)
    try:
        model.load_state_dict(load_file(folder.weights))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder.weights}: not the weights of this run's model ({reason}); --resume makes "
            "them again once the file is removed"
        ) from None
    return model.eval(), inputs, tokenizer


def _make_empty(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = next(out.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be made a folder ({error.strerror}); choose another --out"
        ) from error
    if taken is not None:
        raise ConfigError(
            f"{out}: the folder is not empty, it holds {taken.name}; choose another --out"
        )


def _write(
    config: TrainConfig,
    model: Any,
    inputs: ModelInputs,
    tokenizer: Tokenizer | FolderTokenizer,
    out: Path,
) -> Format:
    if isinstance(model, TinyDecoder):
        save_weights(out / "model.safetensors", model)
        sizes = json.dumps(vars(model.config), indent=2)
        write_atomically(out / "config.json", sizes.encode() + b"\n", mode=0o644)
        assert not isinstance(tokenizer, FolderTokenizer)
        tokenizer.save(out / "tokenizer.json")
        return "privlm"
    if config.lora is None:
        _write_model(config, model, inputs, tokenizer, out)
        return "transformers"
    save_adapters(model, out)
    base = "base" if config.model.path is None else Path(config.model.path).resolve().name
    path = out / ADAPTER_CONFIG
    saved = json.loads(path.read_bytes())
    saved["base_model_name_or_path"] = base  # not where it lies on this machine
    write_atomically(path, json.dumps(saved, indent=2).encode() + b"\n", mode=0o644)
    if config.model.path is None:  # nobody else has the base that was trained on the spot
        _write_model(config, model.unload(), inputs, tokenizer, out / base)
    return "peft"


def _write_model(
    config: TrainConfig,
    model: Any,
    inputs: ModelInputs,
    tokenizer: Tokenizer | FolderTokenizer,
    out: Path,
) -> None:
    if isinstance(tokenizer, FolderTokenizer):
        save(LanguageModel(model, inputs, tokenizer), out)
        for name in _PREPROCESSORS:
            if (Path(config.model.path or "") / name).is_file():
                shutil.copyfile(Path(config.model.path or "") / name, out / name)
        return
    save(LanguageModel(model, inputs), out)
    context = config.corpus.context
    write_transformers_tokenizer(tokenizer, out, context=context)


def write_transformers_tokenizer(tokenizer: Tokenizer, out: Path, *, context: int) -> None:
    """One of the toolkit's tokenizers as transformers' ``PreTrainedTokenizerFast``; same ids.

    The id after the ordinary ones is ``<|end|>``, which ends and pads; reserved ids are
    ``<|reserved-0|>`` and so on. Text holding such a name encodes to that id, unless the caller
    says ``split_special_tokens=True``.
    """
    if isinstance(tokenizer, BpeTokenizer):
        library = _Library.from_str(tokenizer.library.to_str())
    else:
        library = _Library(models.BPE({symbol_of_byte(n): n for n in range(256)}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
    names = ["<|end|>", *(f"<|reserved-{n}|>" for n in range(len(tokenizer.reserved_ids)))]
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    write_atomically(out / "tokenizer.json", library.to_str().encode(), mode=0o644)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2)
    write_atomically(out / "tokenizer_config.json", text.encode() + b"\n", mode=0o644)
