"""An update goes into a vector and comes back, and no other model's tensors pass for it."""

import pytest
import torch
from torch import nn

from privlm.federated import Layout, UnexpectedTensors, gradient_update
from privlm.models import TinyConfig, TinyDecoder, per_example_loss
from protocols.aggregation import Cohort, additive
from protocols.errors import WrongSession
from protocols.fixed_point import FixedPoint
from protocols.randomness import Stream
from protocols.ring import Z_2_64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def batch(generator):
    """Three examples of different lengths."""
    ids_BT = torch.randint(0, 23, (3, 8), generator=generator)
    return ids_BT, torch.arange(8) < torch.tensor([[8], [5], [3]])


@pytest.fixture
def tensors(generator):
    return {
        "matrix": torch.randn(2, 3, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
        "vector": torch.randn(5, generator=generator),
    }


def tiny(generator, tied=False) -> TinyDecoder:
    config = TinyConfig(
        vocab_size=23, context=8, width=16, layers=2, heads=2, tied_head=tied, image_channels=1
    )
    return TinyDecoder(config, generator)


class TestLayout:
    def test_there_and_back(self, tensors):
        layout = Layout.of(tensors)
        shuffled = dict(reversed(tensors.items()))
        vector_P = layout.flatten(shuffled)
        assert vector_P.shape == (layout.length,) == (12,)
        back = layout.unflatten(vector_P)
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(back[name], tensor)
            assert torch.equal(vector_P[layout.slices[name]], tensor.reshape(-1))

    def test_a_round_of_one_layout_takes_no_update_of_another(self, tensors):
        """Of one length, they would be summed entry by entry: the cohort's context tells."""

        def cohort(layout):
            return Cohort(
                session=b"session of tests",
                clients=("a", "b"),
                servers=("s", "t"),
                collector="c",
                length=layout.length,
                encoding=FixedPoint(clip=1.0, bits=16, clients=2, ring=Z_2_64),
                min_clients=2,
                context=bytes.fromhex(layout.digest),
            )

        ours = cohort(Layout.of(tensors))
        theirs = cohort(Layout.of(dict(reversed(tensors.items()))))
        stream = Stream(bytes(32), "test")
        upload, _ = additive.Client("a", theirs, torch.zeros(12), stream).start()
        for description, error in ((theirs, None), (ours, WrongSession)):
            server = additive.Server("s", description, stream)
            server.start()
            if error is None:
                assert server.receive("a", upload.data) == []
            else:
                with pytest.raises(error):
                    server.receive("a", upload.data)

    def test_the_vector_is_a_copy_and_its_tensors_are_not(self, tensors):
        layout = Layout.of({"matrix": tensors["matrix"]})
        vector_P = layout.flatten({"matrix": tensors["matrix"]})
        layout.unflatten(vector_P)["matrix"].zero_()
        assert vector_P.tolist() == [0.0] * 6
        assert tensors["matrix"].abs().min() > 0

    def test_strides_do_not_matter(self, tensors):
        transposed = tensors["matrix"].T.contiguous().T
        assert not transposed.is_contiguous()
        layout = Layout.of({"matrix": transposed})
        assert torch.equal(
            layout.flatten({"matrix": transposed}), layout.flatten({"matrix": tensors["matrix"]})
        )

    def test_types_are_widened(self):
        pair = {"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.float64)}
        assert Layout.of(pair).flatten(pair).dtype == torch.float64

    def test_gradients_are_cut_off(self):
        weight = torch.ones(3, requires_grad=True)
        assert not Layout.of({"w": weight}).flatten({"w": weight}).requires_grad

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: t.pop("scalar"), r"missing: \['scalar'\]; unknown: none"),
            (lambda t: t.update(more=torch.ones(1)), r"missing: none; unknown: \['more'\]"),
            (lambda t: t.update(matrix=torch.ones(3, 2)), r"matrix has shape \(3, 2\)"),
            (lambda t: t.update(vector=torch.ones(5, dtype=torch.int64)), "vector holds"),
        ],
    )
    def test_other_tensors_are_refused(self, tensors, change, words):
        layout = Layout.of(tensors)
        change(tensors)
        with pytest.raises(UnexpectedTensors, match=words):
            layout.flatten(tensors)

    def test_other_vectors_are_refused(self, tensors):
        layout = Layout.of(tensors)
        for vector in (torch.ones(11), torch.ones(13), torch.ones(12, 1)):
            with pytest.raises(UnexpectedTensors, match="shape"):
                layout.unflatten(vector)
        with pytest.raises(UnexpectedTensors, match="int64"):
            layout.unflatten(torch.ones(12, dtype=torch.int64))
        with pytest.raises(UnexpectedTensors, match="scalar holds"):
            Layout.of({"scalar": torch.ones((), dtype=torch.int32)})

    def test_a_layout_that_cannot_be_is_refused(self):
        for names, shapes in ((("a",), ()), (("a", "a"), ((1,), (1,))), (("a",), ((-1,),))):
            with pytest.raises(ValueError, match="names|name|negative"):
                Layout(names, shapes)
        assert Layout((), ()).flatten({}).shape == (0,)

    def test_the_digest_tells_layouts_apart(self, tensors):
        layout = Layout.of(tensors)
        others = (
            dict(reversed(tensors.items())),
            tensors | {"matrix": torch.ones(3, 2)},
            {name: tensor for name, tensor in tensors.items() if name != "empty"},
            {name.upper(): tensor for name, tensor in tensors.items()},
        )
        digests = {layout.digest, *(Layout.of(other).digest for other in others)}
        assert len(digests) == 5
        assert Layout.of({name: tensor + 1 for name, tensor in tensors.items()}) == layout


