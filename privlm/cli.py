"""The command line: ``privlm COMMAND``. Other packages add commands by entry point.

Exit codes: 0 done; 1 a measurement exceeds a claim; 2 input that cannot be used,
said in one sentence; 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from privlm.progress import watching

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="privlm",
    help="Protects the moments at which a language model touches private data, and measures "
    "by attack what each protection still leaks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(importlib.metadata.version("privlm"))
        raise typer.Exit


@app.command()
def account(
    sample_rate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Probability that an example joins a batch (Poisson)."),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Number of noised steps.")],
    delta: Annotated[float, typer.Option(help="The δ of the guarantee.")],
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Noise standard deviation over the clipping bound; or give a target."),
    ] = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Also find the noise multiplier that meets this ε.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What DP-SGD with Poisson sampling costs: ε of a noise multiplier, or the reverse."""
    from privlm.dp.accounting import epsilon_of
    from privlm.dp.plan import Plan
    from privlm.dp.sampling import PoissonSampler

    def plan(sigma: float) -> Plan:
        return Plan(
            sampler=PoissonSampler(sample_rate),
            steps=steps,
            noise_multiplier=sigma,
            max_grad_norm=1.0,
            expected_batch_size=1.0,
            delta=delta,
        )

    if noise_multiplier is None and target_epsilon is None:
        raise ValueError("give --noise-multiplier, --target-epsilon, or both")
    answer: dict[str, Any] = {}
    if target_epsilon is not None:
        draft = plan(1.0)
        calibrated = Plan.for_budget(
            target_epsilon=target_epsilon,
            delta=delta,
            sampler=draft.sampler,
            steps=steps,
            max_grad_norm=draft.max_grad_norm,
            expected_batch_size=draft.expected_batch_size,
        ).noise_multiplier
        answer["target_epsilon"] = target_epsilon
        answer["noise_multiplier_for_target"] = calibrated
        if noise_multiplier is None:
            noise_multiplier = calibrated
    assert noise_multiplier is not None
    spent = epsilon_of(plan(noise_multiplier).event(), delta)
    answer = {
        "epsilon": spent.value,
        "delta": delta,
        "accountant": spent.accountant,
        "fallback_reason": spent.fallback_reason,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "neighbours": "add or remove one example",
    } | answer
    if as_json:
        _print_json(answer)
        return
    typer.echo(
        f"ε = {spent.value:.4f} at δ = {delta:g} by {spent.accountant}, for adding or removing "
        f"one example\n(noise multiplier {noise_multiplier:.4g}, sample rate {sample_rate:g}, "
        f"{steps} steps)"
    )
    if spent.fallback_reason:
        typer.echo(f"Rényi DP answered, because {spent.fallback_reason}")
    if target_epsilon is not None:
        typer.echo(
            f"ε = {target_epsilon:g} takes a noise multiplier of "
            f"{answer['noise_multiplier_for_target']:.4f}"
        )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see docs/training.md.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; made if missing.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a small model on private text, with or without differential privacy."""
    from privlm.config import TrainConfig, load_config
    from privlm.runs import train_run

    result = train_run(
        load_config(config, TrainConfig), out, resume=resume, watch=watching(quiet=as_json)
    )
    import msgspec

    if as_json:
        _print_json(msgspec.to_builtins(result))
        return
    promise = str(result.guarantee) if result.guarantee else "no guarantee: trained unprotected"
    typer.echo(
        f"{promise}\n"
        f"{result.bits_per_byte:.3f} bits per byte on {result.test_documents} test documents "
        f"(public base model: {result.base_bits_per_byte:.3f})\n"
        f"{result.steps} steps in {result.seconds:.0f} s; weights in {out / 'model.safetensors'}"
    )
    if result.steps_lost:
        typer.echo(f"{result.steps_lost} steps were paid for and lost to an interruption")
    if result.spent_on_data_set is not None:
        typer.echo(
            f"all runs on this data set together have spent ε = {result.spent_on_data_set:.3f}"
        )


def main() -> None:
    """Run the command line; never a traceback for input that cannot be used."""
    for entry in importlib.metadata.entry_points(group="privlm.commands"):
        app.command(entry.name)(entry.load())
    try:
        code = app(standalone_mode=False)
    except click.exceptions.Abort:
        code = _stopped()
    except click.ClickException as error:
        error.show()
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = _stopped()
    except (ValueError, OSError) as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> int:
    print("interrupted; `privlm train --resume` goes on from the last checkpoint", file=sys.stderr)
    return EXIT_INTERRUPTED


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _print_json(answer: dict[str, Any]) -> None:
    # Infinity is no JSON: an unbounded ε is null.
    typer.echo(json.dumps({k: None if v == float("inf") else v for k, v in answer.items()}))
