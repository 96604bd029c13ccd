"""Aggregation: clients upload updates, and someone who should learn their sum at most looks on.

Shape suffixes: K clients of a round, N texts or trials, T tokens, P parameters, C choices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from attacks.statistics import Estimate, mean_estimate
from attacks.targets.anatomy import gradient_of, open_model
from attacks.targets.frame import Choices, Details, Draft, Scene, Target, Task
from attacks.targets.texts import (
    Rerun,
    as_texts,
    plain_vocabulary,
    private_texts,
    require_texts,
)
from attacks.threat import (
    ChosenUpload,
    ChosenUploads,
    Claim,
    Cost,
    Moment,
    OpenModel,
    SeenUpdates,
    Utility,
)
from privlm.federated.update import Layout, gradient_update
from protocols.aggregation import Cohort, Round, additive, clear
from protocols.fixed_point import FixedPoint
from protocols.randomness import SEED_BYTES, Stream
from protocols.ring import Z_2_32

COLLECTOR = "collector"
TIMED_ROUNDS = 20

Streams = Callable[[Cohort[Tensor]], dict[str, Stream]]
Sequences = Annotated[int, msgspec.Meta(ge=8)]


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

    name: str = "update in clear"
    texts: Sequences = 160

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are."""
        _check(draft, self.texts)

    def run(self, scene: Scene) -> Target:
        """Clients upload to one server, which looks at each."""
        rounds = _Rounds.of(scene, clear.run_round)

        def seen() -> Iterator[Tensor]:
            for cohort, done in rounds.on(self.texts):
                held = clear.held_by(done.outcome.views[COLLECTOR], cohort)
                yield from _victims(_stacked(cohort, held)[None])

        claim = Claim(
            adversary="the server that sums the updates", assumption="none", guarantee=NOTHING
        )
        task = rounds.text_task(Rerun(seen), self.texts)
        return rounds.target(self.name, claim, (task,), {})