class TestGradientUpdate:
    @pytest.mark.parametrize("tied", [False, True])
    def test_it_is_the_mean_of_the_examples_gradients(self, generator, batch, tied):
        model = tiny(generator, tied).double()
        ids_BT, mask_BT = batch
        update = gradient_update(model, ids_BT, mask_BT)
        assert list(update) == [name for name, _ in model.named_parameters()]
        assert ("head.weight" in update) is not tied
        for row in range(3):
            ids, mask = ids_BT[row : row + 1], mask_BT[row : row + 1]
            per_example_loss(model(ids), ids, mask).sum().backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 3
            torch.testing.assert_close(update[name], expected, rtol=1e-10, atol=1e-12)
            assert not update[name].requires_grad

    def test_the_model_stays_as_it_was(self, generator, batch):
        model = tiny(generator).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = torch.ones_like(model.head.weight)
        model.head.weight.grad = kept
        with torch.no_grad():
            update = gradient_update(model, *batch)
        assert update["head.weight"].abs().max() > 0
        assert model.training
        assert model.head.weight.grad is kept
        assert torch.equal(kept, torch.ones_like(kept))
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
        assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())

    def test_frozen_parameters_are_left_out(self, generator, batch):
        model = tiny(generator)
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter"):
            gradient_update(model, *batch)
        model.blocks[1].requires_grad_(True)
        update = gradient_update(model, *batch)
        assert update
        assert all(name.startswith("blocks.1.") for name in update)

    def test_any_module_that_returns_logits_will_do(self, batch):
        class Bigram(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(23, 23)
                self.unused = nn.Parameter(torch.ones(2))

            def forward(self, ids_BT):
                return self.table(ids_BT)

        update = gradient_update(Bigram(), *batch)
        assert update["table.weight"].abs().max() > 0
        assert update["unused"].tolist() == [0.0, 0.0]

    def test_no_example_is_refused(self, generator, batch):
        ids_BT, mask_BT = batch
        with pytest.raises(ValueError, match="at least one example"):
            gradient_update(tiny(generator), ids_BT[:0], mask_BT[:0])


def test_updates_go_through_a_round(generator, batch):
    """The sum of the clients' gradients comes back, tensor by tensor, to within the rounding."""
    model, (ids_BT, mask_BT) = tiny(generator), batch
    updates = [gradient_update(model, ids_BT[[c]], mask_BT[[c]]) for c in range(3)]
    layout = Layout.of(updates[0])
    encoding = FixedPoint(clip=4.0, bits=24, clients=3, ring=Z_2_64)
    cohort = Cohort(
        session=bytes(16),
        clients=("a", "b", "c"),
        servers=("s", "t"),
        collector="collector",
        length=layout.length,
        encoding=encoding,
        min_clients=3,
    )
    updates_KP = torch.stack([layout.flatten(update) for update in updates])
    stream = Stream(bytes(range(32)), "round")
    result, _ = additive.run_round(cohort, updates_KP, dict.fromkeys(cohort.parties, stream))
    for name, total in layout.unflatten(result.sum_P).items():
        expected = sum(update[name].double() for update in updates)
        assert (total - expected).abs().max() <= 3 * encoding.max_rounding_error
