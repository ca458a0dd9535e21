"""The samples: what they are, where they come from, and that the networks among them do what they were trained for."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from qlab import samples
from qlab.studies import mlp
from qlab.studies import samples as script
from tests.test_project import loaded_by

FUNCTIONS = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}
ARRAYS = {
    "activations": ((128, 576), np.float32),
    "new_activations": ((64, 576), np.float32),
    "weights": ((192, 576), np.float32),
    "digit_images": ((360, 64), np.float32),
    "digit_labels": ((360,), np.int64),
    "calibration_digits": ((360, 64), np.float32),
}

PRODUCTS = {  # place: the matrix that reads it, shapes of x and w
    (12, "attn_in"): ("q", (64, 576), (192, 576)),
    (11, "down_in"): ("down", (64, 1536), (64, 1536)),
    (29, "mlp_in"): ("gate", (64, 576), (192, 576)),
    (12, "o_in"): ("o", (64, 576), (192, 576)),
}


def run(activation, images):
    """Outputs of the hidden layers, and the logits."""
    *hidden, (weight, bias) = samples.mlp(activation)
    outputs = [images]
    for w, b in hidden:
        outputs.append(FUNCTIONS[activation](outputs[-1] @ w.T + b))
    return outputs[1:], outputs[-1] @ weight.T + bias


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_has_its_shape_and_dtype(name):
    array = samples.load(name)
    assert (array.shape, array.dtype) == ARRAYS[name]
    assert np.isfinite(array).all()
    assert array.flags.writeable


@pytest.mark.parametrize("name", ["digit_images", "calibration_digits"])
def test_pixels_are_sixteenths_from_0_to_1(name):
    assert set(np.unique(samples.load(name) * 16)) == set(range(17))


def test_labels_are_ten_classes_of_much_the_same_size():
    counts = np.bincount(samples.load("digit_labels"), minlength=10)
    assert len(counts) == 10
    assert counts.min() >= 35 and counts.max() <= 37


def test_no_image_is_there_twice():
    images = np.concatenate([samples.load("digit_images"), samples.load("calibration_digits")])
    assert len(np.unique(images, axis=0)) == 720


def test_images_and_labels_are_those_of_scikit_learn():
    pixels, labels = load_digits(return_X_y=True)
    label_of = {row.tobytes(): label for row, label in zip(pixels.astype(np.uint8), labels, strict=True)}
    found = [label_of[row.tobytes()] for row in (samples.load("digit_images") * 16).astype(np.uint8)]
    np.testing.assert_array_equal(found, samples.load("digit_labels"))
    calibration = samples.load("calibration_digits")
    _, logits = run("relu", calibration)
    found = [label_of[row.tobytes()] for row in (calibration * 16).astype(np.uint8)]
    assert np.mean(logits.argmax(1) == found) > 0.995  # it was trained on these


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_network_has_eight_hidden_layers_of_64_units(activation):
    layers = samples.mlp(activation)
    assert [w.shape for w, _ in layers] == [(64, 64)] * 8 + [(10, 64)]
    assert [b.shape for _, b in layers] == [(64,)] * 8 + [(10,)]
    for array in (array for pair in layers for array in pair):
        assert array.dtype == np.float32
        assert (array == array.astype(np.float16)).all()
        assert array.std() > 0


@pytest.mark.parametrize(("activation", "right"), [("relu", 354), ("tanh", 353)])
def test_a_network_reads_new_digits(activation, right):
    _, logits = run(activation, samples.load("digit_images"))
    assert np.sum(logits.argmax(1) == samples.load("digit_labels")) == right  # 98.3 and 98.1 %


def test_relu_leaves_many_zeros_and_few_units_that_are_always_off():
    for output in run("relu", samples.load("digit_images"))[0]:
        assert 0.3 < np.mean(output == 0) < 0.7
        assert np.mean((output == 0).all(0)) < 0.15


def test_tanh_activations_are_balanced_around_0():
    for output in run("tanh", samples.load("digit_images"))[0]:
        assert -1 < output.min() < -0.8 and 0.8 < output.max() < 1
        assert 0.45 < np.mean(output < 0) < 0.55
        assert abs(output.mean()) < 0.1 * output.std()


@pytest.mark.parametrize("name", ["digits", "relu_weight_0", "", None, 3, ["activations"]])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError) as caught:
        samples.load(name)
    assert all(allowed in str(caught.value) for allowed in (*ARRAYS, repr(name)))


@pytest.mark.parametrize("name", ["gelu", "", None, 3, ["relu"]])
def test_an_unknown_activation_is_refused(name):
    with pytest.raises(ValueError) as caught:
        samples.mlp(name)
    assert all(allowed in str(caught.value) for allowed in (*FUNCTIONS, repr(name)))


def test_a_missing_file_is_refused():
    with pytest.raises(ValueError, match=r"no sample file 'no\.npz'"):
        samples.path("no.npz")


@pytest.mark.parametrize("call", ["load('digit_images')", "load('digit_labels')", "mlp('relu')", "products()"])
def test_loading_needs_neither_torch_nor_scikit_learn(call):
    loaded = loaded_by(f"from qlab import samples; samples.{call}")
    assert "numpy" in loaded
    assert not {"torch", "sklearn"} & loaded


def test_the_digits_are_a_small_file():
    assert Path(samples.path("digits.npz")).stat().st_size <= 250_000


def test_products_have_their_shapes_and_dtype():
    found = samples.products()
    assert list(found) == list(PRODUCTS)
    for place, (x, w) in found.items():
        assert (x.shape, w.shape) == PRODUCTS[place][1:]
        for array in (x, w):
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
            assert (array == array.astype(np.float16)).all()
            assert array.flags.writeable
    found[12, "o_in"][0][:] = 0
    assert samples.products()[12, "o_in"][0].any()


def test_products_hold_an_outlier_channel_and_massive_activations():
    def largest(place):
        x = samples.products()[place][0]
        return [int(i) for i in np.unravel_index(np.abs(x).argmax(), x.shape)]

    x, _ = samples.products()[12, "attn_in"]
    typical = np.median(np.abs(x), axis=0)
    assert typical.argmax() == largest((12, "attn_in"))[1] == 247
    assert typical[247] > 20 * np.median(typical)
    x, _ = samples.products()[11, "down_in"]
    assert largest((11, "down_in")) == [0, 1229]  # position 0 included
    assert np.argwhere(np.abs(x) > 100)[:, 0].tolist() == [0] * (np.abs(x[0]) > 100).sum()


def test_the_outliers_are_small_files():
    sizes = [Path(samples.path(f"outliers_{layer}_{site}.npz")).stat().st_size for layer, site in PRODUCTS]
    assert sum(sizes) <= 1_200_000


@pytest.mark.long
def test_products_are_those_of_the_real_model(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["samples"])
    loaded, load, threads = [], script.smollm.load, torch.get_num_threads()
    monkeypatch.setattr(script.smollm, "load", lambda: loaded.append(load(progress=False)) or loaded[0])
    try:
        with redirect_stdout(io.StringIO()) as printed:
            script.main()
    finally:
        torch.set_num_threads(threads)
    made = {f"outliers_{layer}_{site}.npz" for layer, site in PRODUCTS} | {"gains.npz", "part_of_o.npz"}
    assert {file.name for file in tmp_path.iterdir()} == made
    assert printed.getvalue().count("sha256") == len(made)
    for name in ("gains.npz", "part_of_o.npz"):
        with np.load(tmp_path / name) as again, np.load(samples.path(name)) as shipped:
            assert again.files == shipped.files
            for key in again.files:
                np.testing.assert_allclose(again[key], shipped[key], rtol=2e-3, atol=1e-3)
    for (layer, site), (x, w) in samples.products().items():
        matrix = getattr(loaded[0].blocks[layer], PRODUCTS[layer, site][0]).weight
        np.testing.assert_array_equal(w, matrix[:len(w)].numpy().astype(np.float16))
        if sys.version_info[:2] == (3, 11):  # the text changes with Python's version
            with np.load(tmp_path / f"outliers_{layer}_{site}.npz") as made:
                np.testing.assert_allclose(made["x"], x, rtol=2e-3, atol=1e-3)
                np.testing.assert_array_equal(made["w"], w)


def test_the_script_writes_the_same_bytes_again(monkeypatch, tmp_path):
    monkeypatch.setattr(mlp, "EPOCHS", 1)  # a minute with all of them
    threads = torch.get_num_threads()
    files = [tmp_path / "first.npz", tmp_path / "second.npz"]
    try:
        for file in files:
            monkeypatch.setattr(mlp, "OUT", file)
            with redirect_stdout(io.StringIO()) as printed:
                mlp.main()
    finally:
        torch.set_num_threads(threads)
    assert files[0].read_bytes() == files[1].read_bytes()
    relu, tanh = printed.getvalue().splitlines()[-2:]  # about the file that ships
    assert relu.startswith("relu: 354 of 360 test images right, 98.3 %") and relu.endswith("[6, 8, 5, 6, 8, 3, 4, 8]")
    assert tanh.startswith("tanh: 353 of 360 test images right, 98.1 %") and tanh.endswith(str([0] * 8))
    with np.load(files[0]) as made, np.load(samples.path("digits.npz")) as shipped:
        assert made.files == shipped.files
        for name in made.files:
            assert (made[name].shape, made[name].dtype) == (shipped[name].shape, shipped[name].dtype)
            assert name not in ARRAYS or (made[name] == shipped[name]).all()


def test_a_part_of_o_is_a_small_file_with_its_shapes_and_dtype():
    w, x, held_out = samples.part_of_o()
    assert (w.shape, x.shape) == ((192, 64), (2048, 64))
    assert {name: other.shape for name, other in held_out.items()} == {"prose": (512, 64), "code": (512, 64)}
    for array in (w, x, *held_out.values()):
        assert array.dtype == np.float32
        assert (array == array.astype(np.float16)).all()
    np.testing.assert_array_equal(samples.part_of_o()[0], w)
    assert Path(samples.path("part_of_o.npz")).stat().st_size <= 400_000
