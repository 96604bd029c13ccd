"""What of transformers' ``TrainingArguments`` a private training honours, and what it refuses.

Every field is in exactly one of four tables, by name, so that this module needs no transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from privlm.dp.accounting import Neighbours
from privlm.dp.clipping import Clipping, FlatClipping
from privlm.dp.factorization import Correlation
from privlm.dp.ledger import Budget
from privlm.dp.plan import Plan
from privlm.dp.sampling import Sampler
from privlm.dp.turns import planned


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED = _names(
    # The plan: expected batch, micro-batch, length, bound. Data are never skipped on resuming.
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "max_grad_norm ignore_data_skip resume_from_checkpoint "
    # What happens to released gradients, and how often.
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args "
    "optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon "
    # Where and in which precision.
    "bf16 bf16_full_eval fp16_full_eval tf32 use_cpu use_cache activation_checkpointing "
    "gradient_checkpointing remove_unused_columns label_names seed "
    # Evaluation, on data that the guarantee is not about.
    "eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only "
    "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "include_for_metrics batch_eval_metrics load_best_model_at_end metric_for_best_model "
    "greater_is_better do_train do_eval do_predict dataloader_pin_memory "
    # Logs and checkpoints.
    "output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level "
    "report_to run_name project disable_tqdm skip_memory_metrics save_only_model save_strategy "
    "save_steps save_total_limit enable_jit_checkpoint"
)

WITHOUT_EFFECT = _names(
    # Of a feature that is refused, or of training on several processes.
    "average_tokens_across_devices log_on_each_node log_level_replica save_on_each_node "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout local_rank length_column_name liger_kernel_config fsdp_config "
    "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
    "trackio_space_id trackio_bucket_id trackio_static_space_id"
)

_DRAWN = "batches are drawn in secret by the plan's sampler"
_ONE_PROCESS = "batches are drawn and collated in the process that holds the secret"
_DISTRIBUTED = "training is on one process and device here; see privlm.dp.distributed"
_UNPROTECTED_KERNEL = "it goes round the layers whose per-example gradients are kept"

REFUSED: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "fp16": (False, "it scales the losses that are clipped; use bf16"),
        "label_smoothing_factor": (0.0, "pass a loss of your own that smooths each example's"),
        "torch_compile": (False, _UNPROTECTED_KERNEL),
        "torch_compile_backend": (None, _UNPROTECTED_KERNEL),
        "torch_compile_mode": (None, _UNPROTECTED_KERNEL),
        "use_liger_kernel": (False, _UNPROTECTED_KERNEL),
        "neftune_noise_alpha": (
            None,
            "its noise depends on the padded length, and so on the other examples of the batch",
        ),
        "torch_empty_cache_steps": (None, "the engine minds the memory"),
        "auto_find_batch_size": (
            False,
            "the engine halves the micro-batch when memory runs out, and nothing else changes",
        ),
        "include_num_input_tokens_seen": ("no", "it tells how large the secret batches were"),
        "push_to_hub": (
            False,
            "with checkpoints it publishes trainer_state.json, and the training loss in it, which "
            "is private; push the folder that save_model wrote",
        ),
        "restore_callback_states_from_checkpoint": (
            False,
            "callbacks of this trainer belong to the run; pass yours anew",
        ),
        "full_determinism": (False, "noise and batches are secret, and no run can be repeated"),
        "data_seed": (None, f"{_DRAWN}, never from a seed"),
        "train_sampling_strategy": ("random", _DRAWN),
        "dataloader_drop_last": (False, f"{_DRAWN}; none is the incomplete last one"),
        "dataloader_num_workers": (0, _ONE_PROCESS),
        "dataloader_persistent_workers": (False, _ONE_PROCESS),
        "dataloader_prefetch_factor": (None, _ONE_PROCESS),
        "dataloader_multiprocessing_context": (None, _ONE_PROCESS),
        "dataloader_in_order": (True, _ONE_PROCESS),
        "debug": ([], "it prints activations of private examples"),
        "fsdp": (None, _DISTRIBUTED),
        "deepspeed": (None, _DISTRIBUTED),
        "parallelism_config": (None, _DISTRIBUTED),
    }
)
"""By name, the only value that is taken, and why."""

CHECKED = _names(
    "optim accelerator_config activation_checkpointing_kwargs gradient_checkpointing_kwargs"
)
"""Some values are honoured, some refused."""

_IN_BACKWARD = _names(
    "lomo adalomo galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise "
    "apollo_adamw_layerwise"
)
_UNTRIED = frozenset({"adamw_torch_xla", "adamw_torch_npu_fused"})


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The privacy of a run; the bound and the batch sizes are ``TrainingArguments``'.

    Attributes:
        target_delta: δ.
        ledger: the data set's file; or :data:`~privlm.dp.turns.NO_LEDGER`.
        target_epsilon: ε of the whole run; or
        noise_multiplier: standard deviation of the noise over the clipping bound.
        clipping: a rule other than flat clipping; with the bound ``max_grad_norm``.
        sampler: by default Poisson.
        neighbours: the relation of the guarantee.
        correlation: of the noise; such a run cannot be resumed.
        run: its name in the ledger; by default a new one, or that of the checkpoint resumed from.
        dataset: what names the data set in the ledger; by default a digest of all its items.
        budget: what all runs on the ledger may spend together.
    """

    target_delta: float
    ledger: Path | str
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    clipping: Clipping | None = None
    sampler: Sampler | None = None
    neighbours: Neighbours = "add-or-remove-one"
    correlation: Correlation | None = None
    run: str | None = None
    dataset: str | None = None
    budget: Budget | None = None


