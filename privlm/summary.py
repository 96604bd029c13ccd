"""What ``privlm train`` says of a finished run."""

from __future__ import annotations

from pathlib import Path

from privlm.config import TrainConfig
from privlm.dp.accounting import rounded_up
from privlm.runs import RunResult


def summary(settings: TrainConfig, result: RunResult, out: Path) -> str:
    """The guarantee, what it is about, utility and cost; lines without a last newline."""
    example = {
        "block": f"a block of {settings.corpus.context} tokens",
        "document": "a document",
        "record": "a text with its image or sound",
    }[result.unit]
    promise = (
        f"{result.guarantee}; an example is {example}"
        if result.guarantee
        else "no guarantee: trained unprotected"
    )
    protected = (
        f"protected: {result.records} private examples, a number treated as public"
        if result.guarantee
        else f"trained on {result.records} private examples, which nothing protects"
    )
    public = (
        f"{result.public_documents} public documents, which trained tokenizer and base model"
        if result.public_documents
        else "what the pre-trained model was made from"
    )
    lines = [
        promise,
        f"{protected}; not protected: {public}",
        f"{result.bits_per_byte:.3f} bits per byte on {result.test_documents} test documents "
        f"(public base model: {result.base_bits_per_byte:.3f})",
        f"{result.steps} steps, finished in {result.seconds:.0f} s; weights in "
        f"{out / 'model.safetensors'}",
    ]
    if result.steps < result.planned_steps:
        lines.append(
            f"ended before step {result.steps + 1} of {result.planned_steps}, which would have "
            "exceeded the budget of the data set"
        )
    if result.steps_lost:
        lines.append(f"{result.steps_lost} steps were paid for and lost to an interruption")
    if result.spent_on_data_set is not None:
        lines.append(
            "all runs on this ledger together have spent ε = "
            f"{rounded_up(result.spent_on_data_set)}"
        )
    return "\n".join(lines)
