"""How much text does a gradient give away: summed over clients, and rounded to fixed point?"""

import argparse
import time

import torch
from _harness import arguments, report

from attacks.gradient import recover_texts
from attacks.targets.anatomy import gradient_of, open_model
from attacks.threat import Recovered
from privlm.config import CorpusConfig, TokenizerConfig
from privlm.finetuning import load_corpus
from privlm.models import TinyConfig, TinyDecoder, per_example_loss

CONTEXT, VOCABULARY = 32, 512
WIDTHS = (128, 256)
CLIENTS = (1, 2, 4, 8, 16)
BITS = (24, 20, 18, 16, 14, 12, 10, 8)

Gradients = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--victims", type=int, default=8, help="sums of clients, each attacked")
    parser.add_argument("--train-steps", type=int, default=0, help="on public text, before")
    options = arguments(__doc__, parser)
    corpus = load_corpus(
        CorpusConfig(context=CONTEXT), TokenizerConfig(vocab_size=VOCABULARY), seed=0
    )
    blocks, generator = corpus.blocks.private, torch.Generator().manual_seed(0)
    full_NT = blocks.ids_NT[blocks.length_N == CONTEXT]
    rows, lines = [], [f"{'width':>5} {'clients':>7} {'bits':>5} {'in order':>9} {'as a set':>9}"]
    for width in WIDTHS:
        model = TinyDecoder(
            TinyConfig(VOCABULARY, CONTEXT, width=width), torch.Generator().manual_seed(0)
        ).eval()
        train(model, corpus.blocks.public.ids_NT, options.train_steps, generator)
        for clients, bits in [(n, None) for n in CLIENTS] + [(1, b) for b in BITS]:
            row = measure(model, full_NT, clients, bits, options.victims, generator)
            rows.append({"width": width, "clients": clients, "bits": bits, **row})
            lines.append(
                f"{width:5} {clients:7} {bits or 'float':>5} {row['in_order']:9.1%} "
                f"{row['as_a_set']:9.1%}   {row['exact']:.0%} of texts exact, "
                f"{row['wrong_texts']} wrong, {row['median_s']:.2f} s a victim"
            )
    results = {
        "context": CONTEXT,
        "vocabulary": VOCABULARY,
        "victims": options.victims,
        "train_steps": options.train_steps,
        "rows": rows,
    }
    report("gradient-leakage", options, ["torch"], results, "\n".join(lines))


def train(model: TinyDecoder, ids_NT: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids_BT = ids_NT[torch.randint(0, len(ids_NT), (16,), generator=generator)]
        optimizer.zero_grad()
        mean_loss(model, ids_BT).backward()
        optimizer.step()


def mean_loss(model: TinyDecoder, ids_BT: torch.Tensor) -> torch.Tensor:
    return per_example_loss(model(ids_BT), ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)).mean()


def gradients(model: TinyDecoder, ids_BT: torch.Tensor) -> Gradients:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(mean_loss(model, ids_BT), list(named.values()))
    return dict(zip(named, grads, strict=True))


def measure(
    model: TinyDecoder,
    texts_NT: torch.Tensor,
    clients: int,
    bits: int | None,
    victims: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Shares over all victims: of tokens recovered in order, of distinct tokens, of texts."""
    known, step = open_model(model), 2.0**-bits if bits else 0.0
    in_order = as_a_set = exact = 0.0
    wrong = 0
    seconds = []
    for _ in range(victims):
        ids_KT = texts_NT[torch.randperm(len(texts_NT), generator=generator)[:clients]]
        each = [gradients(model, ids_T[None]) for ids_T in ids_KT]
        summed = {name: sum(grads[name] for grads in each) for name in each[0]}
        if bits:
            summed = {name: (g.double() / step).round() * step for name, g in summed.items()}
        started = time.perf_counter()
        found = recover_texts(known, gradient_of(model, summed, step))
        seconds.append(time.perf_counter() - started)
        true = {tuple(row) for row in ids_KT.tolist()}
        in_order += sum(longest_prefix(text, found) for text in true) / (CONTEXT * len(true))
        tokens = set(ids_KT.flatten().tolist())
        as_a_set += len(tokens & found.tokens) / len(tokens)
        exact += len(true & set(found.texts)) / len(true)
        wrong += sum(all(text != t[: len(text)] for t in true) for text in found.texts)
    return {
        "in_order": in_order / victims,
        "as_a_set": as_a_set / victims,
        "exact": exact / victims,
        "wrong_texts": wrong,
        "median_s": sorted(seconds)[victims // 2],
    }


def longest_prefix(text: tuple[int, ...], found: Recovered) -> int:
    return max((len(t) for t in found.texts if t == text[: len(t)]), default=0)


if __name__ == "__main__":
    main()
