"""The command line: ``privlm COMMAND``. Other packages add commands by entry point.

Exit codes: 0 done; 1 a measurement exceeds a claim; 2 input that cannot be used,
said in one sentence; 130 interrupted.
"""

from __future__ import annotations

import enum
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


class SamplerKind(enum.StrEnum):
    """How batches are drawn; see privlm.dp.sampling."""

    POISSON = "poisson"
    TRUNCATED = "truncated-poisson"
    FIXED = "fixed-size"
    CYCLIC = "cyclic-poisson"
    BINS = "balls-in-bins"


class UserSampling(enum.StrEnum):
    """What is sampled when a user's examples count as one; see privlm.dp.users."""

    EXAMPLES = "els"
    USERS = "uls"


@app.command()
def account(
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="Number of noised steps.")],
    delta: Annotated[float, typer.Option(help="The δ of the guarantee, in (0, 1).")],
    sample_rate: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Probability that an example joins a batch (Poisson samplers)."
        ),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Noise standard deviation over the clipping bound; or give a target."),
    ] = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Also find the noise multiplier that meets this ε.")
    ] = None,
    sampler: Annotated[
        SamplerKind, typer.Option(help="How batches are drawn.")
    ] = SamplerKind.POISSON,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Capacity of a batch (truncated-poisson).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Size of every batch (fixed-size).")
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(min=1, help="Public number of examples (truncated-poisson, fixed-size)."),
    ] = None,
    cycle: Annotated[
        int | None,
        typer.Option(min=1, help="Groups that take turns (cyclic-poisson, balls-in-bins)."),
    ] = None,
    bands: Annotated[
        int | None, typer.Option(min=1, help="Noise correlated over so many steps (BandMF).")
    ] = None,
    buffers: Annotated[
        int | None, typer.Option(min=1, help="Noise correlated through so many buffers (BLT).")
    ] = None,
    users: Annotated[
        UserSampling | None,
        typer.Option(help="Protect users: sample their examples (els) or the users (uls)."),
    ] = None,
    examples_per_user: Annotated[
        int | None, typer.Option(min=1, help="What a user contributes at most (with --users).")
    ] = None,
    replace_one: Annotated[
        bool, typer.Option("--replace-one", help="Protect against replacing one, not adding one.")
    ] = False,
    trials: Annotated[
        float | None,
        typer.Option(
            help="Mean number of runs of a search that publishes its best; drawn geometrically."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What DP-SGD costs: ε of a noise multiplier, or the reverse."""
    with watching()("accounting", 1):  # importing the accountants takes seconds by itself
        from privlm.dp.accounting import rounded_up
        from privlm.dp.cost import Question, cost

        question = Question(
            sampler=sampler.value,
            steps=steps,
            delta=delta,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            sampling_probability=sample_rate,
            max_batch_size=max_batch_size,
            batch_size=batch_size,
            population=population,
            cycle=cycle,
            bands=bands,
            buffers=buffers,
            users=None if users is None else users.value,
            examples_per_user=examples_per_user,
            replace_one=replace_one,
            trials=trials,
        )
        answer = cost(question)
    if as_json:
        _print_json(answer)
        return
    doing, one = answer["neighbours"].split(" one ")
    rate = f", sample rate {sample_rate:g}" if sample_rate is not None else ""
    typer.echo(
        f"ε = {rounded_up(answer['epsilon'], 4)} at δ = {delta:g} by {answer['accountant']}, for "
        f"{doing.replace('add or remove', 'adding or removing').replace('replace', 'replacing')} "
        f"one {one}\n(noise multiplier {answer['noise_multiplier']:.4g}, {sampler.value} sampler"
        f"{rate}, {steps} steps)"
    )
    if answer["fallback_reason"]:
        typer.echo(f"Rényi DP answered, because {answer['fallback_reason']}")
    if target_epsilon is not None:
        typer.echo(
            f"ε = {target_epsilon:g} takes a noise multiplier of "
            f"{rounded_up(answer['noise_multiplier_for_target'], 4)}"
        )
    if "steps_for_target" in answer:
        typer.echo(
            f"ε = {target_epsilon:g} allows {answer['steps_for_target']} steps at a noise "
            f"multiplier of {noise_multiplier:g}"
        )


@app.command()
def ledger(
    path: Annotated[Path, typer.Argument(help="A ledger, or a folder of *.jsonl.")],
    delta: Annotated[float, typer.Option(help="The δ at which ε is stated.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """What the runs on record have spent, data set by data set.

    Reads only, and takes no lock: a run may be writing meanwhile.
    """
    with watching()("accounting", 1):
        from privlm.dp.accounting import rounded_up
        from privlm.dp.listing import list_ledgers

        listing = list_ledgers(path, delta)
    if as_json:
        _print_json(msgspec.to_builtins(listing))
    else:
        for data_set in listing.data_sets:
            typer.echo(
                f"data set {data_set.dataset[:16]}…: ε = {rounded_up(data_set.epsilon)} at δ = "
                f"{delta:g} per {data_set.unit} ({data_set.neighbours}), by {data_set.accountant}, "
                f"over {len(data_set.runs)} runs"
            )
            for run in data_set.runs:
                kinds = ", ".join(
                    f"{msgspec.to_builtins(kind.sampler)['type']} at noise multiplier "
                    f"{kind.noise_multiplier:.4g}"
                    for kind in run.kinds
                )
                typer.echo(
                    f"  {run.run}: {run.steps} steps, ε = {rounded_up(run.epsilon)} ({kinds})"
                )
        if not listing.data_sets:
            typer.echo("nothing has been released")
    if listing.unreadable:
        raise ValueError("not counted: " + "; ".join(listing.unreadable.values()))


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
    from privlm.summary import summary

    typer.echo(summary(settings, result, out))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder to write; made if missing.")],
    hyperparameters: Annotated[
        str | None,
        typer.Option(help="How they were chosen, for the model card: 'on public text alone', say."),
    ] = None,
    insecure_no_guarantee: Annotated[
        bool, typer.Option("--insecure-no-guarantee", help="Export an unprotected run too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's weights for others, with a model card that states the guarantee.

    Weights and tokenizer alone: in the format of transformers, of peft for adapters, or of this
    toolkit for its own tiny model. Optimiser state, checkpoints and notes stay behind.
    """
    with watching()("exporting", 1):
        from privlm.export import export_run

        done = export_run(
            run,
            out,
            insecure_no_guarantee=insecure_no_guarantee,
            hyperparameters=hyperparameters,
        )
    if as_json:
        _print_json(msgspec.to_builtins(done))
        return
    typer.echo(
        f"{done.guarantee or 'no guarantee: trained unprotected'}\n"
        f"{', '.join(done.files)} in {out}; {out / 'README.md'} states it for whoever holds them"
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
