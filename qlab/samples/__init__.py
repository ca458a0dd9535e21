"""Small real arrays that ship with the package, so that the first lessons need neither torch nor a download.

The sources, and the scripts that made the files:

- ``smollm2.npz``, ``outliers_*.npz``, ``smoothing.npz``, ``part_of_o.npz``: activations and weights of
  SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0); `qlab.studies.samples` and `qlab.studies.smoothquant`.
- ``digits.npz``: images of hand-written digits, and two deep networks trained on them for this course. The images are
  a part of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
  https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn ships it; `qlab.studies.mlp`.
- ``digits_int8.onnx``: the digits network in 8 bits, as lesson 04 quantizes it, for ONNX Runtime.
- ``text_*.txt``: what language models are judged and calibrated on (`qlab.evaluation.texts`), from this course and from
  Python's documentation and library (``text_licence.txt``); `qlab.studies.texts`.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
_FROM_LLM = ("activations", "new_activations", "weights")
_DIGITS = ("digit_images", "digit_labels", "calibration_digits")
_ACTIVATIONS = ("relu", "tanh")
_LINEAR_LAYERS = 9
_PRODUCTS = ((12, "attn_in"), (11, "down_in"), (29, "mlp_in"), (12, "o_in"))


def load(name):
    """One of the sample arrays.

    Parameters
    ----------
    name : str
        From an LLM:
        ``activations`` (128 tokens × 576 channels): input of an MLP in layer 5 while the model reads English prose.
        ``new_activations`` (64 × 576): the same place while it reads Python source code.
        ``weights`` (192 × 576): rows of the weight matrix that these inputs meet.
        Hand-written digits:
        ``digit_images`` (360 images × 64 pixels, row by row): test images, which no network was trained on.
        ``digit_labels`` (360): the digits that they show, 0 to 9.
        ``calibration_digits`` (360 × 64): some of the images that the networks of `mlp` were trained on.

    Returns
    -------
    float32 array; int64 for ``digit_labels``
        From the LLM: stored as float16, in the model's own units. Pixels: from 0 (paper) to 1 (ink) in steps of 1/16.

    Raises
    ------
    ValueError
        If there is no such array.

    References
    ----------
    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI Machine Learning Repository.

    Examples
    --------
    >>> load("activations").shape
    (128, 576)
    >>> load("digit_labels")[:5].tolist()
    [7, 6, 3, 7, 7]
    """
    if name in _FROM_LLM:
        return _stored("smollm2.npz", name).astype(np.float32)
    if name == "digit_labels":
        return _stored("digits.npz", name).astype(np.int64)
    if name in _DIGITS:
        return _stored("digits.npz", name).astype(np.float32) / 16
    raise ValueError(f"name must be one of {', '.join(sorted(_FROM_LLM + _DIGITS))}, got {name!r}")


def mlp(activation):
    """The layers of a deep network that reads digits: 64 pixels, eight hidden layers of 64 units, ten logits.

    Parameters
    ----------
    activation : {"relu", "tanh"}
        What the network was trained with, after each layer but the last.

    Returns
    -------
    list of nine pairs (weight, bias), float32
        ``weight`` has the shape (outputs, inputs), ``bias`` (outputs,); stored as float16. The last pair gives the
        logits.

    Raises
    ------
    ValueError
        If there is no network with this activation.

    References
    ----------
    `qlab.studies.mlp` trained them, on images that ``load("digit_images")`` does not hold.

    Examples
    --------
    >>> *hidden, (weight, bias) = mlp("relu")
    >>> x = load("digit_images")
    >>> for w, b in hidden:
    ...     x = np.maximum(x @ w.T + b, 0)
    >>> logits = x @ weight.T + bias
    >>> int((logits.argmax(axis=1) == load("digit_labels")).sum())
    354
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    with np.load(path("digits.npz")) as arrays:
        return [
            (arrays[f"{activation}_weight_{i}"].astype(np.float32), arrays[f"{activation}_bias_{i}"].astype(np.float32))
            for i in range(_LINEAR_LAYERS)
        ]


