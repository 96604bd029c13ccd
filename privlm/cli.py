"""The command line: ``privlm COMMAND``. Other packages add commands by entry point.

Exit codes: 0 done; 1 a measurement exceeds a claim; 2 input that cannot be used,
said in one sentence; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib.metadata
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
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

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object; an infinite ε is null."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("privlm"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def account(
    sample_rate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Probability that an example joins a batch (Poisson)."),
    ],
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="Number of noised steps.")],
    delta: Annotated[float, typer.Option(help="The δ of the guarantee, in (0, 1).")],
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
    if noise_multiplier is None and target_epsilon is None:
        raise ValueError("give --noise-multiplier, --target-epsilon, or both")
    with watching()("accounting", 1):  # importing the accountants takes seconds by itself
        answer = _account(sample_rate, steps, delta, noise_multiplier, target_epsilon)
    if as_json:
        _print_json(answer)
        return
    from privlm.dp.accounting import rounded_up

    typer.echo(
        f"ε = {rounded_up(answer['epsilon'], 4)} at δ = {delta:g} by {answer['accountant']}, for "
        f"adding or removing one example\n(noise multiplier {answer['noise_multiplier']:.4g}, "
        f"sample rate {sample_rate:g}, {steps} steps)"
    )
    if answer["fallback_reason"]:
        typer.echo(f"Rényi DP answered, because {answer['fallback_reason']}")
    if target_epsilon is not None:
        typer.echo(
            f"ε = {target_epsilon:g} takes a noise multiplier of "
            f"{rounded_up(answer['noise_multiplier_for_target'], 4)}"
        )


def _account(
    sample_rate: float,
    steps: int,
    delta: float,
    noise_multiplier: float | None,
    target_epsilon: float | None,
) -> dict[str, Any]:
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

    target: dict[str, Any] = {}
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
        target = {"target_epsilon": target_epsilon, "noise_multiplier_for_target": calibrated}
        if noise_multiplier is None:
            noise_multiplier = calibrated
    assert noise_multiplier is not None
    spent = epsilon_of(plan(noise_multiplier).event(), delta)
    return {
        "epsilon": spent.value,
        "delta": delta,
        "accountant": spent.accountant,
        "fallback_reason": spent.fallback_reason,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "neighbours": "add or remove one example",
    } | target


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see docs/training.md.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; made if missing.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a small model on private text, with or without differential privacy.

    Ctrl-C stops after the step in progress; --resume goes on from there. A run that
    is killed goes on from its last checkpoint, and what it had released stays paid for.

    CONFIG is YAML (docs/training.md); the shortest names a budget and the documents:

    \b
        privacy: {target_epsilon: 8, delta: 1e-5}
        corpus: {source: letters.jsonl, public_source: pydoc-topics}
    """  # noqa: D301  (click wants the backspace itself)
    from privlm.config import TrainConfig, load_config

    settings = load_config(config, TrainConfig)
    from privlm.runs import Interrupted, train_run

    try:
        result = train_run(settings, out, resume=resume, watch=watching())
    except Interrupted as error:
        raise _StoppedError(str(error)) from error
    except KeyboardInterrupt as error:
        begun = (out / "run.json").exists()
        raise _StoppedError(
            "interrupted; add --resume to go on from the last checkpoint"
            if begun
            else "interrupted before the run began; nothing was written"
        ) from error
    if as_json:
        _print_json(msgspec.to_builtins(result))
        return
    context = settings.corpus.context
    example = f"a block of {context} tokens" if result.unit == "block" else "a document"
    promise = (
        f"{result.guarantee}; an example is {example}"
        if result.guarantee
        else "no guarantee: trained unprotected"
    )
    typer.echo(
        f"{promise}\n"
        f"protected: {result.records} private examples, a number treated as public; "
        f"not protected: {result.public_documents} public documents, which trained tokenizer and "
        "base model\n"
        f"{result.bits_per_byte:.3f} bits per byte on {result.test_documents} test documents "
        f"(public base model: {result.base_bits_per_byte:.3f})\n"
        f"{result.steps} steps, finished in {result.seconds:.0f} s; weights in "
        f"{out / 'model.safetensors'}"
    )
    if result.steps_lost:
        typer.echo(f"{result.steps_lost} steps were paid for and lost to an interruption")
    if result.spent_on_data_set is not None:
        from privlm.dp.accounting import rounded_up

        typer.echo(
            "all runs on this ledger together have spent ε = "
            f"{rounded_up(result.spent_on_data_set)}"
        )


def main() -> None:
    """Run the command line; never a traceback for input that cannot be used.

    SIGTERM, which schedulers send before they kill, stops like Ctrl-C.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if in_main_thread and before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _run()
    finally:
        if in_main_thread and before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _run() -> int:
    said, code = "", 0
    try:
        _add_commands()
        answer = app(standalone_mode=False, prog_name="privlm")
        code = answer if isinstance(answer, int) else 0
        said = "interrupted" if code == EXIT_INTERRUPTED else ""  # typer stays silent about it
    except _StoppedError as error:
        said, code = str(error), EXIT_INTERRUPTED
    except (click.exceptions.Abort, KeyboardInterrupt):
        said, code = "interrupted", EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = EXIT_BAD_INPUT
    except (ValueError, OSError) as error:
        said, code = f"error: {_said(error)}", EXIT_BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        said = "error: not enough memory; lower microbatch_size, context or the model's sizes"
        code = EXIT_BAD_INPUT
    if code == EXIT_INTERRUPTED and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient third Ctrl-C changes nothing
    if said:
        print(said, file=sys.stderr)
    return code


class _StoppedError(Exception):
    """The user stopped a command, which says how to go on."""


def _add_commands() -> None:
    known = {command.name for command in app.registered_commands}
    for entry in importlib.metadata.entry_points(group="privlm.commands"):
        if entry.name in known:
            continue
        try:
            app.command(entry.name)(entry.load())
        except Exception as error:  # whatever ails another package, our own commands work
            print(f"warning: no command {entry.name!r}: {error}", file=sys.stderr)


_MEND = {
    errno.ENOSPC: "free some space and try again, with --resume if a run had begun",
    errno.EACCES: "choose another place, or have its permissions changed",
    errno.ENOENT: "check its spelling",
}
_MEND |= dict.fromkeys((errno.EDQUOT, errno.EFBIG), _MEND[errno.ENOSPC])
_MEND |= dict.fromkeys((errno.EPERM, errno.EROFS), _MEND[errno.EACCES])
_MEND |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "choose another place")


def _said(error: Exception) -> str:
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    mend = f"; {_MEND[error.errno]}" if error.errno in _MEND else ""
    return f"{where}{error.strerror}{mend}"


def _out_of_memory(error: RuntimeError) -> bool:
    return "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)


def _print_json(answer: dict[str, Any]) -> None:
    # Infinity is no JSON: msgspec writes an unbounded ε as null.
    typer.echo(msgspec.json.encode(answer).decode())
