"""Clipped sums of the one-pass engine against a loop of plain autograd over single examples."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from privlm.dp.batches import select, size, split
from privlm.dp.bookkeeping.book import Account, Book
from privlm.dp.clipping import (
    ROUNDING_MARGIN,
    AutomaticClipping,
    FlatClipping,
    NonFiniteGradient,
    PerExampleClipping,
    PerLayerClipping,
)
from privlm.models import TinyConfig, TinyDecoder, per_example_loss

VOCABULARY = 40
TOKENS = 12
EXAMPLES = 7


@pytest.fixture
def seeded():
    torch.manual_seed(5)


def alone(model, loss, batch):
    """Each example's gradients, by plain autograd on a batch of one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for example in split(batch, 1):
        loss(model, example).sum().backward()
        rows.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        model.zero_grad(set_to_none=True)
    return rows


def norm_of(gradients):
    return float(torch.sqrt(sum(g.double().square().sum() for g in gradients)))


def summed(model, loss, batch, clipping=0.5, microbatch=4):
    with PerExampleClipping(model, loss, clipping, microbatch) as engine:
        return engine.clipped_sum(batch)


def assert_equal_sums(model, loss, batch, *, microbatch=4, tolerance=1e-9):
    """Against a loop over single examples, with a bound that clips half of them."""
    gradients = alone(model, loss, batch)
    norms = [norm_of(row) for row in gradients]
    bound = sorted(norms)[len(norms) // 2]
    got = summed(model, loss, batch, bound, microbatch).values
    weights = [min(1.0, bound * (1 - ROUNDING_MARGIN) / norm) for norm in norms]
    expected = [
        sum(w * g for w, g in zip(weights, column, strict=True))
        for column in zip(*gradients, strict=True)
    ]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, a, b in zip(names, got, expected, strict=True):
        assert (a - b).norm() <= tolerance * norm_of(expected), name


def ids(count=EXAMPLES, tokens=TOKENS):
    return torch.randint(VOCABULARY, (count, tokens))


def causal(model, batch):
    return per_example_loss(model(batch), batch, torch.ones_like(batch).bool())


def causal_hf(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_example_loss(logits, batch["input_ids"], batch["attention_mask"].bool())


def squared(model, batch):
    return model(batch).flatten(1).square().sum(1)


def padded():
    mask = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    for n in range(EXAMPLES):
        mask[n, TOKENS - n :] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def gpt2(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "n_positions": TOKENS,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**settings | changes)).double()


def llama(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TOKENS,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).double()


@pytest.mark.usefixtures("seeded")
class TestLanguageModels:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("microbatch", [1, 3, 64])
    def test_tiny(self, tied, microbatch):
        config = TinyConfig(
            vocab_size=VOCABULARY, context=TOKENS, width=16, heads=2, tied_head=tied
        )
        model = TinyDecoder(config, torch.Generator().manual_seed(1)).double()
        assert_equal_sums(model, causal, ids(), microbatch=microbatch)

    @pytest.mark.parametrize("tied", [False, True])
    def test_gpt2_with_padding(self, tied):
        assert_equal_sums(gpt2(tie_word_embeddings=tied), causal_hf, padded())

    @pytest.mark.parametrize("tied", [False, True])
    def test_llama(self, tied):
        assert_equal_sums(llama(tie_word_embeddings=tied), causal_hf, padded())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant):
        model = gpt2()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.train()
        assert_equal_sums(model, causal_hf, padded())

    def test_long_rows_and_short_ones_take_different_ways(self):
        """Few rows are booked, many are multiplied out; tied ones meet in both forms."""
        for width, tokens in ((64, 3), (8, 60)):
            config = TinyConfig(
                vocab_size=VOCABULARY, context=tokens, width=width, heads=2, tied_head=True
            )
            model = TinyDecoder(config, torch.Generator().manual_seed(1)).double()
            assert_equal_sums(model, causal, ids(tokens=tokens))

    def test_a_model_that_shares_a_bias_among_examples_goes_one_by_one(self):
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        model = T5ForConditionalGeneration(config).double()

        def loss(model, batch):
            logits = model(input_ids=batch, decoder_input_ids=batch).logits
            return per_example_loss(logits, batch, torch.ones_like(batch).bool())

        with pytest.warns(UserWarning, match="relative_attention_bias.*one by one"):
            assert_equal_sums(model, loss, ids())


