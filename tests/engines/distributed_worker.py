"""One process of a distributed run: ``python distributed_worker.py SCENARIOS FOLDER [RANK SIZE]``.

Without rank and size it takes them from torchrun. What it saw goes to FOLDER, a file a rank.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from privlm.dp.clipping import FlatClipping, PerLayerClipping
from privlm.dp.distributed import Replicas
from privlm.dp.factorization import Banded
from privlm.dp.ledger import Budget
from privlm.dp.plan import Plan
from privlm.dp.records import InMemory
from privlm.dp.sampling import CyclicPoissonSampler, PoissonSampler
from privlm.dp.sharding import Shards
from privlm.dp.training import fit, private_gradients

BOUND = 0.5
NOISE_MULTIPLIER = 1.5
EXPECTED_BATCH_SIZE = 6.0
RECORDS = 12
STEPS = 3
BATCHES = {"all": range(11), "one": [3], "none": []}
SEED = bytes(range(32))


class Sine(nn.Module):
    """Uses its parameter in a function without a rule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        return x * torch.sin(self.weight)


class Block(nn.Module):
    def __init__(self, width: int, odd: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 45)
        self.back = nn.Linear(45, width)
        self.scale = nn.Parameter(torch.ones(1))  # one process of two owns nothing of it
        self.odd = Sine(width) if odd else nn.Identity()

    def forward(self, x):
        return x + self.odd(self.back(F.gelu(self.wide(self.norm(x)))) * self.scale)


class Tied(nn.Module):
    """Embedding and head share a matrix of 31 rows, which two processes cannot halve."""

    def __init__(self, seed: int = 1, *, odd: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block(16, odd) for _ in range(2))
        self.checkpointed = checkpointed
        self.register_buffer("mark", torch.tensor(seed > 1))
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def loss(model, ids_NT):
    logits = model(ids_NT[:, :-1]).flatten(0, 1)
    return (
        F.cross_entropy(logits, ids_NT[:, 1:].flatten(), reduction="none")
        .view(len(ids_NT), -1)
        .sum(1)
    )


def examples():
    return torch.randint(0, 31, (RECORDS, 7), generator=torch.Generator().manual_seed(2))


def plan(**changes) -> Plan:
    return Plan(
        **{
            "sampler": PoissonSampler(0.5),
            "steps": STEPS,
            "noise_multiplier": NOISE_MULTIPLIER,
            "expected_batch_size": EXPECTED_BATCH_SIZE,
            "delta": 1e-5,
            "clipping": FlatClipping(BOUND),
        }
        | changes
    )


def sharded(model, **settings):
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def replicas(**settings):
    model = Tied(**settings).double()
    return model, Replicas(model, WAIT)


def shards(**settings):
    model = sharded(Tied(**settings).double())
    return model, Shards(model, WAIT)


MADE = {"replicas": replicas, "shards": shards}
WAIT = timedelta(seconds=20)


class Seen:
    """Tensors and words of this process."""

    def __init__(self) -> None:
        self.tensors = {}
        self.words = {}

    def tensor(self, name, value):
        self.tensors[name] = value.detach().clone().contiguous()

    def save(self, folder, rank):
        save_file(self.tensors, folder / f"{rank}.safetensors")
        (folder / f"{rank}.json").write_text(json.dumps(self.words))


def sums(seen, folder):
    rules = {"flat": FlatClipping(BOUND), "layers": PerLayerClipping(BOUND)}
    for kind, make in MADE.items():
        for name, settings in {
            "plain": {},
            "odd": {"odd": True},
            "checkpointed": {"checkpointed": True},
        }.items():
            model, group = make(**settings)
            for rule, clipping in rules.items():
                with group.clipping(model, loss, clipping, 2) as made:
                    for batch, numbers in BATCHES.items():
                        which = torch.tensor(list(numbers), dtype=torch.int64)
                        clipped = group.summed(made, InMemory(examples()), which, BOUND)
                        where = f"{kind}/{name}/{rule}/{batch}"
                        for i, value in enumerate(clipped.values):
                            seen.tensor(f"{where}/{i}", value)
                        seen.words[where] = [clipped.examples, clipped.unclipped, clipped.loss]
    model = Tied()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    group = Shards(sharded(model, mp_policy=policy), WAIT)
    with group.clipping(model, loss, BOUND, 4) as made:
        clipped = group.summed(made, InMemory(examples()), torch.arange(11), BOUND)
        for i, value in enumerate(clipped.values):
            seen.tensor(f"bf16/{i}", value)


