"""The training loop against a plain one, its determinism, and what a loop that is left leaves behind."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

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
    ({"seed": None}, "seed must be an integer, got None"),
    ({"images": IMAGES.numpy()}, "images must be a torch tensor, got ndarray"),
    ({"images": IMAGES[:0]}, "images must not be empty"),
    ({"images": IMAGES / 0}, "images must be finite"),
    ({"labels": LABELS[:-1]}, r"labels must be an int64 tensor of shape \(50,\), got torch.int64 \(49,\)"),
    ({"labels": LABELS.float()}, r"labels must be an int64 tensor of shape \(50,\), got torch.float32 \(50,\)"),
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