class Net(nn.Module):
    """A module from a function and its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.double()

    def forward(self, x):
        return self.function(self, x)


class Twice(nn.Module):
    """One parameter in several elementwise uses."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.positions = nn.Parameter(torch.randn(1, 4, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.double()

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = (x + self.positions) * self.scale - self.scale
        return x * self.temperature * self.scale


class Einsum(nn.Module):
    """A parameter in an operation without a rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5).double())

    def forward(self, x):
        return torch.einsum("oi,...i->...o", self.weight, x).sin()


LAYERS = {
    "linear on a vector": (lambda: Net(lambda m, x: m.a(x), a=nn.Linear(5, 3)), (5,)),
    "linear on rows": (lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Linear(5, 3)), (6, 5)),
    "linear on a grid": (lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Linear(5, 3)), (2, 3, 5)),
    "linear without bias": (
        lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Linear(5, 3, bias=False)),
        (6, 5),
    ),
    "linear used twice": (
        lambda: Net(lambda m, x: m.a(m.a(x).tanh()[:, :4]).sin(), a=nn.Linear(5, 5)),
        (6, 5),
    ),
    "rows flattened over examples": (
        lambda: Net(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1).sin(), a=nn.Linear(5, 3)),
        (6, 5),
    ),
    "layer norm": (
        lambda: Net(lambda m, x: m.b(m.a(x)).sin(), a=nn.LayerNorm(5), b=nn.LayerNorm((6, 5))),
        (6, 5),
    ),
    "rms norm": (lambda: Net(lambda m, x: m.a(x).sin(), a=nn.RMSNorm(5)), (6, 5)),
    "patches": (
        lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Conv2d(3, 4, 2, stride=2)),
        (3, 4, 6),
    ),
    "convolution": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).sin()).sin(),
            a=nn.Conv2d(3, 4, 3, padding=1, dilation=1),
            b=nn.Conv2d(4, 2, (2, 3), stride=(1, 2), padding="valid", bias=False),
        ),
        (3, 5, 6),
    ),
    "sound": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).sin()).sin(),
            a=nn.Conv1d(3, 4, 3, padding=1),
            b=nn.Conv1d(4, 2, 3, stride=2, padding=1),
        ),
        (3, 8),
    ),
    "convolution of the same size": (
        lambda: Net(lambda m, x: m.a(x).sin(), a=nn.Conv1d(3, 4, 5, padding="same", dilation=2)),
        (3, 8),
    ),
    "tokens, positions and scales": (Twice, (3, 5)),
    "checkpointed": (
        lambda: Net(
            lambda m, x: checkpoint(lambda y: m.b(m.a(y).sin()), x, use_reentrant=False),
            a=nn.Linear(5, 4),
            b=nn.Linear(4, 3),
        ),
        (6, 5),
    ),
}


@pytest.mark.usefixtures("seeded")
class TestLayers:
    @pytest.mark.parametrize("name", LAYERS)
    def test_layer(self, name):
        build, shape = LAYERS[name]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equal_sums(build(), squared, torch.randn(EXAMPLES, *shape).double())

    @pytest.mark.parametrize(
        "frozen", ["a.weight", "a.bias", "n.weight", "n.bias", "c.weight", "c.bias"]
    )
    def test_frozen_parts_stay_out(self, frozen):
        model = Net(
            lambda m, x: m.a(m.n(m.c(x))).sin(),
            c=nn.Conv1d(3, 3, 1),
            n=nn.LayerNorm(5),
            a=nn.Linear(5, 2),
        )
        model.get_parameter(frozen).requires_grad_(False)
        assert_equal_sums(model, squared, torch.randn(EXAMPLES, 3, 5).double())

    @pytest.mark.parametrize("padding", [None, 3])
    def test_embedding_with_repeated_tokens(self, padding):
        model = Net(lambda m, x: m.a(x).sin(), a=nn.Embedding(8, 5, padding_idx=padding))
        assert_equal_sums(model, squared, torch.randint(8, (EXAMPLES, 9)))

    def test_one_row_of_positions_for_all_examples(self):
        model = Net(
            lambda m, x: (m.a(x) + m.b(torch.arange(9)[None])).sin(),
            a=nn.Embedding(8, 5),
            b=nn.Embedding(9, 5),
        )
        assert_equal_sums(model, squared, torch.randint(8, (EXAMPLES, 9)))

    def test_positions_as_long_as_the_batch_are_not_taken_for_examples(self):
        """A vector of as many positions as there are examples: the trap of broadcast ids."""
        model = Net(
            lambda m, x: (m.a(x) + m.b(torch.arange(8))).sin(),
            a=nn.Embedding(8, 5),
            b=nn.Embedding(8, 5),
        )
        with pytest.warns(UserWarning, match=r"b\.weight.*one by one"):
            assert_equal_sums(model, squared, torch.randint(8, (8, 8)), microbatch=8)

    def test_an_unknown_use_falls_back_to_functorch_and_says_so(self):
        model = Net(lambda m, x: m.a(m.e(x)), e=Einsum(), a=nn.Linear(3, 2))
        with pytest.warns(UserWarning, match=r"Einsum uses its parameters in einsum.*functorch"):
            assert_equal_sums(model, squared, torch.randn(EXAMPLES, 6, 5).double())


@pytest.mark.usefixtures("seeded")
class TestRefusals:
    def test_examples_given_by_name_to_a_layer_without_a_rule(self):
        """They would not be told apart by functorch."""

        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5).double())

            def forward(self, x, gate):
                return torch.einsum("...i,i->...i", x, self.weight) * gate

        model = Net(lambda m, x: m.g(x, gate=x.sin()), g=Gated())
        with (
            pytest.warns(UserWarning, match="functorch"),
            pytest.raises(ValueError, match="takes gate by name"),
        ):
            summed(model, squared, torch.randn(EXAMPLES, 6, 5).double())

    @pytest.mark.parametrize("trained", [True, False])
    def test_batch_norm(self, trained):
        model = Net(lambda m, x: m.a(m.b(x)), b=nn.BatchNorm1d(5), a=nn.Linear(5, 3))
        model.b.requires_grad_(trained)
        with pytest.raises(ValueError, match="b is a BatchNorm1d, whose statistics mix"):
            summed(model, squared, torch.randn(EXAMPLES, 5).double())

    @pytest.mark.parametrize("in_place", [True, False])
    def test_statistics_kept_in_the_model(self, in_place):
        """They would be released with the weights, neither clipped nor noised."""

        def watch(m, x):
            if in_place:
                m.seen.add_(x.detach().mean())
            else:
                m.seen = m.seen + x.detach().mean()
            return m.a(x)

        model = Net(watch, a=nn.Linear(5, 3))
        model.register_buffer("seen", torch.zeros(()).double())
        with pytest.raises(ValueError, match="seen: changes when the model runs"):
            summed(model, squared, torch.randn(EXAMPLES, 5).double())
        model.register_buffer("seen", torch.zeros(()).double(), persistent=False)
        summed(model, squared, torch.randn(EXAMPLES, 5).double())

    def test_examples_mixed_by_a_mean(self):
        model = Net(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(5, 3))
        with pytest.raises(ValueError, match="mixes examples"):
            summed(model, squared, torch.randn(EXAMPLES, 5).double())

    def test_a_loss_that_couples_examples(self):
        model = Net(lambda m, x: m.a(x), a=nn.Linear(5, 3))
        with pytest.raises(ValueError, match="mixes examples"):
            summed(
                model,
                lambda model, x: squared(model, x) / len(x),
                torch.randn(EXAMPLES, 5).double(),
            )

    def test_routing_over_examples(self):
        def route(m, x):
            flat = x.flatten(0, 1)
            first = flat[:, 0] > 0
            out = torch.zeros(len(flat), 3).double()
            out[first], out[~first] = m.a(flat[first]), m.b(flat[~first])
            return out.view(*x.shape[:2], 3)

        model = Net(route, a=nn.Linear(5, 3), b=nn.Linear(5, 3))
        with pytest.warns(UserWarning, match="one by one"):  # right, if slow
            assert_equal_sums(model, squared, torch.randn(EXAMPLES, 6, 5).double())

    def test_a_parameter_used_behind_its_modules_back(self):
        model = Net(lambda m, x: F.linear(m.a(x), m.b.weight), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
        with pytest.raises(ValueError, match=r"b\.weight: used outside of the module that owns it"):
            summed(model, squared, torch.randn(EXAMPLES, 6, 5).double())

    def test_a_mean_loss(self):
        model = Net(lambda m, x: m.a(x), a=nn.Linear(5, 3))
        with pytest.raises(ValueError, match="one value per example"):
            summed(model, lambda m, x: squared(m, x).mean(), torch.randn(EXAMPLES, 5).double())

    def test_not_a_number(self):
        model = Net(lambda m, x: m.a(x), a=nn.Linear(5, 3))
        batch = torch.randn(EXAMPLES, 5).double()
        batch[3, 2] = torch.nan
        with pytest.raises(NonFiniteGradient):
            summed(model, squared, batch)
        assert all(p.grad is None for p in model.parameters())

    def test_nothing_is_left_behind(self):
        model = gpt2()
        before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        summed(model, causal_hf, padded())
        after = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        assert before == after
        assert all(p.grad is None for p in model.parameters())
        causal_hf(model, padded()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def of_norm(model, loss, batch, bound=1.0):
    """Norm of the clipped sum of one hostile example, after a harmless first batch."""
    harmless, hostile = batch
    with PerExampleClipping(model, loss, bound, 16) as engine:
        engine.clipped_sum(harmless)
        return norm_of(engine.clipped_sum(hostile).values)


class Tied(nn.Module):
    """Looks rows up and multiplies by the same matrix."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(2000, 256)
        self.head = nn.Linear(256, 2000, bias=False)
        self.head.weight = self.rows.weight

    def forward(self, ids):
        return self.head(self.rows(ids))


