"""The shipped table of lesson 04 is complete, says what the lesson says, and can be computed again."""

import pytest

from qlab.studies import qat as study

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
    assert min(accuracies("QAT, LSQ", 2) + accuracies("QAT, LSQ+", 2)) > 80
    assert max(accuracies("QAT, Jacob", 2) + accuracies("QAT, PACT", 2)) < 20
