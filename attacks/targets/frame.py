"""What every protection has in common: it runs on a scene and leaves a target behind.

Shape suffixes: N trials or candidate records, K secret canaries, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from attacks.threat import Claim, Cost, Moment, Population, Utility
from privlm.evaluation import DocumentBits
from privlm.finetuning import Corpus
from privlm.models import TinyDecoder
from privlm.progress import Watch
from protocols.randomness import Stream

if TYPE_CHECKING:
    from attacks.targets.setup import Setup
    from attacks.targets.training import TrainingExperiment

Details = dict[str, float | int | str]


@dataclass(frozen=True)
class Truth:
    """Which records a released model was trained on.

    Attributes:
        member_N: which candidate records were trained on.
        canary_N: which of them are canaries.
        secret_member_K: which secret canaries were trained on.
        secret_place_K: where each canary's own secret stands among its candidates.
    """

    member_N: npt.NDArray[np.bool_] = field(repr=False)
    canary_N: npt.NDArray[np.bool_] = field(repr=False)
    secret_member_K: npt.NDArray[np.bool_] = field(repr=False)
    secret_place_K: npt.NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Texts:
    """The token ids behind every victim's update or request; a victim may have several texts.

    Attributes:
        victims: in the order of the view; a victim's texts in any order.
        decoys: as many texts of the same kind for each, which nobody sent.
        guess: what is written for every text by whoever has seen public text alone.
    """

    victims: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    decoys: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    guess: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Choices:
    """Which of ``options`` each trial was."""

    place_N: npt.NDArray[np.int64] = field(repr=False)
    options: int


@dataclass(frozen=True)
class Coins:
    """Which of two prompts each request was."""

    coin_N: npt.NDArray[np.bool_] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Task:
    """One question put to the attacks: what they see, and the truth that they are judged by.

    Attributes:
        population: what is attacked.
        view: of a kind of :mod:`attacks.threat`; handed to every attack on views of that kind.
        truth: for the scorer alone.
        weakened: the same question where the protection is broken on purpose, one a way.
        broken: for a weakened task, how: "every seed is the same".
    """

    population: Population
    view: object
    truth: Truth | Texts | Choices | Coins
    weakened: tuple[Task, ...] = ()
    broken: str = ""


@dataclass(frozen=True, eq=False)
class EngineTrace:
    """What a training engine did where an audit watched it; no adversary sees so much.

    Attributes:
        noise_SW: what was added to the clipped sum at W watched coordinates in each of S steps.
        tensor_W: which parameter tensor each belongs to.
        tensors: the names of all trained tensors.
        noise_std: of the noise that is claimed.
        joins_SJ: which of J planted records each batch held.
        sampling_probability: with which each joins each batch, as is claimed.
    """

    noise_SW: npt.NDArray[np.float64] = field(repr=False)
    tensor_W: npt.NDArray[np.int64] = field(repr=False)
    tensors: tuple[str, ...] = field(repr=False)
    noise_std: float
    joins_SJ: npt.NDArray[np.bool_] = field(repr=False)
    sampling_probability: float


@dataclass(frozen=True, eq=False)
class Target:
    """A protected system that ran.

    ``trace`` is what its engine did, where one was watched.
    """

    claim: Claim
    tasks: tuple[Task, ...] = field(repr=False)
    utility: Utility
    cost: Cost
    details: Details
    trace: EngineTrace | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Scene:
    """What all protections of a suite share.

    Attributes:
        setup: the public description.
        seed: of what is not secret.
        corpus: documents by who may see them, and the tokenizer.
        base: trained on public text alone; nobody changes it.
        base_utility: its own.
        training: the drawing of members and canaries, if a protection of training is there.
        ledger_dir: where releases are recorded.
        watch: where progress is shown.
        stream: of secret coins.
    """

    setup: Setup
    seed: int
    corpus: Corpus = field(repr=False)
    base: TinyDecoder = field(repr=False)
    base_utility: DocumentBits = field(repr=False)
    training: TrainingExperiment | None = field(repr=False)
    ledger_dir: Path
    watch: Watch = field(repr=False)
    stream: Stream = field(repr=False)


@dataclass(frozen=True, eq=False)
class Draft:
    """A scene before anything is trained.

    ``population`` is the number of records that training is planned for, 0 if none is.
    """

    setup: Setup
    corpus: Corpus = field(repr=False)
    population: int
    watch: Watch = field(repr=False)


class Protection(Protocol):
    """Anything that runs a protected system on a scene."""

    moment: ClassVar[Moment]
    shows: ClassVar[tuple[type, ...]]
    """Kinds of views in its tasks."""

    @property
    def name(self) -> str:
        """By which the report calls it; no two of a suite share one."""

    def check(self, draft: Draft) -> None:
        """Refuse what cannot be before anything is trained.

        Raises:
            ValueError: says which parameter, and how to mend it.
        """

    def run(self, scene: Scene) -> Target:
        """Run the production path, and hand over what the adversary saw."""


@contextlib.contextmanager
def naming(protection: str) -> Iterator[None]:
    """Put the protection's name before a refusal."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"protections: {protection}: {error}") from error
