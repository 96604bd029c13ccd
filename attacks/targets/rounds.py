"""Aggregation rounds on private texts, as they run in production.

Shape suffixes: K clients of a round, J tensors that a coalition sees of each client, H uploads that
bear on one choice, N texts or trials, T tokens, P parameters, C choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.statistics import mean_estimate
from attacks.targets.anatomy import gradient_of, open_model
from attacks.targets.frame import Choices, Details, Scene, Target, Task
from attacks.targets.texts import (
    Rerun,
    as_texts,
    plain_vocabulary,
    private_texts,
    public_texts,
)
from attacks.threat import (
    ChosenUpload,
    ChosenUploads,
    Claim,
    Cost,
    OpenModel,
    SeenUpdates,
    Utility,
)
from privlm.federated.update import Layout, gradient_update
from protocols.aggregation import Cohort, Round, additive
from protocols.fixed_point import FixedPoint
from protocols.randomness import SEED_BYTES, Stream
from protocols.ring import Z_2_32

COLLECTOR = "collector"
TIMED_ROUNDS = 20
PLAYERS = 4
"""Clients of a round of the matching game: one pair plays, the other uploads zeros."""

RunRound = Callable[[Cohort[Tensor], Tensor, dict[str, Stream]], Round]
Streams = Callable[[Cohort[Tensor]], dict[str, Stream]]


@dataclass(frozen=True)
class Randomness:
    """Where the parties of every round draw from.

    ``broken`` says how it is broken, and is empty for production's.
    """

    streams: Streams = field(repr=False)
    broken: str = ""


def fresh_randomness() -> Randomness:
    """As in production: one fresh secret stream a round, of which each party takes its part."""
    return Randomness(
        lambda cohort: dict.fromkeys(cohort.parties, Stream.fresh("audited aggregation"))
    )


def broken_randomness() -> tuple[Randomness, ...]:
    """Two ways of seeds that are not fresh; every audit of a sharing has to notice both."""
    seed = Stream.fresh("randomness that repeats").bytes(SEED_BYTES)
    return (
        Randomness(
            lambda cohort: {name: Stream(seed, "all") for name in cohort.parties},
            broken="all clients draw alike",
        ),
        Randomness(
            lambda cohort: {name: Stream(seed, name) for name in cohort.parties},
            broken="clients draw alike in every round",
        ),
    )


@dataclass(frozen=True, eq=False)
class Rounds:
    """Rounds of one protocol on the private texts of a scene."""

    scene: Scene = field(repr=False)
    name: str
    run: RunRound = field(repr=False)
    servers: tuple[str, ...]
    layout: Layout = field(repr=False)
    model: OpenModel = field(repr=False)

    @classmethod
    def of(
        cls,
        scene: Scene,
        name: str,
        run: RunRound,
        servers: tuple[str, ...] = ("server-0", "server-1"),
    ) -> Rounds:
        """Of a protection by name, with a protocol's ``run_round``."""
        return cls(
            scene=scene,
            name=name,
            run=run,
            servers=servers,
            layout=Layout.of(dict(scene.base.named_parameters())),
            model=open_model(scene.base, plain_vocabulary(scene.corpus)),
        )

    @property
    def clients(self) -> int:
        """K of a round on texts."""
        return self.scene.setup.aggregation.clients

    @property
    def encoding(self) -> FixedPoint[Tensor]:
        """Of every entry; with room for the sum."""
        setup = self.scene.setup.aggregation
        return encoding_of(setup.clip, setup.bits, setup.clients)

    def texts(self, count: int) -> Tensor:
        """So many private texts: ids_NT."""
        return private_texts(self.scene, self.scene.setup.aggregation.tokens, count)

    def update(self, ids_T: Tensor) -> dict[str, Tensor]:
        """What a client with this text uploads, tensor by tensor."""
        mask_BT = torch.ones(1, len(ids_T), dtype=torch.bool)
        mask_BT[:, 0] = False
        return gradient_update(self.scene.base, ids_T[None], mask_BT)

    def updates(self, ids_KT: Tensor) -> Tensor:
        """The same of several clients, as vectors: (K, P)."""
        return torch.stack([self.layout.flatten(self.update(ids_T)) for ids_T in ids_KT])

    def round(self, updates_KP: Tensor, randomness: Randomness) -> tuple[Cohort[Tensor], Round]:
        """One round under a session of its own."""
        clients = tuple(f"client-{k}" for k in range(len(updates_KP)))
        cohort = Cohort(
            session=Stream.fresh("session").bytes(16),
            clients=clients,
            servers=self.servers,
            collector=COLLECTOR,
            length=updates_KP.shape[1],
            encoding=self.encoding,
            min_clients=len(clients),
            context=bytes.fromhex(self.layout.digest),
        )
        return cohort, self.run(cohort, updates_KP, randomness.streams(cohort))

    def seen(self, updates_KP: Tensor, randomness: Randomness) -> Tensor:
        """What all servers but the first see of a round with these updates: (J, K, P)."""
        return seen_by_coalition(*self.round(updates_KP, randomness))

    def victims(self, count: int, randomness: Randomness) -> Iterator[Tensor]:
        """For each of so many texts a round of its own, so that victims are independent.

        The other clients upload what public texts give. Below the victim's rows stand what was
        held of the same client after a first round, in which all uploaded zeros, and after the
        round before; then the others of this round.
        """
        setup = self.scene.setup.aggregation
        fillers_KP = self.updates(public_texts(self.scene, setup.tokens, self.clients))
        first_KP = before_KP = self.seen(torch.zeros_like(fillers_KP), randomness)[0]
        for number, ids_T in enumerate(self.texts(count)):
            k = number % self.clients
            updates_KP = fillers_KP.clone()
            updates_KP[k] = self.layout.flatten(self.update(ids_T))
            seen_JKP = self.seen(updates_KP, randomness)
            others_KP = torch.cat([seen_JKP[0, :k], seen_JKP[0, k + 1 :]])
            yield torch.cat([seen_JKP[:, k], first_KP[[k]], before_KP[[k]], others_KP])
            before_KP = seen_JKP[0]

    def text_task(
        self,
        uploads: Callable[[], Iterator[Tensor]],
        count: int,
        *,
        texts_a_victim: int = 1,
        weakened: tuple[Task, ...] = (),
        broken: str = "",
    ) -> Task:
        """Ask which texts these updates come from."""
        base, layout = self.scene.base, self.layout
        return Task(
            population="texts",
            view=SeenUpdates(
                model=self.model,
                uploads=Rerun(uploads),
                step=self.encoding.step,
                gradient=lambda vector_P, resolution: gradient_of(
                    base, layout.unflatten(vector_P), resolution
                ),
            ),
            truth=as_texts(self.scene, self.texts(count), texts_a_victim),
            weakened=weakened,
            broken=broken,
        )

    def game(
        self,
        trials: int,
        choices: int,
        randomness: Randomness,
        weakened: tuple[Task, ...] = (),
    ) -> Task:
        """Ask which of these updates a client uploaded, in one round a trial.

        The updates are those of one matrix, so that thousands of rounds take seconds. A client and
        its partner upload an update and what it lacks to a fixed sum, both on the grid of the
        encoding, so that every round publishes the same sum. Two pairs take turns: whoever played
        uploaded zeros in the round before.
        """
        matrix, step = self.scene.base.parameter_roles().values[0].name, self.encoding.step
        chosen_from_CP = torch.stack(
            [self.update(ids_T)[matrix].flatten() for ids_T in self.texts(choices)]
        ).double()
        grid_CP = (chosen_from_CP / step).round()
        sum_P = (2 * grid_CP.mean(0)).round() * step
        update_CP, zero_P = grid_CP * step, torch.zeros_like(sum_P)
        singly = len(self.servers) - 2
        weight_H = torch.tensor([1.0, *[0.0] * singly, -1.0, 0.0, 0.0], dtype=torch.float64)
        known_HP = torch.stack([zero_P, *[zero_P] * singly, sum_P, zero_P, zero_P])
        place_N = self.scene.stream.child(
            f"{self.name}: choices, {randomness.broken or 'sound'}"
        ).integers(choices, trials)

        def played() -> Iterator[ChosenUpload]:
            first_KP = before_KP = self.seen(zero_P.repeat(PLAYERS, 1), randomness)[0]
            for number, place in enumerate(place_N.tolist()):
                k = 2 * (number % 2)
                updates_KP = zero_P.repeat(PLAYERS, 1)
                updates_KP[k], updates_KP[k + 1] = update_CP[place], sum_P - update_CP[place]
                seen_JKP = self.seen(updates_KP, randomness)
                yield ChosenUpload(
                    held_HP=torch.cat(
                        [seen_JKP[:, k], seen_JKP[0, [k + 1]], first_KP[[k]], before_KP[[k]]]
                    ),
                    weight_H=weight_H,
                    known_HP=known_HP,
                    update_CP=update_CP,
                    step=step,
                )
                before_KP = seen_JKP[0]

        return Task(
            population="uploads",
            view=ChosenUploads(Rerun(played)),
            truth=Choices(place_N, choices),
            weakened=weakened,
            broken=randomness.broken,
        )

    def target(self, claim: Claim, tasks: tuple[Task, ...], details: Details) -> Target:
        """Time some rounds on public texts, and see how exact their sums are.

        Bytes are those that bring the sum to the collector, not those that carry it away.
        """
        tokens = self.scene.setup.aggregation.tokens
        ids_NT = public_texts(self.scene, tokens, self.clients * TIMED_ROUNDS)
        seconds, sent, errors = 0.0, 0, []
        with self.scene.watch(f"rounds of {self.name}", len(ids_NT)) as after:
            for done, ids_KT in enumerate(ids_NT.split(self.clients), start=1):
                updates_KP = self.updates(ids_KT)
                started = time.perf_counter()
                _, ran = self.round(updates_KP, fresh_randomness())
                seconds += time.perf_counter() - started
                traffic = ran.outcome.traffic
                sent += sum(t.sent_bytes for name, t in traffic.items() if name != COLLECTOR)
                exact_P = updates_KP.double().sum(0)
                errors.append(float((ran.aggregate.sum_P - exact_P).norm() / exact_P.norm()))
                after(done * len(ids_KT))
        setup = self.scene.setup.aggregation
        return Target(
            claim=claim,
            tasks=tasks,
            utility=Utility(mean_estimate(errors), "relative error of the sum"),
            cost=Cost(seconds / len(ids_NT), sent / len(ids_NT), "client and round"),
            details={
                "clients": self.clients,
                "parameters": self.layout.length,
                "bits": setup.bits,
                "clip": setup.clip,
                "bytes_per_parameter": sent / len(ids_NT) / self.layout.length,
                **details,
            },
        )


