"""The training loop against a plain one, its determinism, and what a loop that is left leaves behind."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qlab import digits
from qlab.training import Step, evaluating, train

IMAGES = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES[:, 0] > IMAGES[:, 1]).long()


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(model, *, steps=None, watch=lambda model: None, **changes):
    for step in train(model, IMAGES, LABELS, **{"epochs": 3, "lr": 0.05, "seed": 1, "batch_size": 16} | changes):
        watch(model)
        if step.step == steps:
            break
    return model.state_dict()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_steps_are_counted():
    steps = list(train(network(), IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16))
    assert [(s.step, s.steps) for s in steps] == [(i, 12) for i in range(1, 13)]  # 50 images: 4 batches of at most 16
    assert all(isinstance(s, Step) and isinstance(s.loss, float) for s in steps)


def test_losses_and_weights_equal_those_of_a_plain_loop():
    model, expected = network(), network()
    losses = [s.loss for s in train(model, IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16)]
    optimizer = torch.optim.Adam(expected.parameters())
    shuffler = torch.Generator().manual_seed(1)
    batches = [batch for _ in range(3) for batch in torch.randperm(50, generator=shuffler).split(16)]
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * i / len(batches))) / 2
        loss = cross_entropy(expected.train()(IMAGES[batch]), LABELS[batch])
        assert losses[i] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-5)


def test_every_image_is_seen_once_an_epoch():
    seen = []
    model = network()
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trained(model, epochs=2)
    assert len(seen.pop(0)) == 1  # to see that the model takes such images
    for epoch in (torch.cat(seen[:4]), torch.cat(seen[4:])):
        torch.testing.assert_close(epoch.sort(0).values, IMAGES.sort(0).values, rtol=0, atol=0)
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


def test_a_seed_decides():
    assert_equal(trained(network(), seed=3), trained(network(), seed=3))
    assert not torch.equal(trained(network(), seed=3)["0.weight"], trained(network(), seed=4)["0.weight"])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    trained(network())
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring_on_the_way_changes_nothing():
    def watch(model):
        assert not any(module.training for module in model.modules())
        model(torch.rand(5, 6))

    assert_equal(trained(network(), watch=watch), trained(network()))


def test_the_model_can_be_used_after_the_loop_is_left():
    model = network()
    weights = trained(model, steps=5)
    assert not any(module.training for module in model.modules())
    assert not torch.equal(weights["0.weight"], network().state_dict()["0.weight"])
    assert not torch.equal(weights["0.weight"], trained(network())["0.weight"])


def test_parameters_without_gradient_stay():
    model = network()
    model[0].requires_grad_(False)
    weights = trained(model)
    assert torch.equal(weights["0.weight"], network()[0].weight)
    assert not torch.equal(weights["3.weight"], network()[3].weight)


class Failing(nn.Module):
    """Raises at one call, in the middle of a step."""

    def __init__(self, call, error):
        super().__init__()
        self.linear, self.dropout, self.left, self.error = nn.Linear(6, 2), nn.Dropout(), call, error

    def forward(self, x):
        self.left -= 1
        if not self.left:
            raise self.error
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_modes_as_they_were(call, error):
    model = Failing(call, error)
    model.dropout.eval()
    model.linear.bias.requires_grad_(False)
    modes = [True, True, False]
    with pytest.raises((error, ValueError)):
        for _ in train(model, IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16):
            modes = [False, False, False]  # between the steps
    assert [module.training for module in model.modules()] == modes == [call <= 2, call <= 2, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model, weights = network(), {}
    with pytest.raises(ValueError, match=r"lr must let the loss stay finite, got a loss of (nan|inf) with lr=1e\+30"):
        trained(model, lr=1e30, watch=lambda model: weights.update(copy.deepcopy(model.state_dict())))
    assert_equal({n: p for n, p in model.named_parameters()}, {n: weights[n] for n, _ in model.named_parameters()})


def test_what_is_around_the_training_does_not_matter():
    images = IMAGES.clone().requires_grad_()
    model = network()
    with torch.no_grad():
        for _ in train(model, images, LABELS, epochs=np.int64(3), lr=0.05, seed=np.uint8(1), batch_size=np.int32(16)):
            pass
    assert_equal(model.state_dict(), trained(network()))
    assert images.grad is None


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("model, change, message", [
    (Two(6, 2), {}, r"model must return one logit for each class.*\(1, 2 or more\), got tuple"),
    (nn.Sequential(nn.Linear(6, 2), nn.Unflatten(1, (2, 1))), {}, r"got torch.float32 of shape \(1, 2, 1\)"),
    (nn.Linear(6, 2), {"labels": LABELS + 1}, r"\(1, 3 or more\), got torch.float32 of shape \(1, 2\)"),
    (nn.Linear(6, 2), {"labels": LABELS - 100}, "labels must be classes, from 0 on, got -100"),
    (nn.Linear(6, 2), {"images": IMAGES.double()}, r"images must be what .*, got shape \(1, 6\) and torch.f"),
    (nn.Linear(6, 2), {"images": torch.tensor(1.0), "labels": torch.tensor(0)}, r"got shape \(\)"),
    (nn.Linear(6, 2).requires_grad_(False), {}, "parameters that require gradients, got none in Linear"),
    (nn.ReLU(), {}, "model must have parameters that require gradients, got none in ReLU"),
    (nn.Linear(6, 2).to("meta"), {}, "images must be what the model takes"),
])
def test_models_that_cannot_be_trained_are_refused_at_once(model, change, message):
    arguments = {"images": IMAGES, "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        train(model, **arguments, epochs=1, lr=0.1, seed=0)
    if "gradients" not in message:
        with pytest.raises(ValueError, match=message.replace("(1, ", "(50, ")):
            digits.accuracy(model, **arguments)
    assert all(module.training for module in model.modules())


def test_a_progress_bar_knows_the_end(capsys):
    training = train(network(), IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16)
    assert len(training) == 12
    assert next(training).step == 1
    for _ in tqdm(training):
        pass
    assert "/12" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
    ({"epochs": 1.5}, "epochs must be an integer of at least 1, got 1.5"),
    ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
    ({"lr": 0}, "lr must be more than 0 and finite, got 0"),
    ({"lr": math.nan}, "lr must be more than 0 and finite, got nan"),
    ({"lr": math.inf}, "lr must be more than 0 and finite, got inf"),
    ({"lr": "0.1"}, "lr must be more than 0 and finite, got '0.1'"),
    ({"seed": -1}, "seed must be an integer from 0 to 9223372036854775807, got -1"),
    ({"seed": None}, "seed must be an integer from 0 to 9223372036854775807, got None"),
    ({"images": IMAGES.numpy()}, "images must be a torch tensor, got ndarray"),
    ({"images": IMAGES[:0]}, "images must not be empty"),
    ({"images": IMAGES / 0}, "images must be finite"),
    ({"labels": LABELS[:-1]}, r"labels must be an int64 tensor of shape \(50,\), got torch.int64 of shape \(49,\)"),
    ({"labels": LABELS.float()}, r"labels must be .* of shape \(50,\), got torch.float32 of shape \(50,\)"),
    ({"labels": LABELS.tolist()}, r"labels must be an int64 tensor of shape \(50,\), got list"),
])
def test_bad_arguments_are_refused_before_the_first_step(change, message):
    arguments = {"images": IMAGES, "labels": LABELS, "epochs": 1, "lr": 0.1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        train(network(), arguments.pop("images"), arguments.pop("labels"), **arguments)


def test_evaluating_restores_each_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()