@pytest.mark.usefixtures("seeded")
class TestHostileExamples:
    """One example that was made to slip through."""

    @pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
    def test_rows_that_cancel_do_not_hide_a_norm(self, scale):
        """Inner products of long rows round by more than the whole norm of their sum."""
        model = nn.Linear(256, 256, bias=False)

        def loss(model, batch):
            return (model(batch["x"]) - batch["y"]).square().sum((1, 2)) / 2

        x = scale * torch.randn(256).expand(8, 256) + 1e-2 * torch.randn(8, 256)
        residual = torch.randn(8, 256)
        y = model(x).detach() - residual + residual.mean(0)
        harmless = {"x": torch.randn(2, 8, 256), "y": torch.randn(2, 8, 256)}
        assert of_norm(model, loss, (harmless, {"x": x[None], "y": y[None]})) <= 1.0

    def test_tied_rows_that_cancel_make_no_number_that_is_none(self):
        def loss(model, batch):
            picked = model(batch["ids"]).gather(2, batch["at"][:, :, None])[:, :, 0]
            return (picked * batch["weight"]).sum(1)

        def batch(count, ids, at, weight):
            return {
                "ids": ids.expand(count, -1),
                "at": at.expand(count, -1),
                "weight": weight.expand(count, -1) * torch.arange(1, count + 1)[:, None],
            }

        norms = []
        for _ in range(12):
            ids, at = torch.randint(3, (2, 1, 8))
            weight = 1e3 * torch.randn(1, 8)
            ids[:, 4:], at[:, 4:] = at[:, :4], ids[:, :4]
            weight[:, 4:] = -weight[:, :4] * (1 + 1e-5 * torch.randn(1, 4))
            harmless = batch(2, torch.randint(50, (1, 8)), torch.randint(50, (1, 8)), torch.ones(8))
            norms.append(of_norm(Tied(), loss, (harmless, batch(1, ids, at, weight))))
        assert all(norm <= 1.0 for norm in norms)

    def test_routing_that_changes_after_the_check(self):
        """Thirty-two rows of one example must not pass for two rows of each of sixteen."""

        def route(m, x):
            flat = x.flatten(0, 1)
            out = torch.zeros(len(flat), 3).double()
            for layer, chosen in ((m.a, flat[:, 0] > 0), (m.b, flat[:, 0] <= 0)):
                at = chosen.nonzero()[:, 0]
                out = out.index_add(0, at, layer(flat[at]))
            return out.view(*x.shape[:2], 3)

        model = Net(route, a=nn.Linear(5, 3), b=nn.Linear(5, 3))
        even = torch.rand(2, 32, 5).double() + 0.1
        even[:, 16:, 0] *= -1
        one_alone = torch.rand(16, 32, 5).double() + 0.1
        one_alone[1:, :, 0] *= -1
        with pytest.raises(ValueError, match="otherwise for these examples"):
            of_norm(model, squared, (even, one_alone))


