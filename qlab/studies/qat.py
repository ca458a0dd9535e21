"""Lesson 04's table: PTQ against QAT, over schemes, bits and seeds. ``python -m qlab.studies.qat`` makes it again.

The command trains the network of `qlab.digits` further, once for each scheme, number of bits and seed, and writes
``qat_study.json`` beside the samples: some minutes on two cores. The lesson loads that file and repeats one row.
"""

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from qlab import digits, ptq, qat, samples
from qlab.training import train

BITS, SEEDS = (4, 3, 2), range(5)
EPOCHS, LR = 20, 0.01  # chosen on a fifth of the training images that was held out, not on the test images
_FILE = Path(samples.__file__).with_name("qat_study.json")


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


def aware(bits, seed, scheme):
    """Test accuracy in percent after training on with quantizers in place: integer zero-points, float biases."""
    model = qat.prepare(ptq.fold_batch_norm(digits.load()), scheme, subset(seed), weight_bits=bits,
                        activation_bits=bits)
    _train(model, seed)
    return _accuracy(qat.convert(model))


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
    **{f"QAT, {scheme}": (aware, scheme) for scheme in qat.SCHEMES},
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
    function, choice = METHODS[method]
    return {"method": method, "bits": bits, "seed": seed, "accuracy": round(function(bits, seed, choice), 2)}


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
