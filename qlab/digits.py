"""A small real network: depthwise-separable convolutions that read handwritten digits, at 98 % on new ones.

``python -m qlab.digits`` trains it again and writes the checkpoint that `load` reads.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from qlab import samples
from qlab.training import check_labelled, evaluating, logits, train

_CHECKPOINT = samples.FOLDER / "digits_cnn.safetensors"
_TEST_IMAGES = 360
_SEED = 0
_EPOCHS, _LR = 30, 0.01  # chosen on a fifth of the training images that was held out, not on the test images


class Data(NamedTuple):
    """Images, float32 of shape (N, 1, 8, 8) in 0…1, and their labels, int64 of shape (N,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def data():
    """The 1,797 handwritten digits of scikit-learn in a fixed split, stratified by class.

    Returns
    -------
    Data
        1,437 images to train and to calibrate with, 360 to test with.

    References
    ----------
    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI Machine Learning Repository.

    Examples
    --------
    >>> _, _, images, labels = data()
    >>> images.shape, labels[:8].tolist()
    (torch.Size([360, 1, 8, 8]), [7, 6, 3, 7, 7, 3, 2, 8])
    """
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=_TEST_IMAGES, stratify=labels, random_state=0)
    return Data(train_images, train_labels, test_images, test_labels)


def Net():
    """The network, with initial weights from torch's global generator: 5,546 parameters.

    A 3 × 3 convolution, then three times a depthwise 3 × 3 and a pointwise 1 × 1 one, each with batch norm and ReLU6;
    the second depthwise one halves height and width. The mean over what is left and a linear layer give the logits.

    Returns
    -------
    nn.Sequential
        Maps (N, 1, 8, 8) to (N, 10). Its children are named: "conv", "conv_norm", "conv_relu", "depthwise1",
        "depthwise1_norm", … "pool", "flatten", "linear".

    References
    ----------
    Howard et al. 2017, "MobileNets: efficient convolutional neural networks for mobile vision applications",
    section 3.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in Net().parameters())
    5546
    """
    children = OrderedDict()

    def add(name, inputs, outputs, *, size, stride=1, groups=1):
        children[name] = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
        children[f"{name}_norm"] = nn.BatchNorm2d(outputs)
        children[f"{name}_relu"] = nn.ReLU6()

    add("conv", 1, 16, size=3)
    for i, (inputs, outputs, stride) in enumerate([(16, 32, 1), (32, 32, 2), (32, 64, 1)], 1):
        add(f"depthwise{i}", inputs, inputs, size=3, stride=stride, groups=inputs)
        add(f"pointwise{i}", inputs, outputs, size=1)
    children["pool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten()
    children["linear"] = nn.Linear(64, 10)
    return nn.Sequential(children)


def load():
    """The trained `Net`, in eval mode.

    Examples
    --------
    >>> _, _, images, labels = data()
    >>> print(f"{accuracy(load(), images, labels):.1f} %")
    98.6 %
    """
    model = Net()
    model.load_state_dict(load_file(_CHECKPOINT))
    return model.eval()


def accuracy(model, images, labels):
    """Share of the images whose largest logit is that of their label.

    Parameters
    ----------
    model : nn.Module
        Maps images to one logit for each class. It runs in eval mode, on all images as one batch.
    images : float tensor, shape (N, ...)
    labels : int64 tensor, shape (N,)

    Returns
    -------
    float
        In percent.

    Raises
    ------
    ValueError
        If the images are empty or hold a NaN or infinity, or labels or model do not fit them.

    Examples
    --------
    >>> accuracy(nn.Identity(), torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    50.0
    """
    check_labelled(images, labels)
    with evaluating(model):
        return 100 * (logits(model, images, labels).argmax(1) == labels).double().mean().item()


def main():
    """Train the network and write the checkpoint."""
    torch.set_num_threads(1)  # sums in a fixed order: the same bits at every run on one machine
    torch.manual_seed(_SEED)
    train_images, train_labels, test_images, test_labels = data()
    model = Net()
    with tqdm(train(model, train_images, train_labels, epochs=_EPOCHS, lr=_LR, seed=_SEED)) as bar:
        for step in bar:
            bar.set_postfix(loss=f"{step.loss:.4f}")
    save_file(model.state_dict(), _CHECKPOINT)
    percent = accuracy(load(), test_images, test_labels)
    print(f"{percent:.2f} % of {len(test_images)} test images right; {_CHECKPOINT.stat().st_size} bytes written")


if __name__ == "__main__":
    main()