def encoding_of(clip: float, bits: int, clients: int) -> FixedPoint[Tensor]:
    """Of an entry of an update, with room for the sum of a round or of a game's.

    Raises:
        ValueError: the sum would wrap around.
    """
    return FixedPoint(clip=clip, bits=bits, clients=max(clients, PLAYERS), ring=Z_2_32)


def seen_by_coalition(cohort: Cohort[Tensor], done: Round) -> Tensor:
    """What all servers but the first hold of each client, wrapping around as the ring does.

    Returns:
        int32 (J, K, P). Entry 0 is the sum of their shares, the update less server-0's share. The
        others are the negated shares of single members who hold seeds: entry 0 less such a one is
        the update if server-0's seed was the same. What else they and the collector receive are
        names and shares of sums.
    """
    views, corrupt = done.outcome.views, cohort.servers[1:]
    held = additive.held_together([views[name] for name in corrupt], cohort)
    singly = [additive.held_by(views[name], cohort) for name in corrupt[:-1]]
    together_KP, *single_KP = (stacked(cohort, by_client) for by_client in (held, *singly))
    return torch.stack([together_KP, *(-share_KP for share_KP in single_KP)])


def stacked(cohort: Cohort[Tensor], held: dict[str, Tensor]) -> Tensor:
    """Rows in the order of the clients: int32 (K, P), so that Z_2^32 wraps around by itself."""
    return torch.stack([held[client] for client in cohort.clients]).to(torch.int32)
