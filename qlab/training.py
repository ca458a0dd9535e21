"""Training a classifier one optimizer step at a time, so that a notebook can watch it, draw it and stop it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from qlab.affine import check_integer, described, is_number, real_array


class Step(NamedTuple):
    """Where a training stands: optimizer steps done, of how many, and the loss of the last mini-batch in nats."""

    step: int
    steps: int
    loss: float


def train(model, images, labels, *, epochs, lr, seed, batch_size=64):
    """Train a classifier in place with Adam; the learning rate falls from ``lr`` to 0 along half a cosine.

    At each step the model is in eval mode, so that you can measure it on the way. Leave the loop to stop early: the
    model keeps the weights it has.

    Parameters
    ----------
    model : nn.Module
        Maps images to one logit for each class. Its parameters that require gradients are trained.
    images : float tensor, shape (N, ...)
    labels : int64 tensor, shape (N,)
        The class of each image, from 0.
    epochs : int, ≥ 1
        Times that each image is seen.
    lr : float, > 0
        Learning rate to begin with.
    seed : int, ≥ 0
        Of the order of the images. The initial weights are the model's own.
    batch_size : int, ≥ 1

    Returns
    -------
    iterator of Step
        One after each optimizer step. It has a length, so that ``tqdm(train(...))`` knows the end.

    Raises
    ------
    ValueError
        If the images are empty or hold a NaN or infinity, the labels do not fit them, the model does not map images to
        logits of these classes or has nothing to train, or a number is out of range. Later, before the weights change:
        if the loss is NaN or infinite.

    References
    ----------
    Kingma and Ba 2015, "Adam: a method for stochastic optimization"; Loshchilov and Hutter 2017, "SGDR: stochastic
    gradient descent with warm restarts", equation 5 (one run of it).

    Examples
    --------
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> model = torch.nn.Linear(1, 2)
    >>> for step in train(model, x, torch.tensor([0, 1]), epochs=100, lr=0.1, seed=0):
    ...     pass
    >>> step.step, step.steps, step.loss < 0.1
    (100, 100, True)
    """
    check_labelled(images, labels)
    epochs, batch_size = check_integer(epochs, "epochs", 1), check_integer(batch_size, "batch_size", 1)
    if not is_number(lr) or not 0 < lr < float("inf"):
        raise ValueError(f"lr must be more than 0 and finite, got {lr!r}")
    shuffler = torch.Generator().manual_seed(check_integer(seed, "seed", 0, 2**63 - 1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"model must have parameters that require gradients, got none in {type(model).__name__}")
    with evaluating(model):
        logits(model, images[:1], labels)
    images, steps = images.detach(), epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def learn(batch):
        model.train()
        with torch.enable_grad():
            loss = cross_entropy(model(images[batch]), labels[batch])
        if not loss.isfinite():
            raise ValueError(f"lr must let the loss stay finite, got a loss of {loss.item()} with lr={lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    def run():
        step = 0
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=shuffler).split(batch_size):
                with _modes_kept(model):
                    loss = learn(batch)
                model.eval()
                step += 1
                yield Step(step, steps, loss)

    return Steps(run(), steps)


class Steps(Iterator):
    """A generator with a length, so that tqdm knows the end.

    Parameters
    ----------
    generator : generator
    length : int
        How many items it gives.

    Examples
    --------
    >>> len(Steps(iter("abc"), 3))
    3
    """

    def __init__(self, generator, length):
        self._generator, self._length = generator, length

    def __next__(self):
        return next(self._generator)

    def __len__(self):
        return self._length


@contextmanager
def evaluating(model):
    """Inside the ``with``, the model is in eval mode and no gradients are kept; afterwards all is as it was."""
    with _modes_kept(model), torch.no_grad():
        model.eval()
        yield


def read(model, images):
    """The output of the model for the images; a ValueError if it takes others."""
    try:
        return model(images)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"images must be what the model takes, got shape {tuple(images.shape)} and {images.dtype}: "
                         f"{error}") from error


def logits(model, images, labels):
    """The output of the model for the images; a ValueError unless they are finite logits, one for each class."""
    found = read(model, images)
    classes = int(labels.max()) + 1
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(images) or found.shape[1] < classes:
        raise ValueError(f"model must return one logit for each class, as the labels ask for shape ({len(images)}, "
                         f"{classes} or more), got {described(found)}")
    return real_array(found, "logits of the model")


def check_labelled(images, labels):
    """A ValueError unless ``images`` are finite, at least one, and ``labels`` holds a class for each."""
    check_images(images)
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.layout != torch.strided or (
            labels.shape != images.shape[:1]):
        raise ValueError(f"labels must be an int64 tensor of shape {tuple(images.shape[:1])}, got {described(labels)}")
    if labels.is_meta or labels.min() < 0:
        raise ValueError(f"labels must be classes, from 0 on, got {labels.min()}")


def check_images(images):
    """A ValueError unless ``images`` is a finite tensor with at least one axis and one image."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images must be a torch tensor, got {type(images).__name__}")
    if images.ndim == 0 or images.is_meta or images.layout != torch.strided:
        raise ValueError(f"images must be what the model takes, got shape {tuple(images.shape)} on {images.device}, "
                         f"{images.layout}")
    real_array(images.detach(), "images")


@contextmanager
def _modes_kept(model):
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
