"""Small runs of ``privlm train`` in a folder: begun, stopped at a step, finished."""

import contextlib
import json
import random

import pytest

import privlm.dp.history
import privlm.dp.plan
import privlm.steps
from privlm.config import TrainConfig, decode_config
from privlm.dp.accounting import epsilon_of
from privlm.progress import watching
from privlm.runs import RunResult, train_run

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix potions"
WORDS = TEXT.split()
QUIET = watching(quiet=True)


@contextlib.contextmanager
def accounted_once():
    """The accountants have their own tests; here the same few events come again and again."""
    known = {}

    def remembered(event, delta, *relation):
        key = repr(event), delta, *relation
        if key not in known:
            known[key] = epsilon_of(event, delta, *relation)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (privlm.dp.history, privlm.dp.plan, privlm.steps):
            patch.setattr(module, "epsilon_of", remembered)
        yield


def write_documents(folder) -> None:
    rng = random.Random(0)
    for part, count in (("private", 7), ("public", 3), ("test", 2)):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            text = " ".join(rng.choice(WORDS) for _ in range(40))
            (folder / part / f"{part}{number}.txt").write_text(text)


def corpus_in(folder, **changes) -> dict:
    return {
        "source": str(folder / "private"),
        "public_source": str(folder / "public"),
        "test_source": str(folder / "test"),
        "context": 16,
    } | changes


STEPS, BATCH, RECORDS = 12, 24, 95


def configured(base, **changes) -> TrainConfig:
    settings = {
        "privacy": {"noise_multiplier": 1.0},
        "corpus": corpus_in(base / "docs"),
        "tokenizer": {"kind": "byte"},
        "model": {"width": 16, "layers": 1, "heads": 2},
        "public": {"epochs": 1},
        "epochs": STEPS * BATCH / RECORDS,
        "batch_size": BATCH,
        "checkpoint_every": 3,
    }
    return decode_config(json.dumps(settings | changes), TrainConfig, where="test")


class Stopped(Exception):
    pass


def stopping_at(step: int):
    """A watch under which private training dies right after this step, before any checkpoint."""

    @contextlib.contextmanager
    def watch(what, steps):
        def show(done, note=""):
            if "training" in what and done == step:
                raise Stopped

        yield show

    return watch


def begin(config, out, *, until: int) -> None:
    with pytest.raises(Stopped):
        train_run(config, out, resume=False, watch=stopping_at(until))


def go(config, out, *, resume: bool = False) -> RunResult:
    return train_run(config, out, resume=resume, watch=QUIET)


def ledger_lines(path) -> list[dict]:
    return [json.loads(line)["entry"] for line in path.read_text().splitlines()]
