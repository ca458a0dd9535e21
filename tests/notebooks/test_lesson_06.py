"""What lesson 06 says of smoothing, against the intervals that it prints (nbval measures those of the model again)."""

import pytest

from qlab.explorers import smoothing
from qlab.explorers.smoothquant import ALPHAS, PRINTED, RIGHT, TENSOR, VECTOR
from qlab.studies import smoothquant as study
from qlab.studies.tables import load
from tests.notebooks.measured import intervals

SHIPPED = load("smoothquant")
TEXTS = ("prose", "code", "documentation")


def printed(line, text=None):
    """(value, low, high) of the KL and of the perplexity in a line; with all texts, a list of them."""
    if text is None:
        return [printed(line, text) for text in TEXTS]
    return intervals("06", f"{line}, {text}:")


def lower(found):
    return found[2] < 1


def higher(found):
    return found[1] > 1


def test_alpha_is_chosen_inside_and_is_that_of_the_study():
    results = {alpha: intervals("06", f"alpha {alpha}: KL")[0][0] for alpha in (None, 0.5, 0.7, 1.0)}
    assert min(results, key=results.get) == study.ALPHA
    assert results[None] > results[0.5] > results[0.7] < results[1.0]


def test_the_verdict():
    (live, perplexity), = [intervals("06", "code, smoothed / none:")]
    assert live[2] < 0.5 and lower(perplexity)
    for text in TEXTS:
        kl, _ = printed("α 0.7 / none", text)
        assert kl[2] < 0.5  # most is gone
        assert higher(printed("α 0.7", text)[1])  # and not all


def test_the_study_and_the_lesson_measure_the_same():
    """The lesson's tokens are the first half of the study's."""
    for line, name in (("code, none:", "none"), ("code, smoothed: KL", "α 0.7"),
                       ("int8, smoothed: KL", "int8, smoothed")):
        (_, low, high), _ = intervals("06", line)
        assert low < SHIPPED.row(name, "code").kl_high and SHIPPED.row(name, "code").kl_low < high


def test_other_alphas():
    assert all(higher(kl) for kl, _ in printed("α 0.2 / none"))
    assert [lower(kl) for kl, _ in printed("α 0.3 / none")] == [False, False, True]
    assert not any(higher(kl) for kl, _ in printed("α 0.3 / none"))
    assert [higher(kl) for kl, _ in printed("α 1.0 / α 0.5")] == [True, False, False]
    assert not any(lower(kl) for kl, _ in printed("α 1.0 / α 0.5"))


def test_pairs_and_down():
    for (pairs, _), (down, _) in zip(printed("the paper's pairs / none"), printed("up and down / none"), strict=True):
        assert 0.7 < pairs[1] and lower(pairs)
        assert down[2] < pairs[1] / 2
    assert all(lower(kl) for kl, _ in printed("α 0.7 / up and down"))
    assert all(kl[2] < 0.25 for kl, _ in printed("6 bits, smoothed / 6 bits, none"))


def test_down_in_float_leaves_little():
    for text in TEXTS:
        assert intervals("06", f"int8, smoothed, down in float, {text}:")[0][2] < 0.05


def test_levels():
    per_token, per_tensor = printed("O1, smoothed / O1, none"), printed("O2, smoothed / O2, none")
    assert all(lower(kl) for kl, _ in per_token)
    assert not all(lower(perplexity) for _, perplexity in per_token)
    for (one, _), (other, _) in zip(per_token, per_tensor, strict=True):
        assert other[2] < one[1]
    (dynamic, *_), (static, *_) = (intervals("06", f"{name} on prose: KL") for name in ("O2, smoothed", "α 0.7"))
    assert dynamic[2] / dynamic[1] < 1.5
    assert static[2] / static[1] > 2


def test_the_needles_own_remedy():
    alone, smoothed = printed("O2, none, token 0 in float / O2, none"), printed("O2, smoothed / O2, none")
    for (first, _), (second, _) in zip(alone, smoothed, strict=True):
        assert second[2] < first[1] and first[2] < 0.5
    assert all(lower(kl) for kl, _ in printed("O2, smoothed, token 0 in float / O2, smoothed"))


def test_the_circle():
    assert all(kl[2] < 0.5 for kl, _ in printed("int8, smoothed / int8"))
    assert all(kl[2] < 0.25 for kl, _ in printed("int8, smoothed, down in float / int8, smoothed"))
    per_matrix = printed("int8, smoothed, one scale per matrix / int8")
    assert not any(lower(kl) or higher(kl) for kl, _ in per_matrix)
    assert [higher(perplexity) for _, perplexity in per_matrix] == [True, False, False]


@pytest.fixture(scope="module")
def figure():
    return smoothing()


def test_what_is_seen_in_the_figure(figure):
    def errors(place, direction, per):
        figure.set(place=place, direction=direction, per=per)
        curve = figure._compute(place=place, direction=direction, per=per, alpha=0.5, bits=8).curve
        return curve, figure.readout["off_percent"]

    needle, attention = (11, "down_in"), (12, "attn_in")
    curve, off = errors(attention, RIGHT, TENSOR)
    assert curve.min() < off / 2 and min(curve[0], curve[-1]) > off
    by_vector, off_by_vector = errors(attention, RIGHT, VECTOR)
    assert by_vector.min() < off_by_vector / 2 and ALPHAS[by_vector.argmin()] > ALPHAS[curve.argmin()]
    curve, off = errors(attention, PRINTED, TENSOR)
    assert curve.min() > off and curve[-1] > 5 * off  # “far worse as α grows”
    for place, per in ((attention, VECTOR), (needle, VECTOR), ((29, "mlp_in"), TENSOR)):
        curve, off = errors(place, PRINTED, per)
        assert curve[0] < off  # “can be better than off”
    curve, off = errors(needle, RIGHT, TENSOR)
    assert 0.9 * off < curve.min()
    curve, off = errors(needle, RIGHT, VECTOR)
    assert curve.min() < off / 4 and ALPHAS[curve.argmin()] == pytest.approx(0.65)
    curve, off = errors((12, "o_in"), RIGHT, TENSOR)
    assert curve.min() > off / 2


def test_the_whole_model_in_the_figure():
    for text in TEXTS:
        kl = {alpha: SHIPPED.row(f"α {alpha}", text).kl for alpha in study.ALPHAS}
        assert min(kl, key=kl.get) in (0.6, 0.7)
