"""Lesson 04's table: PTQ against QAT, over schemes, bits and seeds. ``python -m qlab.studies.qat`` makes it again.

The command trains the network of `qlab.digits` further, once for each scheme, number of bits and seed, and writes
``qat_study.json`` beside the samples: some minutes on two cores. The lesson loads that file and repeats one row.
"""

import json
import platform
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm

from qlab import digits, ptq, qat, samples
from qlab.training import train

BITS, SEEDS = (4, 3, 2), range(5)
EPOCHS, LR = 20, 0.01  # chosen on a fifth of the training images that was held out, not on the test images
_FILE = samples.FOLDER / "qat_study.json"


def subset(seed):
    """256 of the training images, to calibrate with."""
    images = digits.data().train_images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:256]]


def after_training(bits, seed, calibrator, model=None):
    """Test accuracy in percent of static PTQ per tensor; of the shipped network unless another is given."""
    model = ptq.fold_batch_norm(digits.load()) if model is None else model
    ranges = ptq.calibrate(ptq.observe(model, subset(seed)), bits, calibrator)
    quantized = ptq.quantize_static(model, ranges, weight_bits=bits, activation_bits=bits, weight_range=calibrator)
    return _accuracy(quantized)


def aware(bits, seed, scheme, change=None):
    """Test accuracy in percent after training on with quantizers in place: integer zero-points, float biases."""
    model = qat.prepare(ptq.fold_batch_norm(digits.load()), scheme, subset(seed), weight_bits=bits,
                        activation_bits=bits)
    if change:
        change(model, bits, seed)
    _train(model, seed)
    return _accuracy(qat.convert(model))


def weights_of_lsq(model, bits, seed):
    """Give the weights the learned steps of LSQ; the activations keep their scheme."""
    lsq = qat.prepare(ptq.fold_batch_norm(digits.load()), "LSQ", subset(seed), weight_bits=bits, activation_bits=bits)
    for layer, other in _layers(model, lsq):
        layer.weight_quantizer = other.weight_quantizer


def weights_of_mse(model, bits, seed):
    """Fix the step of the weights where their squared error is least before the training; the codes are as before."""
    for (layer,) in _layers(model):
        weight = layer.layer.weight.detach()
        scale = ptq.weight_params(weight, bits, weight_range="MSE").scale
        layer.weight_quantizer = qat.LSQ(bits, scale, n=weight.numel()).requires_grad_(False)
        layer.weight_quantizer.qn = layer.weight_quantizer.qp  # without the lowest code, as max|w| has it


def ends_in_8_bits(model, bits, seed):
    """Give the first and the last layer 8 bits, for weights and inputs."""
    fine = qat.prepare(ptq.fold_batch_norm(digits.load()), "LSQ", subset(seed), weight_bits=8, activation_bits=8)
    first, *_, last = _layers(model, fine)
    for layer, other in (first, last):
        layer.weight_quantizer, layer.input_quantizer = other.weight_quantizer, other.input_quantizer


def after_more_floats(bits, seed, calibrator):
    """As `after_training`, when the network has first been trained on in floats, for as long as `aware` trains."""
    model = ptq.fold_batch_norm(digits.load())
    _train(model, seed)
    return after_training(bits, seed, calibrator, model)


METHODS = {
    "PTQ, min-max": (after_training, "min-max"),
    "PTQ, MSE": (after_training, "MSE"),
    "more floats, PTQ, min-max": (after_more_floats, "min-max"),
    "more floats, PTQ, MSE": (after_more_floats, "MSE"),
    "QAT, Jacob, w: max|w|": (aware, "Jacob"),
    "QAT, PACT, w: max|w|": (aware, "PACT"),
    "QAT, PACT, w: MSE, fixed": (aware, "PACT", weights_of_mse),
    "QAT, Jacob, w: LSQ": (aware, "Jacob", weights_of_lsq),
    "QAT, PACT, w: LSQ": (aware, "PACT", weights_of_lsq),
    "QAT, LSQ": (aware, "LSQ"),
    "QAT, LSQ+": (aware, "LSQ+"),
    "QAT, LSQ, ends in 8 bits": (aware, "LSQ", ends_in_8_bits),
}


def load():
    """The table as it is shipped: {"versions": …, "rows": [{"method", "bits", "seed", "accuracy"}, …]}.

    Examples
    --------
    >>> sorted(load()["rows"][0])
    ['accuracy', 'bits', 'method', 'seed']
    """
    return json.loads(_FILE.read_text())


def row(method, bits, seed):
    """One row of the table, computed now, on one core."""
    torch.set_num_threads(1)  # sums in a fixed order
    function, *choices = METHODS[method]
    return {"method": method, "bits": bits, "seed": seed, "accuracy": round(function(bits, seed, *choices), 2)}


def _layers(*models):
    """The layers of models of one architecture, side by side."""
    layers = ([module for module in model.modules() if isinstance(module, qat.QATLayer)] for model in models)
    return list(zip(*layers, strict=True))


def _train(model, seed):
    images, labels, _, _ = digits.data()
    for _ in train(model, images, labels, epochs=EPOCHS, lr=LR, seed=seed):
        pass


def _accuracy(model):
    _, _, images, labels = digits.data()
    return digits.accuracy(model, images, labels)


def main():
    jobs = [(method, bits, seed) for method in METHODS for bits in BITS for seed in SEEDS]
    with ProcessPoolExecutor() as pool:
        rows = list(tqdm(pool.map(row, *zip(*jobs, strict=True)), total=len(jobs)))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    table = {"versions": versions, "epochs": EPOCHS, "learning_rate": LR, "test_images": 360, "rows": rows}
    _FILE.write_text(json.dumps(table, indent=0) + "\n")
    print(f"{len(rows)} rows written to {_FILE.name}")


if __name__ == "__main__":
    main()
