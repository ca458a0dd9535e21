"""Small real arrays that ship with the package, so that the first lessons need neither torch nor a download.

They come from SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0); `qlab.samples.extract` is the script that made them.
"""

from importlib import resources

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
    with resources.files(__name__).joinpath(_FILE).open("rb") as file, np.load(file) as arrays:
        if name not in arrays.files:
            raise ValueError(f"name must be one of {', '.join(sorted(arrays.files))}, got {name!r}")
        return arrays[name].astype(np.float32)
