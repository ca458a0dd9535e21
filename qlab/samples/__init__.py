"""Small real arrays that ship with the package, so that the first lessons need neither torch nor a download.

They come from SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0); `qlab.samples.extract` is the script that made them.
"""

from pathlib import Path

import numpy as np

_FILE = "smollm2.npz"


def load(name):
    """One of the sample arrays.

    Parameters
    ----------
    name : {"activations", "new_activations", "weights"}
        ``activations`` (128 tokens × 576 channels): input of an MLP in layer 5 while the model reads English prose.
        ``new_activations`` (64 × 576): the same place while it reads Python source code.
        ``weights`` (192 × 576): rows of the weight matrix that these inputs meet.

    Returns
    -------
    float32 array
        Stored as float16; the units are the model's own.

    Raises
    ------
    ValueError
        If there is no such array.

    Examples
    --------
    >>> load("activations").shape
    (128, 576)
    """
    with np.load(path(_FILE)) as arrays:
        if name not in arrays.files:
            raise ValueError(f"name must be one of {', '.join(sorted(arrays.files))}, got {name!r}")
        return arrays[name].astype(np.float32)


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
    file = Path(__file__).with_name(name)
    if not file.is_file():
        raise ValueError(f"there is no sample file {name!r}")
    return str(file)
