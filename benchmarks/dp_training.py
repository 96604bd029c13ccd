"""What does private training cost beside plain training, and beside Opacus?

Gradients of one logical batch, from the forward pass to the sum that is to be noised, by turns of
all contenders in one process; noise is timed apart. A GPT-2-shaped decoder of 4 layers, width 256
and a vocabulary of 8,000 with untied head, in layers that Opacus knows; then Hugging Face's GPT-2
of that shape, tied, which Opacus's ghost clipping refuses; then LoRA on it. Ratios are medians
of the ratios within a turn. Memory is the growth of a process of its own, peak, from the model on.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, report
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS = 8000, 256, 4, 4
LOGICAL = 64
BOUND = 1.0

WORKLOADS = {
    "128 tokens": {"tokens": 128, "microbatch": 16, "model": "decoder"},
    "512 tokens": {"tokens": 512, "microbatch": 4, "model": "decoder"},
    "GPT-2, 128 tokens": {"tokens": 128, "microbatch": 16, "model": "gpt2"},
    "GPT-2 with LoRA, 128 tokens": {"tokens": 128, "microbatch": 16, "model": "lora"},
}
CONTENDERS = {
    "decoder": ("plain", "privlm", "Opacus ghost", "Opacus hooks"),
    "gpt2": ("plain", "privlm"),
    "lora": ("plain", "privlm"),
}


def model_of(kind: str, tokens: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "decoder":
        from privlm.models import TinyConfig, TinyDecoder

        config = TinyConfig(
            vocab_size=VOCABULARY,
            context=tokens,
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            mlp="gelu",
        )
        return TinyDecoder(config, torch.Generator().manual_seed(0))
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=tokens,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    if kind == "gpt2":
        return model
    from privlm.models.adapters import add_lora

    return add_lora(model, rank=8, alpha=16, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    from privlm.models import per_example_loss

    out = model(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return per_example_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool))


def plain(model: nn.Module, ids: Tensor, microbatch: int) -> Callable[[], tuple[Tensor, ...]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step() -> tuple[Tensor, ...]:
        for p in parameters:
            p.grad = None
        for part in ids.split(microbatch):
            losses(model, part).sum().backward()
        return tuple(p.grad for p in parameters)

    return step


def ours(model: nn.Module, ids: Tensor, microbatch: int) -> Callable[[], tuple[Tensor, ...]]:
    from privlm.dp.clipping import PerExampleClipping

    engine = PerExampleClipping(model, losses, BOUND, microbatch).__enter__()
    return lambda: engine.clipped_sum(ids).values


def opacus(
    model: nn.Module, ids: Tensor, microbatch: int, *, ghost: bool
) -> Callable[[], tuple[Tensor, ...]]:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    common = {
        "noise_multiplier": 0.0,
        "max_grad_norm": BOUND,
        "expected_batch_size": LOGICAL,
        "loss_reduction": "sum",
    }
    if ghost:
        module: Any = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="sum"
        )
        optimizer: Any = DPOptimizerFastGradientClipping(inner, **common)
    else:
        module = GradSampleModule(model, loss_reduction="sum")
        optimizer = DPOptimizer(inner, **common)
    module.train()
    parameters = list(model.parameters())

    def step() -> tuple[Tensor, ...]:
        optimizer._is_last_step_skipped = False  # a new logical batch: zero_grad empties the sum
        for part in ids.split(microbatch):
            optimizer.signal_skip_step(do_skip=True)
            optimizer.zero_grad(set_to_none=True)
            each = losses(module, part)
            if ghost:
                DPTensorFastGradientClipping(module, optimizer, each, "sum").backward()
            else:
                each.sum().backward()
            optimizer.pre_step()
        return tuple(p.summed_grad for p in parameters)

    return step


ENGINES: dict[str, Callable[..., Callable[[], tuple[Tensor, ...]]]] = {
    "plain": plain,
    "privlm": ours,
    "Opacus ghost": functools.partial(opacus, ghost=True),
    "Opacus hooks": functools.partial(opacus, ghost=False),
}


def contender(workload: str, name: str) -> Callable[[], tuple[Tensor, ...]]:
    setting: Any = WORKLOADS[workload]
    ids = torch.randint(
        VOCABULARY, (LOGICAL, setting["tokens"]), generator=torch.Generator().manual_seed(2)
    )
    model = model_of(setting["model"], setting["tokens"])
    return ENGINES[name](model, ids, setting["microbatch"])


def peak_growth(workload: str, name: str) -> int:
    """Bytes, of a fresh process that imports everything before it counts."""
    script = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, script, "--one", workload, name],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_growth_bytes"])


def one(workload: str, name: str) -> None:
    import opacus.grad_sample
    import opacus.optimizers
    import opacus.utils.fast_gradient_clipping_utils
    import opacus.validators  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import privlm.dp.clipping
    import privlm.models.adapters  # noqa: F401

    before = peak_bytes()
    step = contender(workload, name)
    step()
    step()
    print(json.dumps({"peak_growth_bytes": peak_bytes() - before}))


def peak_bytes() -> int:
    """Greatest resident set of this program; what its parent had before does not count."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def operations(workload: str) -> dict[str, float]:
    """Multiply-adds (x2) of a logical batch: plain, and what norms add at least and as built.

    Multiplied-out gradients are the plain weight gradient; a Gram matrix of T rows adds
    2 T² (inputs + outputs) an example. Attention, norms and losses are left out.
    """
    setting: Any = WORKLOADS[workload]
    tokens = setting["tokens"]
    matrices = [(WIDTH, WIDTH)] * (4 * LAYERS) + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * LAYERS
    head = (WIDTH, VOCABULARY)
    weights = sum(i * o for i, o in [*matrices, head])
    grams = LOGICAL * 2 * tokens**2 * sum(head)
    return {
        "plain": 6.0 * LOGICAL * tokens * weights,
        "gram_of_head": float(grams),
        "parameters": float(weights + VOCABULARY * WIDTH),
    }