class ClearSum(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="clear-sum"
):
    """What every secure aggregation releases in the end: the sum of a round's updates."""

    moment: ClassVar[Moment] = Moment.AGGREGATION

    name: str = "sum in clear"
    texts: Sequences = 160

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are."""
        _check(draft, self.texts)

    def run(self, scene: Scene) -> Target:
        """Whoever receives the sum looks at it, and at nothing else."""
        rounds = _Rounds.of(scene, clear.run_round)

        def seen() -> Iterator[Tensor]:
            for cohort, done in rounds.on(self.texts):
                view = done.outcome.views[cohort.clients[0]]
                yield clear.sum_seen(view, cohort).to(torch.int32)[None]

        clients = rounds.setup.clients
        claim = Claim(
            adversary=f"whoever receives the sum of {clients} clients, as each of them does",
            assumption="none",
            guarantee=NOTHING,
        )
        task = rounds.text_task(Rerun(seen), self.texts, texts_a_victim=clients)
        return rounds.target(self.name, claim, (task,), {})


class SecretShared(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="secret-shared"
):
    """Additive secret sharing among ``servers`` servers.

    Corrupted are all servers but the first, which holds nothing but seeds, and the
    collector: the coalition that holds every number that depends on an update.
    Whoever the texts belong to is tried on ``texts`` texts. In each of ``trials``
    trials a client uploads one of ``choices`` updates that the adversary put
    forward, and a partner the difference to a fixed sum.
    """

    moment: ClassVar[Moment] = Moment.AGGREGATION

    name: str = "secret-shared"
    servers: Annotated[int, msgspec.Meta(ge=2, le=16)] = 2
    texts: Sequences = 480
    trials: Annotated[int, msgspec.Meta(ge=8)] = 6_000
    choices: Annotated[int, msgspec.Meta(ge=2)] = 64
    weakened_texts: Sequences = 64
    weakened_trials: Annotated[int, msgspec.Meta(ge=8)] = 800

    def check(self, draft: Draft) -> None:
        """Refuse more texts than there are."""
        _check(draft, max(self.texts, self.choices))

    def run(self, scene: Scene) -> Target:
        """Run rounds, and the same rounds with clients whose randomness repeats."""
        names = tuple(f"server-{n}" for n in range(self.servers))
        rounds = _Rounds.of(scene, additive.run_round, names)
        sound, broken = _fresh, _repeating(rounds.seed)
        others = " and ".join(names[1:])
        claim = Claim(
            adversary=f"{others}, together with the collector",
            assumption=(
                "server-0 is honest; channels are private and authenticated; every client draws "
                "from a secret stream of its own"
            ),
            guarantee=(
                f"nothing is learnt but the sum of {rounds.setup.clients} clients' updates, and "
                "who took part"
            ),
            nothing_leaks=True,
            short="nothing but the sum",
        )

        def texts(count: int, streams: Streams, weakened: Task | None = None) -> Task:
            def seen() -> Iterator[Tensor]:
                before_KP = rounds.before(streams)
                for cohort, done in rounds.on(count, streams):
                    yield from _victims(_seen_by_coalition(cohort, done), before_KP)

            return rounds.text_task(Rerun(seen), count, weakened=weakened)

        def uploads(count: int, streams: Streams, weakened: Task | None = None) -> Task:
            return rounds.game(count, self.choices, streams, weakened)

        tasks = (
            texts(self.texts, sound, texts(self.weakened_texts, broken)),
            uploads(self.trials, sound, uploads(self.weakened_trials, broken)),
        )
        return rounds.target(self.name, claim, tasks, {"servers": self.servers})


NOTHING = "nothing is claimed"


@dataclass(frozen=True, eq=False)
class _Rounds:
    """Rounds of one protocol on the private texts of a scene."""

    scene: Scene
    setup: AggregationSetup
    run: Callable[[Cohort[Tensor], Tensor, dict[str, Stream]], Round] = field(repr=False)
    servers: tuple[str, ...]
    layout: Layout = field(repr=False)
    model: OpenModel = field(repr=False)
    seed: bytes = field(repr=False)

    @classmethod
    def of(
        cls,
        scene: Scene,
        run: Callable[[Cohort[Tensor], Tensor, dict[str, Stream]], Round],
        servers: tuple[str, ...] = ("server-0", "server-1"),
    ) -> _Rounds:
        return cls(
            scene=scene,
            setup=scene.setup.aggregation,
            run=run,
            servers=servers,
            layout=Layout.of(dict(scene.base.named_parameters())),
            model=open_model(scene.base, plain_vocabulary(scene.corpus)),
            seed=Stream.fresh("randomness that repeats").bytes(SEED_BYTES),
        )

    @property
    def encoding(self) -> FixedPoint[Tensor]:
        setup = self.setup
        return FixedPoint(clip=setup.clip, bits=setup.bits, clients=setup.clients, ring=Z_2_32)

    def texts(self, count: int) -> Tensor:
        """So many private texts, a multiple of the clients of a round: ids_NT."""
        whole = count - count % self.setup.clients
        return private_texts(self.scene, self.setup.tokens, whole)

    def update(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What a client with these texts uploads, tensor by tensor."""
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        mask_BT[:, 0] = False
        return gradient_update(self.scene.base, ids_BT, mask_BT)

    def cohort(self, length: int) -> Cohort[Tensor]:
        """A round's description, with a session of its own."""
        clients = tuple(f"client-{k}" for k in range(self.setup.clients))
        return Cohort(
            session=Stream.fresh("session").bytes(16),
            clients=clients,
            servers=self.servers,
            collector=COLLECTOR,
            length=length,
            encoding=self.encoding,
            min_clients=len(clients),
        )

    def on(
        self, count: int, streams: Streams | None = None
    ) -> Iterator[tuple[Cohort[Tensor], Round]]:
        """Rounds over so many texts, one a client."""
        for ids_KT in self.texts(count).split(self.setup.clients):
            updates = [self.layout.flatten(self.update(ids_T[None])) for ids_T in ids_KT]
            cohort = self.cohort(self.layout.length)
            yield cohort, self.run(cohort, torch.stack(updates), (streams or _fresh)(cohort))

    def before(self, streams: Streams) -> Tensor:
        """What is held of each client after a round in which all upload zeros: int32 (K, P)."""
        return self.seen(torch.zeros(self.setup.clients, self.layout.length), streams)[0]

    def seen(self, updates_KP: Tensor, streams: Streams) -> Tensor:
        """What the coalition sees of a round with these updates: int32 (J, K, P)."""
        cohort = self.cohort(updates_KP.shape[1])
        return _seen_by_coalition(cohort, self.run(cohort, updates_KP, streams(cohort)))

    def text_task(
        self,
        uploads: Rerun[Tensor],
        count: int,
        *,
        texts_a_victim: int = 1,
        weakened: Task | None = None,
    ) -> Task:
        """Ask which texts these updates come from."""
        return Task(
            population="texts",
            view=SeenUpdates(
                model=self.model,
                uploads=uploads,
                step=self.encoding.step,
                gradient=lambda vector_P, resolution: gradient_of(
                    self.scene.base, self.layout.unflatten(vector_P), resolution
                ),
            ),
            truth=as_texts(self.scene, self.texts(count), texts_a_victim),
            weakened=weakened,
        )

    def game(self, trials: int, choices: int, streams: Streams, weakened: Task | None) -> Task:
        """Ask which of these updates a client uploaded.

        The updates are those of one matrix, so that thousands of rounds take seconds. In a round
        before the others everybody uploads zeros: a mask that comes again later is then known.
        """
        matrix = self.scene.base.parameter_roles().values[0].name
        texts_CT = private_texts(self.scene, self.setup.tokens, choices)
        update_CP = torch.stack([self.update(ids_T[None])[matrix].flatten() for ids_T in texts_CT])
        update_CP = update_CP.double()
        sum_P = 2 * update_CP.mean(0)
        zero_P = torch.zeros_like(sum_P)
        singly = len(self.servers) - 2
        weight_H = torch.tensor([1.0, *[0.0] * singly, -1.0, 0.0], dtype=torch.float64)
        known_HP = torch.stack([zero_P, *[zero_P] * singly, sum_P, zero_P])
        place_N = self.scene.stream.child(f"choices {trials}").integers(choices, trials)
        pairs = self.setup.clients // 2

        def seen() -> Iterator[ChosenUpload]:
            zeros_KP = zero_P.repeat(self.setup.clients, 1)
            before_KP = self.seen(zeros_KP, streams)[0]
            for start in range(0, trials, pairs):
                places = place_N[start : start + pairs]
                chosen_kP = update_CP[torch.from_numpy(places)]
                idle_KP = zero_P.expand(self.setup.clients - 2 * len(places), -1)
                updates_KP = torch.cat([chosen_kP, sum_P - chosen_kP, idle_KP])
                seen_JKP = self.seen(updates_KP, streams)
                for k in range(len(places)):
                    yield ChosenUpload(
                        held_HP=torch.cat(
                            [seen_JKP[:, k], seen_JKP[:1, len(places) + k], before_KP[k : k + 1]]
                        ),
                        weight_H=weight_H,
                        known_HP=known_HP,
                        update_CP=update_CP,
                        step=self.encoding.step,
                    )

        return Task(
            population="uploads",
            view=ChosenUploads(Rerun(seen)),
            truth=Choices(place_N.astype(np.int64), choices),
            weakened=weakened,
        )

    def target(self, name: str, claim: Claim, tasks: tuple[Task, ...], details: Details) -> Target:
        """Time some rounds, and see how exact their sums are.

        Bytes are those that bring the sum to the collector, not those that carry it away.
        """
        ids_NT = self.texts(self.setup.clients * TIMED_ROUNDS)
        seconds, sent, errors = 0.0, 0, []
        with self.scene.watch(f"rounds of {name}", len(ids_NT)) as after:
            for done, ids_KT in enumerate(ids_NT.split(self.setup.clients), start=1):
                updates_KP = torch.stack(
                    [self.layout.flatten(self.update(ids_T[None])) for ids_T in ids_KT]
                )
                cohort = self.cohort(self.layout.length)
                streams = _fresh(cohort)
                started = time.perf_counter()
                ran = self.run(cohort, updates_KP, streams)
                seconds += time.perf_counter() - started
                traffic = ran.outcome.traffic
                sent += sum(t.sent_bytes for name, t in traffic.items() if name != COLLECTOR)
                exact_P = updates_KP.double().sum(0)
                errors.append(float((ran.aggregate.sum_P - exact_P).norm() / exact_P.norm()))
                after(done * len(ids_KT))
        return Target(
            claim=claim,
            tasks=tasks,
            utility=Utility(_mean(errors), "relative error of the sum"),
            cost=Cost(seconds / len(ids_NT), sent / len(ids_NT), "client and round"),
            details={
                "clients": self.setup.clients,
                "parameters": self.layout.length,
                "bits": self.setup.bits,
                "clip": self.setup.clip,
                "bytes_per_parameter": sent / len(ids_NT) / self.layout.length,
                **details,
            },
        )


