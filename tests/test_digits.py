"""The digits, the network and its checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn

from qlab import digits, samples


@pytest.fixture(scope="module")
def data():
    return digits.data()


def test_images_and_labels_are_those_of_scikit_learn(data):
    pixels, labels = load_digits(return_X_y=True)
    images = torch.cat([data.train_images, data.test_images])
    ours = np.column_stack([16 * images.flatten(1).numpy(), torch.cat([data.train_labels, data.test_labels])])
    theirs = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_shapes_and_types(data):
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == data.test_images.dtype == torch.float32
    assert data.train_labels.shape == (1437,) and data.test_labels.shape == (360,)
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_images.min() == 0 and data.train_images.max() == 1


def test_the_split_is_fixed_and_stratified(data):
    for a, b in zip(data, digits.data(), strict=True):
        assert torch.equal(a, b)
    shares = data.test_labels.bincount() / torch.cat([data.train_labels, data.test_labels]).bincount()
    assert len(shares) == 10 and ((shares - 360 / 1797).abs() < 0.005).all()
    assert data.test_labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]


def test_the_network_is_a_named_sequential():
    model = digits.Net()
    assert type(model) is nn.Sequential
    assert [name for name, m in model.named_children() if isinstance(m, nn.Conv2d | nn.Linear)] == [
        "conv", "depthwise1", "pointwise1", "depthwise2", "pointwise2", "depthwise3", "pointwise3", "linear"]
    for name, conv in model.named_children():
        if isinstance(conv, nn.Conv2d):
            assert isinstance(model.get_submodule(f"{name}_norm"), nn.BatchNorm2d)
            assert isinstance(model.get_submodule(f"{name}_relu"), nn.ReLU6)
            assert conv.groups == (conv.in_channels if name.startswith("depthwise") else 1)
            assert conv.kernel_size == ((1, 1) if name.startswith("pointwise") else (3, 3))
            assert conv.stride == ((2, 2) if name == "depthwise2" else (1, 1))
    assert model.eval()(torch.rand(5, 1, 8, 8)).shape == (5, 10)
    assert model[:-3](torch.rand(5, 1, 8, 8)).shape == (5, 64, 4, 4)


def test_the_checkpoint(data):
    path = Path(samples.path("digits_cnn.safetensors"))
    assert path.stat().st_size <= 100_000
    model = digits.load()
    assert not any(module.training for module in model.modules())
    state, stored = model.state_dict(), load_file(path)
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    assert digits.accuracy(model, data.test_images, data.test_labels) >= 98
    assert digits.accuracy(model, data.train_images, data.train_labels) >= 99.5


def test_accuracy_equals_scikit_learn(data):
    torch.manual_seed(0)
    model = digits.Net()
    running_mean = model.conv_norm.running_mean.clone()
    percent = digits.accuracy(model, data.test_images, data.test_labels)
    assert model.training and torch.equal(model.conv_norm.running_mean, running_mean)
    expected = accuracy_score(data.test_labels, model.eval()(data.test_images).argmax(1))
    assert percent == pytest.approx(100 * expected) and isinstance(percent, float)


@pytest.mark.parametrize("images, labels, message", [
    (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "images must not be empty"),
    (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), r"labels must be an int64 tensor of shape \(2,\)"),
])
def test_accuracy_refuses_what_does_not_fit(images, labels, message):
    with pytest.raises(ValueError, match=message):
        digits.accuracy(digits.load(), images, labels)


def test_the_command_trains_and_writes_a_checkpoint(tmp_path, monkeypatch, capsys, data):
    path, threads = tmp_path / "short.safetensors", torch.get_num_threads()
    monkeypatch.setattr(digits, "_CHECKPOINT", path)
    monkeypatch.setattr(digits, "_EPOCHS", 2)
    written = []
    try:
        for _ in range(2):
            digits.main()
            written.append(path.read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1]
    percent = digits.accuracy(digits.load(), data.test_images, data.test_labels)
    assert 50 < percent < 98.4
    assert f"{percent:.2f} % of 360 test images right" in capsys.readouterr().out