@pytest.mark.usefixtures("seeded")
class TestFirstBatch:
    """What the first batch cannot show must not be believed."""

    def test_one_example_shows_nothing(self):
        model = Net(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(5, 3))
        batch = torch.randn(EXAMPLES, 5).double()
        with PerExampleClipping(model, squared, 0.5, 16) as engine:
            engine.clipped_sum(batch[:1])
            with pytest.raises(ValueError, match="mixes examples"):
                engine.clipped_sum(batch)

    def test_two_copies_show_nothing_and_are_taken_one_by_one(self):
        model = Net(lambda m, x: m.a(x + x.sum(0)), a=nn.Linear(5, 3))
        batch = torch.randn(1, 5).double().expand(2, 5)
        one = summed(model, squared, batch[:1], 1e-3).values
        for a, b in zip(summed(model, squared, batch, 1e-3).values, one, strict=True):
            torch.testing.assert_close(a, 2 * b)

    def test_mixing_in_training_mode_alone(self):
        model = Net(lambda m, x: m.a(x - x.mean(0) if m.training else x), a=nn.Linear(5, 3))
        with pytest.raises(ValueError, match="mixes examples"):
            summed(model, squared, torch.randn(EXAMPLES, 5).double())

    @pytest.mark.parametrize("share", [0.05, 0.2])
    def test_a_little_mixing_under_autocast(self, share):
        model = Net(lambda m, x: m.a(x + share * x.mean(0)), a=nn.Linear(5, 3)).float()
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match="mixes examples"),
        ):
            summed(model, squared, torch.randn(EXAMPLES, 5))

    def test_behind_a_gate_that_begins_closed(self):
        """Tokens first: rows of one example are taken for rows of another."""

        def tokens_first(m, x):
            rows = m.a(x.transpose(0, 1).reshape(-1, 5)).view(-1, len(x), 3)
            return m.gate(rows.transpose(0, 1).contiguous())

        model = Net(tokens_first, a=nn.Linear(5, 3), gate=nn.Linear(3, 3))
        nn.init.zeros_(model.gate.weight)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="mixes examples"):
            summed(model, squared, torch.randn(EXAMPLES, 6, 5).double())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    @pytest.mark.filterwarnings("error")
    def test_dropout_is_no_mixing(self):
        model = Net(
            lambda m, x: F.dropout(m.d(m.a(x)), 0.5, m.training), a=nn.Linear(5, 3), d=nn.Dropout()
        )
        assert summed(model, squared, torch.randn(EXAMPLES, 5).double()).examples == EXAMPLES

    def test_rows_renormalised_when_looked_up(self):
        model = Net(lambda m, x: m.a(m.e(x)), e=nn.Embedding(8, 5, max_norm=1.0), a=nn.Linear(5, 2))
        model.e.requires_grad_(False)
        with pytest.raises(ValueError, match="e renormalises the rows"):
            summed(model, squared, torch.randint(8, (EXAMPLES, 9)))

    def test_weights_set_from_the_data(self):
        def initialise(m, x):
            if not hasattr(m, "begun"):
                m.begun = True
                m.a.bias.data.copy_(-x.detach().mean((0, 1)))
            return m.a(x)

        model = Net(initialise, a=nn.Linear(5, 5))
        with pytest.raises(ValueError, match=r"a\.bias: changes when the model runs"):
            summed(model, squared, torch.randn(EXAMPLES, 6, 5).double())

    def test_hooks_that_would_see_single_gradients(self):
        model = Net(lambda m, x: m.a(x), a=nn.Linear(5, 3))
        model.a.weight.register_post_accumulate_grad_hook(lambda p: None)
        with pytest.raises(ValueError, match=r"a\.weight has a gradient hook"):
            summed(model, squared, torch.randn(EXAMPLES, 5).double())