def _check(draft: Draft, texts: int) -> None:
    setup = draft.setup.aggregation
    if setup.tokens > draft.setup.corpus.context:
        raise ValueError(
            f"aggregation.tokens {setup.tokens} exceeds corpus.context "
            f"{draft.setup.corpus.context}; lower the one or raise the other"
        )
    require_texts(draft.corpus, setup.tokens, max(texts, setup.clients * TIMED_ROUNDS))


def _fresh(cohort: Cohort[Tensor]) -> dict[str, Stream]:
    stream = Stream.fresh("audited aggregation")
    return dict.fromkeys(cohort.parties, stream)


def _repeating(seed: bytes) -> Streams:
    """Every party draws the same, in every round: what a seed that is not fresh amounts to."""

    def streams(cohort: Cohort[Tensor]) -> dict[str, Stream]:
        return {name: Stream(seed, "randomness that repeats") for name in cohort.parties}

    return streams


def _seen_by_coalition(cohort: Cohort[Tensor], done: Round) -> Tensor:
    """What all servers but the first hold of each client, wrapping around as the ring does.

    Returns:
        int32 (J, K, P). Entry 0 is the sum of their shares, the update less server-0's share. The
        others are the negated shares of single members who hold seeds: entry 0 less such a one is
        the update if server-0's seed was the same. The sum of the round, which the collector adds,
        the claim allows.
    """
    views, corrupt = done.outcome.views, cohort.servers[1:]
    held = [additive.held_together([views[name] for name in corrupt], cohort)]
    singly = [additive.held_by(views[name], cohort) for name in corrupt[:-1]]
    together_KP, *single_KP = (_stacked(cohort, by_client) for by_client in (*held, *singly))
    return torch.stack([together_KP, *(-share_KP for share_KP in single_KP)])


def _stacked(cohort: Cohort[Tensor], held: dict[str, Tensor]) -> Tensor:
    """Rows in the order of the clients: int32 (K, P), so that Z_2^32 wraps around by itself."""
    return torch.stack([held[client] for client in cohort.clients]).to(torch.int32)


def _victims(seen_JKP: Tensor, before_KP: Tensor | None = None) -> Iterator[Tensor]:
    """Each client in turn as the first row, below it whatever may hold the same mask."""
    for k in range(seen_JKP.shape[1]):
        others_KP = torch.cat([seen_JKP[0, :k], seen_JKP[0, k + 1 :]])
        earlier = [] if before_KP is None else [before_KP[k : k + 1]]
        yield torch.cat([seen_JKP[:, k], *earlier, others_KP])


def _mean(errors: list[float]) -> Estimate:
    estimate = mean_estimate(errors)
    assert math.isfinite(estimate.value)
    return estimate
