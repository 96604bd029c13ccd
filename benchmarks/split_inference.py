"""What does it cost to keep both ends of a GPT-2 small at the client, with and without noise?

12 blocks of width 768, random weights, a vocabulary of 8,000; the server runs all but the first
and the last block. Both parties run in one process after each other, so time is computation and
messages, without a network. The first token's time includes the prompt's.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import arguments, report, summary
from transformers import GPT2Config, GPT2LMHeadModel

from privlm.models import generate
from privlm.models.huggingface import Gpt2Decoder
from privlm.split import Cut, GaussianNoise, Plain, client_part, run_in_memory, server_part
from protocols.randomness import Stream
from protocols.transport import Outcome

VOCABULARY = 8000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate, at least 2")
    options = arguments(__doc__ or "", parser)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Gpt2Decoder(GPT2LMHeadModel(config).eval())
    prompt = torch.randint(VOCABULARY, (options.prompt,)).tolist()
    cut = Cut(1, options.layers - 1)
    client, server = client_part(model, cut), server_part(model, cut)
    rows = options.prompt + options.new - 1
    noise = GaussianNoise.for_budget(8.0, 1e-5, clip=10.0, max_rows=rows)
    stream = Stream.fresh("benchmark")
    outcomes: dict[str, Outcome] = {}

    def unsplit(new: int) -> None:
        generate(model, torch.tensor([prompt]), new)

    def split(name: str, protection: Plain | GaussianNoise) -> Callable[[int], None]:
        def run(new: int) -> None:
            request = run_in_memory(client, server, prompt, protection, stream, max_new_tokens=new)
            assert len(request.client.tokens) == new
            outcomes[name] = request.outcome

        return run

    ways = {
        "unsplit": unsplit,
        "split, plain": split("split, plain", Plain()),
        "split, noised": split("split, noised", noise),
    }
    first: dict[str, list[float]] = {name: [] for name in ways}
    further: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(-1, options.runs):  # by turns, so that a busy moment meets all of them
        for name, way in ways.items():
            marks = [time.perf_counter()]
            for new in (1, options.new):
                way(new)
                marks.append(time.perf_counter())
            if run >= 0:  # the first round warms up
                one, many = marks[1] - marks[0], marks[2] - marks[1]
                first[name].append(one)
                further[name].append((many - one) / (options.new - 1))
    results: dict[str, dict[str, Any]] = {}
    for name in ways:
        results[name] = {
            "first_token": summary(first[name]),
            "each_further": summary(further[name]),
        }
        if name in outcomes:
            traffic = outcomes[name].traffic["client"]
            results[name] |= {
                "sent_bytes_per_row": traffic.sent_bytes / rows,
                "received_bytes_per_row": traffic.received_bytes / rows,
                "rounds": outcomes[name].rounds,
            }
    lines = [f"{'':16}{'first, ms':>12}{'further, ms':>14}{'bytes/row':>12}{'rounds':>9}"]
    for name, row in results.items():
        sent = row.get("sent_bytes_per_row", 0) + row.get("received_bytes_per_row", 0)
        lines.append(
            f"{name:16}{1e3 * row['first_token']['median_s']:>12.1f}"
            f"{1e3 * row['each_further']['median_s']:>14.2f}{sent:>12.0f}{row.get('rounds', 0):>9}"
        )
    lines.append(
        f"prompt of {options.prompt}, {options.new} new tokens; a row is what one token sends and "
        "receives"
    )
    content = {
        "layers": options.layers,
        "width": options.width,
        "vocabulary": VOCABULARY,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "blocks_at_the_server": cut.last - cut.first,
        "torch_threads": torch.get_num_threads(),
        "noise": {"epsilon": 8.0, "delta": 1e-5, "clip": 10.0, "noise_std": noise.noise_std},
        "ways": results,
    }
    report(
        "split-inference",
        options,
        ["torch", "transformers", "cryptography", "msgspec"],
        content,
        "\n".join(lines),
    )


if __name__ == "__main__":
    main()
