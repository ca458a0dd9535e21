"""The shipped table of lesson 04 is complete, says what the lesson says, and can be computed again."""

import numpy as np
import pytest
import torch

from qlab import digits, ptq, qat
from qlab.exercises.qat import PREDICTIONS
from qlab.studies import qat as study
from qlab.training import train

TABLE = {(row["method"], row["bits"], row["seed"]): row["accuracy"] for row in study.load()["rows"]}


def accuracies(method, bits):
    return [TABLE[method, bits, seed] for seed in study.SEEDS]


def test_every_row_is_there_once():
    wanted = {(method, bits, seed) for method in study.METHODS for bits in study.BITS
              for seed in study.SEEDS}
    assert set(TABLE) == wanted
    assert len(study.load()["rows"]) == len(wanted)
    assert set(study.load()["versions"]) == {"python", "torch"}


@pytest.mark.parametrize("method", ["PTQ, min-max", "PTQ, MSE"])
@pytest.mark.parametrize("bits", study.BITS)
def test_a_row_computed_again(method, bits):
    again = study.row(method, bits, seed=2)
    assert again["accuracy"] == pytest.approx(TABLE[method, bits, 2], abs=1.2)  # sums in another order: some images


def test_what_the_lesson_says_of_the_table():
    mean = {(method, bits): sum(accuracies(method, bits)) / 5 for method in study.METHODS
            for bits in study.BITS}
    assert mean["PTQ, min-max", 3] < 60
    assert mean["QAT, LSQ", 3] >= 95
    assert min(accuracies("QAT, LSQ", 3)) > max(accuracies("PTQ, MSE", 3) + accuracies("more floats, PTQ, MSE", 3))
    assert mean["PTQ, MSE", 3] < mean["more floats, PTQ, MSE", 3] < mean["QAT, LSQ", 3]
    assert max(accuracies("QAT, Jacob, w: max|w|", 2) + accuracies("QAT, PACT, w: max|w|", 2)) < 20
    ranged = ["QAT, PACT, w: MSE, fixed", "QAT, PACT, w: LSQ", "QAT, Jacob, w: LSQ"]
    assert all(70 < min(accuracies(method, 2)) for method in ranged)
    for a, b in (ranged[:2], ranged[1:]):  # fixed or learned, PACT or Jacob: the seeds overlap
        assert min(accuracies(a, 2)) < max(accuracies(b, 2)) and min(accuracies(b, 2)) < max(accuracies(a, 2))
    assert max(max(accuracies(method, 2)) for method in ranged) < min(accuracies("QAT, LSQ", 2))
    assert f"about {mean['QAT, LSQ', 2]:.0f} %, which LSQ has" in [
        option.text for option in PREDICTIONS["PACT at 2 bits"].options]


def test_eight_bits_in_the_first_and_last_layer_are_not_resolved():
    low, fine = accuracies("QAT, LSQ", 2), accuracies("QAT, LSQ, ends in 8 bits", 2)
    gains = np.subtract(fine, low)
    assert abs(np.mean(gains)) < 2.776 * np.std(gains, ddof=1) / np.sqrt(len(gains))  # Student's t, 95 %, 4 degrees


def test_mse_reads_fewer_digits_than_min_max_at_4_bits_unless_trained_on_in_floats():
    assert max(accuracies("PTQ, MSE", 4)) < min(accuracies("PTQ, min-max", 4))
    assert min(accuracies("PTQ, min-max", 4)) == pytest.approx(93.06 + 100 / 360, abs=0.02)  # section 2, and an image
    gains = np.subtract(accuracies("more floats, PTQ, MSE", 4), accuracies("more floats, PTQ, min-max", 4))
    assert np.mean(gains) > 0


def layers(change, bits=2):
    """The layers of a network prepared for PACT, and of the same one after a change."""
    models = [qat.prepare(ptq.fold_batch_norm(digits.load()), "PACT", study.subset(0), weight_bits=bits,
                          activation_bits=bits) for _ in range(2)]
    change(models[1], bits, 0)
    return [[module for module in model.modules() if isinstance(module, qat.QATLayer)] for model in models]


def test_weights_by_mse_are_fixed_and_keep_the_codes():
    for before, after in zip(*layers(study.weights_of_mse), strict=True):
        weight = before.layer.weight.detach()
        old, new = before.weight_quantizer.params(weight), after.weight_quantizer.params(weight)
        assert (old.qmin, old.qmax) == (new.qmin, new.qmax) == (-1, 1)
        assert new.scale == ptq.weight_params(weight, 2, weight_range="MSE").scale < old.scale
        assert not any(parameter.requires_grad for parameter in after.weight_quantizer.parameters())
        assert before.input_quantizer.range() == after.input_quantizer.range()


def test_weights_of_lsq_learn_and_the_ends_have_8_bits():
    for before, after in zip(*layers(study.weights_of_lsq), strict=True):
        assert isinstance(after.weight_quantizer, qat.LSQ) and after.weight_quantizer.scale.requires_grad
        assert isinstance(after.input_quantizer, qat.PACT)
        assert before.input_quantizer.range() == after.input_quantizer.range()
    _, after = layers(study.ends_in_8_bits)
    bits = [(layer.weight_quantizer.bits, layer.input_quantizer.bits) for layer in after]
    assert bits == [(8, 8), *[(2, 2)] * 6, (8, 8)]


def test_adam_undoes_lsqs_gradient_scale():
    def trained(share):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            images, labels = torch.rand(64, 4), torch.arange(64) % 3
        model = qat.prepare(model, "LSQ", images, weight_bits=3, activation_bits=3)
        for layer in (model[0], model[2]):
            layer.weight_quantizer.gradient_scale *= share
            layer.input_quantizer.gradient_scale *= share
        for _ in train(model, images, labels, epochs=10, lr=0.01, seed=0):
            pass
        return torch.tensor([layer.weight_quantizer.scale.item() for layer in (model[0], model[2])])

    torch.testing.assert_close(trained(1), trained(0.01), rtol=2e-3, atol=0)
