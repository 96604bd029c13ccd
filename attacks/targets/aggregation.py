"""Aggregation: clients upload updates, and someone who should learn their sum at most looks on.

Shape suffixes: K clients of a round, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import msgspec
import torch
from torch import Tensor

from attacks.targets.frame import Draft, Scene, Target, Task
from attacks.targets.rounds import (
    COLLECTOR,
    Randomness,
    Rounds,
    broken_randomness,
    encoding_of,
    fresh_randomness,
    stacked,
)
from attacks.targets.texts import require_public_text, require_texts
from attacks.threat import ChosenUploads, Claim, Moment, SeenUpdates
from protocols.aggregation import additive, clear

NOTHING = "nothing is claimed"
Texts = Annotated[int, msgspec.Meta(ge=8)]


class AggregationSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every protection of aggregation shares.

    A client holds one private text of ``tokens`` tokens and uploads the gradient of
    the base model on it, clipped to ±``clip`` and rounded to ``bits`` bits.
    """

    clients: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 8
    tokens: Annotated[int, msgspec.Meta(ge=2)] = 24
    clip: Annotated[float, msgspec.Meta(gt=0)] = 4.0
    bits: Annotated[int, msgspec.Meta(ge=2, le=32)] = 24


class ClearUpdate(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="clear-update"
):
    """Ordinary federated learning: whoever sums sees every update."""

    moment: ClassVar[Moment] = Moment.AGGREGATION
    shows: ClassVar[tuple[type, ...]] = (SeenUpdates,)

    name: str = "update in clear"
    texts: Texts = 160

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are."""
        _check(draft, self.texts)

    def run(self, scene: Scene) -> Target:
        """Clients upload to one server, which looks at each."""
        rounds = Rounds.of(scene, self.name, clear.run_round)
        ids_NT = rounds.texts(self.texts)

        def seen() -> Iterator[Tensor]:
            for ids_KT in ids_NT.split(rounds.clients):
                cohort, done = rounds.round(rounds.updates(ids_KT), fresh_randomness())
                held = clear.held_by(done.outcome.views[COLLECTOR], cohort)
                yield from stacked(cohort, held)[:, None]

        claim = Claim(
            adversary="the server that sums the updates", assumption="none", guarantee=NOTHING
        )
        return rounds.target(claim, (rounds.text_task(seen, self.texts),), {})


class ClearSum(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="clear-sum"
):
    """What every secure aggregation releases in the end: the sum of a round's updates."""

    moment: ClassVar[Moment] = Moment.AGGREGATION
    shows: ClassVar[tuple[type, ...]] = (SeenUpdates,)

    name: str = "sum in clear"
    texts: Texts = 160

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are, and fewer than make two sums."""
        if self.texts < 2 * draft.setup.aggregation.clients:
            raise ValueError(
                f"texts {self.texts} make fewer than two sums of "
                f"{draft.setup.aggregation.clients} clients; ask for more"
            )
        _check(draft, self.texts)

    def run(self, scene: Scene) -> Target:
        """Whoever receives the sum looks at it, and at nothing else."""
        rounds = Rounds.of(scene, self.name, clear.run_round)
        clients = rounds.clients
        count = self.texts - self.texts % clients

        def seen() -> Iterator[Tensor]:
            for ids_KT in rounds.texts(count).split(clients):
                cohort, done = rounds.round(rounds.updates(ids_KT), fresh_randomness())
                view = done.outcome.views[cohort.clients[0]]
                yield clear.sum_seen(view, cohort).to(torch.int32)[None]

        claim = Claim(
            adversary=f"whoever receives the sum of {clients} clients and nothing else",
            assumption="none",
            guarantee=NOTHING,
        )
        task = rounds.text_task(seen, count, texts_a_victim=clients)
        return rounds.target(claim, (task,), {})


class SecretShared(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="secret-shared"
):
    """Additive secret sharing among ``servers`` servers.

    Corrupted are all servers but the first, which holds nothing but seeds, and the
    collector: the coalition that holds every number that depends on an update.
    It looks for ``texts`` texts, each uploaded in a round of its own. In each of
    ``trials`` rounds a client uploads one of ``choices`` updates that the adversary
    put forward, and a partner the difference to a fixed sum. Both are done again,
    in smaller numbers, where the clients' randomness is not fresh.
    """

    moment: ClassVar[Moment] = Moment.AGGREGATION
    shows: ClassVar[tuple[type, ...]] = (SeenUpdates, ChosenUploads)

    name: str = "secret-shared"
    servers: Annotated[int, msgspec.Meta(ge=2, le=16)] = 2
    texts: Texts = 480
    trials: Annotated[int, msgspec.Meta(ge=8)] = 6_000
    choices: Annotated[int, msgspec.Meta(ge=2)] = 64
    weakened_texts: Annotated[int, msgspec.Meta(ge=40)] = 40
    weakened_trials: Annotated[int, msgspec.Meta(ge=40)] = 400

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are."""
        _check(draft, max(self.texts, self.choices, self.weakened_texts))

    def run(self, scene: Scene) -> Target:
        """Run rounds, and the same rounds with clients whose randomness repeats."""
        names = tuple(f"server-{n}" for n in range(self.servers))
        rounds = Rounds.of(scene, self.name, additive.run_round, names)
        claim = Claim(
            adversary=f"{' and '.join(names[1:])}, together with the collector",
            assumption=(
                "server-0 is honest; channels are private and authenticated; every client draws "
                "from a secret stream of its own"
            ),
            guarantee=(
                f"nothing is learnt but the sum of {rounds.clients} clients' updates, and who "
                "took part"
            ),
            nothing_leaks=True,
            short="nothing but the sum",
        )

        def texts(count: int, randomness: Randomness, weakened: tuple[Task, ...] = ()) -> Task:
            return rounds.text_task(
                lambda: rounds.victims(count, randomness),
                count,
                weakened=weakened,
                broken=randomness.broken,
            )

        broken = broken_randomness()
        tasks = (
            texts(
                self.texts,
                fresh_randomness(),
                tuple(texts(self.weakened_texts, way) for way in broken),
            ),
            rounds.game(
                self.trials,
                self.choices,
                fresh_randomness(),
                tuple(rounds.game(self.weakened_trials, self.choices, way) for way in broken),
            ),
        )
        return rounds.target(claim, tasks, {"servers": self.servers})


def _check(draft: Draft, texts: int) -> None:
    setup = draft.setup.aggregation
    if setup.tokens > draft.setup.corpus.context:
        raise ValueError(
            f"aggregation.tokens {setup.tokens} exceeds corpus.context "
            f"{draft.setup.corpus.context}; lower the one or raise the other"
        )
    encoding_of(setup.clip, setup.bits, setup.clients)
    require_texts(draft.corpus, setup.tokens, texts)
    require_public_text(draft.corpus, setup.tokens)