def training(seen, folder):
    variants = {
        "plain": plan(),
        "empty": plan(sampler=PoissonSampler(1e-9)),
        "correlated": plan(sampler=CyclicPoissonSampler(0.9, cycle=2), correlation=Banded(bands=2)),
    }
    for kind, make in MADE.items():
        for name, its_plan in variants.items():
            model, group = make(seed=1 + dist.get_rank() * (kind == "replicas"))
            where = f"{kind}/{name}"
            summed, gathered, step = group.summed, group.gathered, iter(range(2 * STEPS))

            def watched_sum(*arguments, summed=summed, where=where):
                clipped = summed(*arguments)
                seen.tensor(f"{where}/sum", flat(clipped.values))
                return clipped

            def watched_release(values, gathered=gathered, where=where, step=step):
                number = next(step)
                seen.tensor(f"{where}/noised {number}", flat(values))
                seen.tensors[f"{where}/sum {number}"] = seen.tensors.pop(f"{where}/sum")
                return gathered(values)

            group.summed, group.gathered = watched_sum, watched_release
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with (
                group.ledger(folder / f"{kind}.jsonl", dataset="d") as ledger,
                private_gradients(
                    model,
                    loss,
                    examples(),
                    its_plan,
                    ledger,
                    run=name,
                    stream=group.stream(SEED),
                    group=group,
                    microbatch_size=2,
                ) as gradients,
            ):
                fit(model, gradients, optimizer, range(STEPS))
                seen.words[where] = gradients.releases.report.step
            for i, p in enumerate(model.parameters()):
                seen.tensor(f"{where}/after/{i}", p.full_tensor() if kind == "shards" else p)
            if kind == "replicas":
                group.check_identical()


def flat(values):
    return torch.cat([v.flatten() for v in values])


def outcome(seen, what, act):
    try:
        act()
        seen.words[what] = ["", ""]
    except Exception as error:
        seen.words[what] = [type(error).__name__, str(error)]


def failures(seen, folder):
    for kind in MADE:
        failures_of(kind, seen, folder)
    model, group = replicas()
    with torch.no_grad():
        model.blocks[1].scale += dist.get_rank() * 1e-15
    outcome(seen, "drift", group.check_identical)
    outcome(seen, "other model", lambda: group.clipping(Tied(), loss, BOUND, 2))
    outcome(seen, "wrong group", lambda: Replicas(sharded(Tied()), WAIT))
    outcome(seen, "not sharded", lambda: Shards(Tied(), WAIT))


def failures_of(kind, seen, folder):
    rank = dist.get_rank()
    model, group = MADE[kind]()
    with group.clipping(model, loss, BOUND, 2) as made:
        records = InMemory(examples())
        batch = torch.arange(8)

        def poisoned(model, ids, made=made):
            losses = loss(model, ids)
            bad = (ids == examples()[5]).all(1)  # process 1's, of an odd number
            return losses / torch.where(bad, 0.0, 1.0)

        group.summed(made, records, batch, BOUND)
        made._loss = poisoned
        outcome(seen, f"{kind}/nan", lambda: group.summed(made, records, batch, BOUND))
        made._loss = loss
        outcome(seen, f"{kind}/after", lambda: group.summed(made, records, batch, BOUND))

    def steps(run, its_plan, data, budget=None, start=None):
        with (
            group.ledger(folder / f"{run}.jsonl", dataset="d", budget=budget) as ledger,
            private_gradients(
                model,
                loss,
                data,
                its_plan,
                ledger,
                run=run,
                stream=group.stream(),
                group=group,
                start=start,
            ) as gradients,
        ):
            seen.words[f"{run} steps"] = 0
            fit(
                model,
                gradients,
                torch.optim.SGD(model.parameters(), lr=0.1),
                range(its_plan.steps),
                lambda done: seen.words.__setitem__(f"{run} steps", done),
            )

    outcome(seen, f"{kind}/records", lambda: steps(f"{kind} records", plan(), examples()[rank:]))
    outcome(
        seen,
        f"{kind}/budget",
        lambda: steps(f"{kind} budget", plan(), examples(), Budget(2.5, 1e-5)),
    )
    outcome(seen, f"{kind}/run", lambda: steps(f"{kind} run", plan(), examples()))
    outcome(seen, f"{kind}/again", lambda: steps(f"{kind} run", plan(), examples(), start=1))
    outcome(
        seen,
        f"{kind}/stream",
        lambda: group.require_same("stream", group.stream().child(f"{rank}").bytes(8)),
    )


def death(seen, folder):
    """Process 1 ends at the second step; process 0 tells how long it took to notice."""
    how = os.environ["HOW"]
    model, group = MADE[os.environ["KIND"]]()
    started = [time.monotonic()]

    def after(done):
        started[0] = time.monotonic()
        if dist.get_rank() == 1:
            if how == "dies":
                os._exit(9)
            time.sleep(120)

    try:
        with (
            group.ledger(folder / "ledger.jsonl", dataset="d") as ledger,
            private_gradients(
                model, loss, examples(), plan(), ledger, run="r", stream=group.stream(), group=group
            ) as gradients,
        ):
            fit(
                model,
                gradients,
                torch.optim.SGD(model.parameters(), lr=0.1),
                range(STEPS),
                after,
            )
    except Exception as error:
        seen.words["error"] = str(error)
        seen.words["seconds"] = time.monotonic() - started[0]
        seen.save(folder, dist.get_rank())
        os._exit(5)  # the group is broken, and cannot be taken down in order


SCENARIOS = {"sums": sums, "training": training, "failures": failures, "death": death}
"""What to do; ``sums,training`` does one after the other, in folders of these names."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    if scenario == "death":
        WAIT = timedelta(seconds=4)
    if len(sys.argv) > 3:
        rank, size = int(sys.argv[3]), int(sys.argv[4])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=WAIT,
        )
    else:
        dist.init_process_group("gloo", timeout=WAIT)
    for name in scenario.split(","):
        inner = folder / name
        inner.mkdir(exist_ok=True)
        seen = Seen()
        SCENARIOS[name](seen, inner)
        seen.save(inner, dist.get_rank())
    dist.destroy_process_group()
