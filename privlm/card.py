"""The model card of a released model: what is guaranteed, under which assumptions, and what not."""

from __future__ import annotations

from typing import Any

import msgspec

from privlm.dp.accounting import rounded_up
from privlm.dp.plan import Guarantee, Plan
from privlm.privacy import needs_one_seed
from privlm.run_folder import RunRecord
from privlm.runs import RunResult


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What all runs on a data set's ledger together have cost it."""

    epsilon: float
    delta: float
    accountant: str
    runs: int


NOT_STATED = (
    "not stated. If they were chosen by training on the private data, those runs leak as well; "
    "they are covered by the spending on the whole data set only as far as they are on the ledger, "
    "and the choice of the best of them is not covered by any sum"
)


def card(
    record: RunRecord,
    result: RunResult,
    spent: Spent | None,
    *,
    library: str,
    hyperparameters: str | None,
    version: str,
) -> str:
    """The text of README.md.

    Args:
        record: what the run was.
        result: what it achieved.
        spent: on the data set, over all runs; None for an unprotected run.
        library: who loads the weights.
        hyperparameters: how they were chosen; None if nobody said.
        version: of this toolkit.
    """
    if result.guarantee is None or record.plan is None or spent is None:
        parts = [_UNPROTECTED.format(records=result.records)]
    else:
        parts = [
            _guaranteed(record, record.plan, result, result.guarantee),
            _assumed(record.plan, result, hyperparameters),
            _NOT_PROTECTED.format(
                public=_public(result), tests=result.test_documents, unit=_one(record, result)
            ),
            _others(spent),
        ]
    heading = f"---\nlibrary_name: {library}\ntags: [privlm, differential-privacy]\n---\n"
    utility = (
        f"## Utility\n\n{result.bits_per_byte:.3f} bits per byte on {result.test_documents} test "
        f"documents; the model before it saw the private data has {result.base_bits_per_byte:.3f}."
    )
    made = f"Made by privlm {version}. Loads with {_LOADS[library]}."
    return "\n\n".join([heading + "# Model card", *parts, utility, made]) + "\n"


_LOADS = {
    "transformers": "transformers",
    "peft": "peft, on the base model that `adapter_config.json` names",
    "privlm": "`privlm.models.TinyDecoder` and `privlm.data.load_tokenizer`",
}

_UNPROTECTED = """\
## No guarantee

This model was trained on {records} private examples **without any protection**. Its weights may
give away any of them, word for word."""

_NOT_PROTECTED = """\
## What is not protected

- {public}
- The {tests} test documents trained nothing, but the figures below are measured on them.
- Several of what is protected as one ({unit}): k of them that tell the same secret cost k times ε.
- What is true of the texts as a whole, which the model is meant to learn, and what others can infer
  from it about anybody.
- How many private examples there are, and that the run took place."""


def _guaranteed(record: RunRecord, plan: Plan, result: RunResult, guarantee: Guarantee) -> str:
    relation = {
        "add-or-remove-one": "adding or removing one",
        "replace-one": "replacing one",
    }[guarantee.neighbours]
    rows: dict[str, Any] = {
        "ε": f"{rounded_up(guarantee.epsilon)}",
        "δ": f"{guarantee.delta:g}",
        "protected as one": _one(record, result),
        "neighbouring data sets": f"differ by {relation} {guarantee.unit}",
        "accountant": guarantee.accountant,
        "sampler": _named(plan.sampler),
        "noise multiplier": f"{plan.noise_multiplier:.6g}",
        "noise over the steps": "independent"
        if plan.correlation is None
        else _named(plan.correlation),
        "clipping": _named(plan.clipping),
        "steps": f"{result.steps} of {plan.steps} planned"
        if result.steps < plan.steps
        else plan.steps,
        "expected batch size": f"{plan.expected_batch_size:g}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"## What is guaranteed\n\n{guarantee}: whoever holds these weights learns hardly more "
        "than if one had never been in the private data.\n\n| | |\n|---|---|\n" + table
    )


def _assumed(plan: Plan, result: RunResult, hyperparameters: str | None) -> str:
    kept = (
        "the run's sealed seed was deleted when it finished, and nobody had copied it"
        if needs_one_seed(plan)
        else "sampling and noise were drawn afresh at every step and kept nowhere"
    )
    return f"""\
## Under which assumptions

- Secret randomness stayed secret: {kept}; AES-256-CTR is a pseudorandom function.
- The number of private examples ({result.records}), or of users where those are sampled, is public.
- Nothing but these weights was published of the run, or also what its noised steps released: loss,
  clipping and batch sizes were not.
- Hyper-parameters: {hyperparameters or NOT_STATED}."""


def _others(spent: Spent) -> str:
    others = spent.runs - 1
    said = (
        "No other run is on the ledger of this data set"
        if not others
        else f"{others} other run{'s' if others > 1 else ''} on the ledger used the same data set"
    )
    return (
        f"## All spending on this data set\n\n{said}. Together: ε = {rounded_up(spent.epsilon)} at "
        f"δ = {spent.delta:g}, by {spent.accountant}. Uses that are on no ledger are not counted."
    )


def _public(result: RunResult) -> str:
    if not result.public_documents:
        return "The data that the pre-trained model was made from."
    return (
        f"{result.public_documents} public documents, which trained tokenizer or base model "
        "without protection, and whatever a pre-trained model was made from before."
    )


def _one(record: RunRecord, result: RunResult) -> str:
    privacy = record.config.privacy
    example = {
        "block": f"a block of {record.config.corpus.context} tokens",
        "document": "a document",
        "record": "a text with its image or sound",
    }[result.unit]
    if privacy is not None and privacy.unit == "user":
        return f"a user, with at most {privacy.examples_per_user} examples, each {example}"
    return example


def _named(choice: msgspec.Struct) -> str:
    """``poisson, sampling_probability 0.04``."""
    fields = {k: v for k, v in msgspec.to_builtins(choice).items() if v is not None}
    kind = fields.pop("type")
    return ", ".join(
        [
            str(kind),
            *(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items()),
        ]
    )
