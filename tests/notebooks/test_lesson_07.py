"""What lesson 07 says of methods, against the intervals that it prints: on all three texts, or on which."""

import pytest

from qlab.exercises.spinquant import PREDICTIONS
from qlab.studies.spinquant import END_TO_END, HADAMARD, LEARNED
from qlab.studies.tables import load
from tests.notebooks.measured import intervals

SHIPPED = load("spinquant")
TEXTS = ("prose", "code", "documentation")


def ratios(first, second, times=1):
    """One interval for each text; as often as the lesson prints the line."""
    found = intervals("07", f"{first} / {second}")
    assert len(found) == times * len(TEXTS), (first, second, found)
    return found


@pytest.mark.parametrize("first, second, most", [
    (HADAMARD, "Hadamard R1 R2", 0.5), (HADAMARD, "smoothed", 0.6),
])
def test_the_first_is_nearer_to_float_on_every_text(first, second, most):
    assert all(value < most and high < 1 for value, _, high in ratios(first, second))


@pytest.mark.parametrize("first, second, least", [
    ("orthogonal R1 R2 R4", HADAMARD, 1.4), (HADAMARD, "groups of 32", 1.9), (LEARNED, "groups of 32", 1.3),
    ("gains folded", "as loaded", 2), (HADAMARD, "as loaded", 2),
])
def test_the_first_is_farther_from_float_on_every_text(first, second, least):
    assert all(value > least and low > 1 for value, low, _ in ratios(first, second))


def test_what_rotating_does_to_folded_weights_is_not_resolved_on_prose():
    resolved = [high < 1 for _, _, high in ratios(HADAMARD, "gains folded")]
    assert resolved == [text != "prose" for text in TEXTS]
    assert all(low < 1 for _, low, _ in ratios(HADAMARD, "gains folded"))


def test_learning_pays_for_activations_and_is_not_resolved_for_weights():
    *weights, prose, code, documentation = ratios(LEARNED, HADAMARD, 2)
    assert all(low < 1 < high for _, low, high in weights)
    assert all(0.65 < value < 0.75 and high < 1 for value, _, high in (prose, code, documentation))


@pytest.mark.parametrize("first, second", [("R3", "per token"), ("keys per channel", "R3")])
def test_the_cache_at_4_and_at_3_bits(first, second):
    assert all(0.3 < value < 0.6 and high < 1 for value, _, high in ratios(first, second, 2))


@pytest.mark.parametrize("text", TEXTS)
def test_every_learned_rotation_is_below_every_drawn_one_with_its_interval(text):
    drawn, learned = ([row for row in SHIPPED.rows if row[0] == f"activations: {method}" and row[2] == text]
                      for method in (HADAMARD, LEARNED))
    assert len(drawn) == len(learned) == 5
    assert max(high for *_, high, _ in learned) < min(low for *_, low, _, _ in drawn)


def test_learning_is_resolved_by_perplexity_too():
    for text in TEXTS:
        kl, perplexity = intervals("07", f"{text} KL")
        assert kl[2] < 1
        assert perplexity[2] < 1


def test_end_to_end_gains_a_twentieth_and_stays_behind_the_proxy():
    assert all(0.93 < value < 0.97 and high < 1 for value, _, high in ratios(END_TO_END, HADAMARD))
    assert all(value > 1.3 and low > 1 for value, low, _ in ratios(END_TO_END, LEARNED))
    assert [(run["steps"], round(run["seconds"] / 60)) for run in SHIPPED.about["end_to_end"]] == [(60, 10)]


def test_most_of_the_way_was_made_by_the_first_hadamard_matrix():
    for text in TEXTS:
        none, hadamard, learned = (SHIPPED.row(f"activations: {method}", text).kl
                                   for method in ("no rotation", HADAMARD, LEARNED))
        assert none - hadamard > 10 * (hadamard - learned)


def test_what_is_measured_live_agrees():
    (_, low, _), _ = intervals("07", "the first / the second:")
    assert low > 1


def test_the_predictions_have_the_answers_that_the_tables_give():
    by_channel = [SHIPPED.contrast("cache, 3 bits: keys per channel", "cache, 3 bits: R3", text) for text in TEXTS]
    folded, loaded = (SHIPPED.row(f"weights: {method}", "prose").kl for method in (HADAMARD, "as loaded"))
    learned = SHIPPED.about["learning"][0]
    for name, value, answer in (
        ("a rotation or groups",
         SHIPPED.contrast(f"activations: {HADAMARD}", "activations: groups of 32", "prose"), "no rotation"),
        ("four-bit weights, turned", folded / loaded, "about twice as large, or more"),
        ("two hundred steps", learned["held_out_after"] / learned["held_out_before"], "by nearly half"),
        ("keys at 3 bits", by_channel, "keys per channel"),
    ):
        question = PREDICTIONS[name]
        assert question.options[question.answer(value)].text == answer


@pytest.mark.parametrize("question", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_wrong_choice_is_told_where_to_look(question):
    assert sorted(bool(option.look) for option in question.options) == [False, True, True]
