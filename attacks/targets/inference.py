"""Split inference: a client sends hidden states, and the server that runs the middle looks on.

Shape suffixes: N requests, T tokens, D width, B prefixes, t their tokens, C candidates, V
vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from attacks.statistics import ratio_estimate
from attacks.targets.frame import Coins, Details, Draft, Scene, Target, Task
from attacks.targets.texts import as_texts, plain_vocabulary, private_texts, require_texts
from attacks.threat import (
    Claim,
    Cost,
    Moment,
    PairedPrompts,
    SentActivations,
    Utility,
    promised,
)
from privlm.data import draw_membership
from privlm.evaluation import document_bits
from privlm.models.decoder import Decoder
from privlm.split import (
    ClientPart,
    Cut,
    GaussianNoise,
    Plain,
    Request,
    ServerPart,
    client_part,
    run_in_memory,
    server_part,
)
from privlm.split import Protection as RowProtection
from protocols.randomness import Stream

FARTHEST_OF = 32
POOL = 256


class InferenceSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every protection of split inference shares.

    The client keeps the embedding, blocks before ``first`` and from ``last`` on, and the
    head. ``prompts`` private texts of ``tokens`` tokens are sent to be read back.
    ``requests`` more, of as many tokens as the context holds, are each one of two
    known prompts, by a coin; as many again carry one of two known rows of numbers.
    """

    first: Annotated[int, msgspec.Meta(ge=0)] = 1
    last: Annotated[int, msgspec.Meta(ge=1)] = 2
    tokens: Annotated[int, msgspec.Meta(ge=2)] = 24
    prompts: Annotated[int, msgspec.Meta(ge=8)] = 48
    requests: Annotated[int, msgspec.Meta(ge=100)] = 2_400


class PlainSplit(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="plain-split"
):
    """Hidden states cross as they are: the baseline."""

    moment: ClassVar[Moment] = Moment.INFERENCE
    shows: ClassVar[tuple[type, ...]] = (SentActivations, PairedPrompts)

    name: str = "hidden states in clear"

    def check(self, draft: Draft) -> None:
        """Refuse a cut that the model does not have, and more texts than there are."""
        check_inference(draft)

    def run(self, scene: Scene) -> Target:
        """Send prompts; the server reads what it receives."""
        claim = Claim(ADVERSARY, assumption="none", guarantee="nothing is claimed")
        return split_target(scene, self.name, Plain(), claim)