class ArgumentRefused(ValueError):
    """A training argument that would be ignored, or would break the guarantee."""


def check_arguments(args: Any) -> None:
    """Refuse what cannot be honoured, before anything is trained.

    Args:
        args: a ``TrainingArguments``.

    Raises:
        ArgumentRefused: names the argument, and what to do instead.
    """
    for argument in dataclasses.fields(args):
        name, value = argument.name, getattr(args, argument.name)
        if name in REFUSED:
            neutral, reason = REFUSED[name]
            if value != neutral:
                raise ArgumentRefused(f"{name}={value!r}: {reason}; set it to {neutral!r}")
        elif name not in HONOURED | WITHOUT_EFFECT | CHECKED and value != _default(argument):
            raise ArgumentRefused(
                f"{name}={value!r}: this version of privlm does not know what it does to the "
                "guarantee; leave it out"
            )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _IN_BACKWARD:
        raise ArgumentRefused(
            f"optim={optim!r} moves parameters during backward, before any noise; choose another"
        )
    if optim in _UNTRIED:
        raise ArgumentRefused(f"optim={optim!r} is for hardware that is not supported here")
    plain = type(args.accelerator_config)()
    if args.accelerator_config != plain:
        raise ArgumentRefused(f"accelerator_config: {_DRAWN}; leave it out")
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ArgumentRefused(
            "activation_checkpointing_kwargs: use_reentrant runs a backward within the backward; "
            "set it to False"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ArgumentRefused(
            f"{args.world_size} processes, {args.n_gpu} GPUs each: {_DISTRIBUTED}. Set "
            "CUDA_VISIBLE_DEVICES to one device"
        )


def _default(argument: dataclasses.Field[Any]) -> Any:
    if argument.default_factory is not dataclasses.MISSING:
        return argument.default_factory()
    return argument.default


def plan_of(args: Any, privacy: PrivacyArguments, examples: int) -> Plan:
    """The plan of a training with these arguments.

    Raises:
        ArgumentRefused: two bounds.
        ValueError: a parameter out of range.
    """
    rule = privacy.clipping or FlatClipping(args.max_grad_norm)
    if rule.max_grad_norm != args.max_grad_norm:
        raise ArgumentRefused(
            f"max_grad_norm={args.max_grad_norm} but the clipping rule's bound is "
            f"{rule.max_grad_norm}; give both the same"
        )
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * steps_per_epoch(args, examples))
    return planned(
        examples=examples,
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        steps=steps,
        target_epsilon=privacy.target_epsilon,
        noise_multiplier=privacy.noise_multiplier,
        target_delta=privacy.target_delta,
        clipping=rule,
        sampler=privacy.sampler,
        neighbours=privacy.neighbours,
        correlation=privacy.correlation,
    )


def steps_per_epoch(args: Any, examples: int) -> int:
    """As many as ``Trainer`` would take: batches of micro-batches, both rounded up."""
    batches: int = math.ceil(examples / args.per_device_train_batch_size)
    accumulated: int = args.gradient_accumulation_steps
    return max(1, -(-batches // accumulated))


def check_data(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data that cannot be sampled, and an evaluation of private data."""
    if not (hasattr(train_dataset, "__len__") and hasattr(train_dataset, "__getitem__")):
        raise ArgumentRefused("train_dataset has no length and items to sample from; list it first")
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(data is train_dataset for data in evaluated):
        raise ArgumentRefused(
            "eval_dataset is the training data: its evaluation would leave without noise, and "
            "choose checkpoints by it; evaluate on data that need no protection"
        )