def products():
    """Activations and the weights that they meet, at four places in the LLM: y = x Wᵀ.

    Returns
    -------
    dict of (layer, site) to pair (x, w), float32
        ``x`` has the shape (64 tokens, channels): English prose, from its first token on. ``w`` has the shape
        (outputs, channels), the first rows of the matrix: 192 of q for "attn_in", of o for "o_in" and of gate for
        "mlp_in", 64 of down for "down_in". Stored as float16.

    References
    ----------
    `qlab.smollm` names the sites; `qlab.studies.samples` made the files.

    Examples
    --------
    >>> {place: x.shape for place, (x, w) in products().items()}
    {(12, 'attn_in'): (64, 576), (11, 'down_in'): (64, 1536), (29, 'mlp_in'): (64, 576), (12, 'o_in'): (64, 576)}
    """
    files = {(layer, site): f"outliers_{layer}_{site}.npz" for layer, site in _PRODUCTS}
    return {place: tuple(_stored(file, name).astype(np.float32) for name in "xw") for place, file in files.items()}


def largest_weights():
    """How far the whole matrices at the places of `products` reach, before and after smoothing.

    Returns
    -------
    dict of (layer, site) to (columns, values, at), float32, float32 and int64
        ``columns`` (channels,): the largest |W| over all matrices that read the place, such as q, k and v. ``values``
        and ``at`` (outputs, few): of each row of the matrix in `products`, |W| and column of what can be the row's
        largest, for every s of `qlab.smoothquant` of these x: the largest of W s is that of ``values * s[at]``.

    References
    ----------
    `qlab.studies.smoothquant` made the file.

    Examples
    --------
    >>> columns, values, at = largest_weights()[12, "attn_in"]
    >>> columns.shape, len(values) == len(at) == 576
    ((576,), True)
    """
    return {(layer, site): (*(_stored("smoothing.npz", f"{layer}_{site}_{name}").astype(np.float32)
                              for name in ("columns", "values")),
                            _stored("smoothing.npz", f"{layer}_{site}_at").astype(np.int64))
            for layer, site in _PRODUCTS}


def gains():
    """Gains of the RMSNorms in front of two of the places of `products`: x = gain · x̂, and x̂ is what a rotation turns.

    Returns
    -------
    dict of (layer, site) to float32 array, shape (576,)
        Stored as float16, exactly.

    Examples
    --------
    >>> {place: gain.shape for place, gain in gains().items()}
    {(12, 'attn_in'): (576,), (29, 'mlp_in'): (576,)}
    """
    return {place: _stored("gains.npz", f"{place[0]}_{place[1]}").astype(np.float32)
            for place in ((12, "attn_in"), (29, "mlp_in"))}


def part_of_o():
    """Inputs of o in layer 17 of the LLM for three texts, every third of three heads, and the weights that they meet.

    Returns
    -------
    w : float32 array, shape (192, 64)
        The first rows of o, of columns 1, 4, 7, …, 190.
    x : float32 array, shape (2048, 64)
        The inputs for the text to calibrate with, row = token.
    held_out : dict of str to float32 array, shape (512, 64)
        The same for "prose" and "code". All are stored as float16.

    References
    ----------
    The texts: `qlab.evaluation.texts`. `qlab.studies.samples` made the file, and says why these inputs.

    Examples
    --------
    >>> w, x, held_out = part_of_o()
    >>> w.shape, x.shape, {name: other.shape for name, other in held_out.items()}
    ((192, 64), (2048, 64), {'prose': (512, 64), 'code': (512, 64)})
    """
    w, x, *others = (_stored("part_of_o.npz", name).astype(np.float32) for name in ("w", "x", "prose", "code"))
    return w, x, dict(zip(("prose", "code"), others, strict=True))


def path(name):
    """Path of a file that ships with the samples, such as "quantize_linear.onnx": a model of one QuantizeLinear node.

    Raises
    ------
    ValueError
        If there is no such file.

    Examples
    --------
    >>> path("quantize_linear.onnx").endswith(".onnx")
    True
    """
    file = FOLDER / name
    if not file.is_file():
        raise ValueError(f"there is no sample file {name!r}")
    return str(file)


def _stored(file, name):
    with np.load(path(file)) as arrays:
        return arrays[name]