def noise_seconds(parameters: int, runs: int) -> float:
    from privlm.dp.clipping import ClippedSum
    from privlm.dp.noise import GaussianMechanism
    from protocols.randomness import Stream

    mechanism, stream = GaussianMechanism(1.0), Stream.fresh("benchmark")
    taken = []
    for _ in range(runs):
        clipped = ClippedSum((torch.zeros(parameters, dtype=torch.float64),), BOUND)
        start = time.perf_counter()
        mechanism.release(clipped, stream, in_place=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(workload: str, runs: int) -> dict[str, Any]:
    setting: Any = WORKLOADS[workload]
    names = CONTENDERS[setting["model"]]
    steps = {name: contender(workload, name) for name in names}
    sums = {name: step() for name, step in steps.items()}  # warms up, and must agree
    for name in names[2:]:
        for a, b in zip(sums["privlm"], sums[name], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-5)
    trained = sum(value.numel() for value in sums["plain"])
    del sums
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    return {
        **setting,
        "logical_batch": LOGICAL,
        "trained_parameters": trained,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "of_plain_throughput": {name: ratio("plain", name) for name in names[1:]},
        "times_throughput_of": {name: ratio(name, "privlm") for name in names[2:]},
        "noise_seconds": noise_seconds(trained, runs),
        "peak_growth_bytes": {name: peak_growth(workload, name) for name in names},
        "operations": operations(workload),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{'workload':30} {'contender':14} {'s a batch':>9} {'of plain':>9} {'privlm is':>10} "
        f"{'memory':>9}"
    ]
    for workload, found in results.items():
        base = found["peak_growth_bytes"]["plain"]
        for name, seconds in found["seconds"].items():
            share = found["of_plain_throughput"].get(name)
            faster = found["times_throughput_of"].get(name)
            lines.append(
                f"{workload:30} {name:14} {seconds:9.2f} "
                f"{f'{share:.2f}' if share else '':>9} {f'{faster:.2f} x' if faster else '':>10} "
                f"{found['peak_growth_bytes'][name] / base:8.2f}x"
            )
        lines.append(
            f"{'':30} {'noise':14} {found['noise_seconds']:9.3f}   "
            f"({found['noise_seconds'] / found['trained_parameters'] * 1e9:.1f} ns a parameter)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=WORKLOADS, action="append", help="some workloads")
    options = arguments(__doc__ or "", parser)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if options.one:
        one(*options.one)
        return
    results = {
        workload: measure(workload, options.runs)
        for workload in WORKLOADS
        if not options.only or workload in options.only
    }
    report(
        "dp-training",
        options,
        ["torch", "opacus", "transformers", "peft"],
        results,
        table(results),
    )


if __name__ == "__main__":
    main()