class NoisedSplit(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="noised-split"
):
    """Every hidden state clipped to ``clip``, with Gaussian noise: (ε, δ) for each request."""

    moment: ClassVar[Moment] = Moment.INFERENCE
    shows: ClassVar[tuple[type, ...]] = (SentActivations, PairedPrompts)

    name: str
    target_epsilon: Annotated[float, msgspec.Meta(gt=0)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5
    clip: Annotated[float, msgspec.Meta(gt=0)]

    def check(self, draft: Draft) -> None:
        """Refuse what :func:`check_inference` does, and noise too little for its tails."""
        check_inference(draft)
        self._noise(draft.setup.corpus.context)

    def _noise(self, rows: int) -> GaussianNoise:
        return GaussianNoise.for_budget(self.target_epsilon, self.delta, self.clip, rows)

    def run(self, scene: Scene) -> Target:
        """Send prompts under noise; the server, which knows its law, reads what it can."""
        rows = scene.setup.corpus.context
        noise = self._noise(rows)
        epsilon, delta = noise.guarantee()
        claim = Claim(
            adversary=ADVERSARY,
            assumption="noise stays secret; lengths are public",
            guarantee=(
                f"({promised(epsilon)}, {delta:g})-DP for any two prompts of one length, each "
                f"request of at most {rows} tokens by itself"
            ),
            epsilon=epsilon,
            delta=delta,
        )
        return split_target(
            scene,
            self.name,
            noise,
            claim,
            noise_std=noise.noise_std,
            clip=self.clip,
            clipped=noise.clipped,
            details={"noise_std": noise.noise_std, "clip": self.clip, "max_rows": rows},
        )


ADVERSARY = "the server that runs the middle blocks and knows the model"


def check_inference(draft: Draft) -> None:
    """Refuse a cut that the model does not have, and more texts than there are."""
    setup, context = draft.setup.inference, draft.setup.corpus.context
    if not setup.first < setup.last <= draft.setup.model.layers:
        raise ValueError(
            f"inference.first {setup.first} and inference.last {setup.last} must satisfy "
            f"first < last <= model.layers, which is {draft.setup.model.layers}"
        )
    if setup.tokens > context:
        raise ValueError(
            f"inference.tokens {setup.tokens} exceeds corpus.context {context}; lower the one or "
            "raise the other"
        )
    require_texts(draft.corpus, setup.tokens, setup.prompts)
    require_texts(draft.corpus, context, FARTHEST_OF)
    if len(set(draft.corpus.blocks.test.documents)) < 2:
        raise ValueError("utility needs two test documents or more; raise corpus.test_share")


def split_target(
    scene: Scene,
    name: str,
    protection: RowProtection,
    claim: Claim,
    *,
    noise_std: float = 0.0,
    clip: float = 1.0,
    clipped: Callable[[Tensor], Tensor] = lambda rows_TD: rows_TD,
    details: Details | None = None,
) -> Target:
    """Run a split model under any protection of its rows, and hand over what the server saw.

    Args:
        scene: text and model.
        name: by which progress calls it.
        protection: what is done to rows before they leave; see :mod:`privlm.split`.
        claim: what it promises.
        noise_std: of the Gaussian noise that the attacks should reckon with, 0 if there is none.
        clip: the norm to which rows are clipped; canary rows have it.
        clipped: what it does to rows (T, D) apart from noise; known to everybody.
        details: of what ran.
    """
    setup = scene.setup.inference
    split = _Split.of(scene, protection)
    prompts_NT = private_texts(scene, setup.tokens, setup.prompts)
    pairs_N2T = _far_pairs(scene, split, clipped)
    coin_N, canary_coin_N = (
        draw_membership(setup.requests, scene.stream.child(f"{name}: {what}"))
        for what in ("prompts", "canary rows")
    )
    asked_NT = pairs_N2T[torch.arange(setup.requests), torch.from_numpy(coin_N).long()]
    with scene.watch(f"requests under {name}", len(prompts_NT) + len(asked_NT)) as after:
        started = time.perf_counter()
        answered = [split.ask(ids_T) for ids_T in prompts_NT]
        seconds = time.perf_counter() - started
        after(len(answered))
        rows_NTD = torch.stack([split.ask(ids_T).sent_TD for ids_T in asked_NT])
        after(len(prompts_NT) + len(asked_NT))
    canaries = _canary_rows(split, clip, torch.from_numpy(canary_coin_N), noise_std)
    tests = scene.corpus.blocks.test
    with scene.watch(f"test documents under {name}", 1) as after:
        bits = document_bits(_Through(split), tests, scene.corpus.tokenizer)
        after(1)
    sent = sum(t.sent_bytes for r in answered for t in r.outcome.traffic.values())
    base, vocabulary_C = scene.base, plain_vocabulary(scene.corpus)

    def seen(rows_NTD: Tensor) -> SentActivations:
        return SentActivations(
            rows_NTD=rows_NTD,
            vocabulary_C=vocabulary_C,
            sent=lambda ids_NT: _by_row(clipped, split.rows(ids_NT)),
            sent_after=lambda prefix_Bt, ids_C: _by_row(
                clipped, split.rows_after(prefix_Bt, ids_C)
            ),
            log_prior=lambda prefix_Bt: _log_prior(base, vocabulary_C, prefix_Bt),
            noise_std=noise_std,
        )

    return Target(
        claim=claim,
        tasks=(
            Task(
                "prompts",
                seen(torch.stack([request.sent_TD for request in answered])),
                as_texts(scene, prompts_NT),
            ),
            Task("requests", PairedPrompts(seen(rows_NTD), pairs_N2T), Coins(coin_N)),
            Task("canary rows", canaries, Coins(canary_coin_N)),
        ),
        utility=Utility(
            ratio_estimate(bits.bits_D, bits.bytes_D),
            "bits per byte",
            scene.base_utility.bits_per_byte,
        ),
        cost=Cost(seconds / prompts_NT.numel(), sent / prompts_NT.numel(), "token"),
        details={"first block": setup.first, "last block": setup.last, **(details or {})},
    )


@dataclass(frozen=True, eq=False)
class _Split:
    """The base model in two parts, and one protection of what crosses."""

    client: ClientPart
    server: ServerPart
    protection: RowProtection
    stream: Stream = field(repr=False)

    @classmethod
    def of(cls, scene: Scene, protection: RowProtection) -> _Split:
        cut = Cut(scene.setup.inference.first, scene.setup.inference.last)
        return cls(
            client_part(scene.base, cut),
            server_part(scene.base, cut),
            protection,
            Stream.fresh("audited inference"),
        )

    def ask(self, ids_T: Tensor) -> Request:
        """One request, as it runs in production."""
        return run_in_memory(self.client, self.server, ids_T.tolist(), self.protection, self.stream)

    @torch.no_grad()
    def rows(self, ids_NT: Tensor) -> Tensor:
        """What the client's head makes of whole prompts: (N, T, D)."""
        model = self.client.model
        return model.run_blocks(model.embed_tokens(ids_NT), last=self.client.cut.first)

    @torch.no_grad()
    def rows_after(self, prefix_Bt: Tensor, ids_C: Tensor) -> Tensor:
        """What it makes of each candidate after each prefix: (B, C, D)."""
        model, first = self.client.model, self.client.cut.first
        cache = model.new_cache()
        if prefix_Bt.shape[1]:
            model.run_blocks(model.embed_tokens(prefix_Bt), cache, last=first)
        batch, choices = len(prefix_Bt), len(ids_C)
        next_M1 = ids_C.repeat(batch)[:, None]
        x_M1D = model.embed_tokens(next_M1, prefix_Bt.shape[1])
        rows_M1D = model.run_blocks(x_M1D, cache.repeat(choices), last=first)
        return rows_M1D.view(batch, choices, -1)


class _Through(nn.Module):
    """The split model as a module: every row of a batch is a request of its own."""

    def __init__(self, split: _Split) -> None:
        super().__init__()
        self._split = split

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits = [self._split.ask(ids_T).client.logits_TV for ids_T in ids_BT]
        return torch.stack([logits_TV for logits_TV in logits if logits_TV is not None])


def _by_row(clipped: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return clipped(rows.flatten(0, -2)).view(rows.shape)


@torch.no_grad()
def _log_prior(base: Decoder, vocabulary_C: Tensor, prefix_Bt: Tensor) -> Tensor:
    if not prefix_Bt.shape[1]:
        return torch.full((len(prefix_Bt), len(vocabulary_C)), 1 / len(vocabulary_C)).log()
    logits_BV: Tensor = base(prefix_Bt)[:, -1]
    return logits_BV[:, vocabulary_C].log_softmax(-1)


def _canary_rows(split: _Split, clip: float, coin_N: Tensor, noise_std: float) -> PairedPrompts:
    """Requests of rows as far apart as the claim allows, through the same protection.

    No text reaches what is promised for *any* two prompts: so rows of norm ``clip`` and their
    negatives take the place of the model's, as many as a request may have. The two "prompts" are
    all zeros and all ones.
    """
    rows, width = split.protection.max_rows or split.client.model.context, split.client.model.width
    honest_TD = torch.zeros(rows, width)
    honest_TD[:, 0] = clip
    sign_N11 = 1.0 - 2.0 * coin_N.double()[:, None, None]

    def sent(ids_NT: Tensor) -> Tensor:
        return (1.0 - 2.0 * ids_NT.double())[..., None] * honest_TD[:1]

    received = [
        split.protection.protect((sign * honest_TD).float(), split.stream) for sign in sign_N11
    ]
    return PairedPrompts(
        SentActivations(
            rows_NTD=torch.stack(received),
            vocabulary_C=torch.arange(2),
            sent=sent,
            sent_after=lambda prefix_Bt, ids_C: sent(ids_C[None]).expand(len(prefix_Bt), -1, -1),
            log_prior=lambda prefix_Bt: torch.full((len(prefix_Bt), 2), 0.5).log(),
            noise_std=noise_std,
        ),
        torch.arange(2)[None, :, None].expand(len(coin_N), 2, rows),
    )


def _far_pairs(scene: Scene, split: _Split, clipped: Callable[[Tensor], Tensor]) -> Tensor:
    """For each request two prompts as long as the context, the farthest of a few: (N, 2, T)."""
    setup = scene.setup.inference
    ids_MT = private_texts(scene, scene.setup.corpus.context, POOL)
    rows_MF = _by_row(clipped, split.rows(ids_MT)).flatten(1)
    generator = torch.Generator().manual_seed(scene.seed)
    first_N = torch.randint(len(ids_MT), (setup.requests,), generator=generator)
    others_NK = torch.randint(len(ids_MT), (setup.requests, FARTHEST_OF), generator=generator)
    distance_MM = torch.cdist(rows_MF, rows_MF)
    farthest_N = distance_MM[first_N[:, None], others_NK].argmax(1)
    second_N = others_NK[torch.arange(setup.requests), farthest_N]
    return torch.stack([ids_MT[first_N], ids_MT[second_N]], dim=1)