@pytest.mark.usefixtures("seeded")
class TestMemory:
    """What a GPU does when its memory runs out, played on a CPU."""

    def test_the_microbatch_is_halved_until_it_fits(self, monkeypatch):
        model, batch = gpt2(), padded()
        expected = summed(model, causal_hf, batch)
        norms = Book.squared_norms

        def run_out(book):
            if book.examples > 2:
                raise torch.OutOfMemoryError
            return norms(book)

        monkeypatch.setattr(Book, "squared_norms", run_out)
        got = summed(model, causal_hf, batch, microbatch=8)
        assert (got.examples, got.unclipped) == (expected.examples, expected.unclipped)
        for a, b in zip(got.values, expected.values, strict=True):
            torch.testing.assert_close(a, b)

    def test_half_a_sum_is_never_begun_again(self, monkeypatch):
        """Trying again would add to the first parameters twice: twice the sensitivity."""
        add, calls = Account.add_weighted, []

        def run_out(account, *args):
            calls.append(account)
            if len(calls) == 5:
                raise torch.OutOfMemoryError
            return add(account, *args)

        monkeypatch.setattr(Account, "add_weighted", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            summed(gpt2(), causal_hf, padded())


@pytest.mark.usefixtures("seeded")
class TestRules:
    def norms(self, model, batch, clipping):
        return [norm_of(summed(model, causal_hf, one, clipping).values) for one in split(batch, 1)]

    @pytest.mark.parametrize(
        "clipping", [FlatClipping(0.3), PerLayerClipping(0.3), AutomaticClipping(0.3)]
    )
    @pytest.mark.parametrize("autocast", [False, True])
    def test_no_norm_exceeds_the_bound(self, clipping, autocast):
        model, batch = gpt2().float(), padded()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            norms = self.norms(model, batch, clipping)
        assert max(norms) <= 0.3
        assert max(norms) > 0.1

    def test_sums_in_bfloat16_are_those_of_single_precision_but_for_rounding(self):
        model, batch = gpt2().float(), padded()
        exact = summed(model, causal_hf, batch).values
        with torch.autocast("cpu", torch.bfloat16):
            rounded = summed(model, causal_hf, batch)
        error = torch.sqrt(
            sum((a - b).square().sum() for a, b in zip(exact, rounded.values, strict=True))
        )
        assert 0 < error < 0.1 * torch.sqrt(sum(a.square().sum() for a in exact))
        assert all(v.dtype == torch.float64 for v in rounded.values)

    def test_layers_keep_their_share(self):
        model, batch = gpt2(), padded()
        for one in split(batch, 1):
            values = summed(model, causal_hf, one, PerLayerClipping(0.01)).values
            share = 0.01 / len(values) ** 0.5
            assert all(v.norm() <= share for v in values)
            assert sum(bool(v.norm() > 0.99 * share) for v in values) > len(values) / 2

    def test_automatic_clipping_normalises(self):
        model, batch = gpt2(), padded()
        flat = summed(model, causal_hf, select(batch, torch.tensor([0])), 1e6).values
        norm = torch.sqrt(sum(v.square().sum() for v in flat))
        auto = summed(
            model, causal_hf, select(batch, torch.tensor([0])), AutomaticClipping(0.3, 0.02)
        ).values
        for a, b in zip(auto, flat, strict=True):
            torch.testing.assert_close(a, b * 0.3 * (1 - ROUNDING_MARGIN) / (norm + 0.02))

    def test_examples_below_the_bound_are_counted(self):
        model, batch = gpt2(), padded()
        norms = sorted(self.norms(model, batch, FlatClipping(1e6)))
        bound = (norms[2] + norms[3]) / 2
        got = summed(model, causal_hf, batch, bound)
        assert (got.examples, got.unclipped) == (size(batch), 3)

    def test_sums_hold_no_graph(self):
        values = summed(gpt2(), causal_hf, padded()).values
        assert not any(v.requires_grad for v in values)

    def test_an_empty_batch_is_a_sum_of_zero(self):
        model = gpt2()
        got = summed(model, causal_hf, select(padded(), torch.zeros(0, dtype=torch.long)))
        assert got.examples == 0
        assert all((v == 0).all() for v in got.values)
