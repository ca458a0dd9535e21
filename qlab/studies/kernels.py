"""Lesson 08's stopwatch: matrices in float, 8 and 4 bits, multiplied by the kernels of ONNX Runtime.

The weights stay outside of the ONNX model, in arrays that are given to its session: no file takes them up once more.
"""

import time

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from qlab import smollm
from qlab.affine import absmax_params, check_integer, quantize, zero_point_params

KINDS = ("FP32", "int8", "4 bits")
GROUP = 64
_CONTRIB = "com.microsoft"


def packed(codes, params):
    """Codes and zero-points of 4 bits as MatMulNBits stores them: two in a byte, the first in the low half.

    Parameters
    ----------
    codes : int array, shape (outputs, inputs)
        From −8 to 7, as `qlab.affine.zero_point_params` gives them; both of torch or NumPy.
    params : QParams
        With ``group_size``.

    Returns
    -------
    uint8 arrays, shapes (outputs, groups, group_size / 2) and (outputs, groups rounded up to even / 2)

    Examples
    --------
    >>> w = np.array([[-1.0, 0.5, 2.0, 0.0]], np.float32)
    >>> params = zero_point_params(w, 4, group_size=2)
    >>> quantize(w, params), params.zero_point
    (array([[-8,  7,  7, -8]], dtype=int32), array([[ 2, -8]], dtype=int32))
    >>> packed(quantize(w, params), params)
    (array([[[240],
            [ 15]]], dtype=uint8), array([[10]], dtype=uint8))
    """
    unsigned, zeros = (np.asarray(a).astype(np.int16) + 8 for a in (codes, params.zero_point))
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    blocks = unsigned.reshape(len(unsigned), -1, params.group_size)
    return tuple((a[..., ::2] + 16 * a[..., 1::2]).astype(np.uint8) for a in (blocks, zeros))


def four_bit(x, codes, params, accuracy_level=0):
    """x Ŵᵀ by ONNX Runtime's MatMulNBits, from codes of 4 bits.

    Parameters
    ----------
    x : float32 array, shape (tokens, inputs)
    codes, params
        As `packed`.
    accuracy_level : int
        0: computed in float32; 4: x may be rounded to 8 bits on the way.

    Returns
    -------
    float32 array, shape (tokens, outputs)

    Examples
    --------
    >>> w = np.eye(64, dtype=np.float32)
    >>> params = zero_point_params(w, 4, group_size=64)
    >>> x = np.arange(64, dtype=np.float32)[None]
    >>> bool(np.abs(four_bit(x, quantize(w, params), params) - x).max() < 1e-4)
    True
    """
    return _session([_four_bits(codes, params, accuracy_level)], gather=False).run(None, {f"x{x.shape[1]}": x})[0]


class Stopwatch:
    """All matrices of a model's blocks, one product after the other, by one thread.

    Parameters
    ----------
    model : SmolLM
    kind : str, of ``KINDS``
        "int8": one scale for each row, codes of 7 bits in a byte, as ONNX Runtime advises for processors without
        VNNI; activations rounded to 8 bits on the way. "4 bits": groups of 64 with zero-points, and accuracy level 4,
        which does the same with activations.

    Examples
    --------
    >>> model = smollm.SmolLM(smollm.Sizes(vocab_size=9, hidden_size=64, intermediate_size=128, num_hidden_layers=1))
    >>> Stopwatch(model, "4 bits").milliseconds(tokens=2, repeats=3) > 0
    True
    """

    def __init__(self, model, kind):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        make = {"FP32": _float, "int8": _eight_bits, "4 bits": _rounded}[kind]
        nodes = []
        for block in model.blocks:
            for names in smollm.READERS.values():
                nodes.append(make(torch.cat([getattr(block, name).weight.detach() for name in names])))
        self._widths = {node.inputs for node in nodes}
        self._session = _session(nodes)

    def milliseconds(self, tokens, repeats=5):
        """The least time of several, after one to warm up."""
        tokens, repeats = check_integer(tokens, "tokens", 1), check_integer(repeats, "repeats", 1)
        chance = np.random.default_rng(0)
        x = {f"x{n}": chance.normal(size=(tokens, n)).astype(np.float32) for n in self._widths}
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self._session.run(None, x)
            times.append(time.perf_counter() - start)
        return 1000 * min(times[1:])


def machine():
    """Bytes per second that one thread reads, and its operations per second in a product of float32 matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        much, square = torch.ones(1 << 26), torch.ones(1024, 1024)
        read = min(_seconds(much.sum) for _ in range(4))
        multiplied = min(_seconds(lambda: square @ square) for _ in range(4))
    finally:
        torch.set_num_threads(threads)
    return much.nbytes / read, 2 * 1024**3 / multiplied


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _Node:
    """One product: its operator, attributes and constants, and how many inputs and outputs it has."""

    def __init__(self, operator, constants, inputs, outputs, domain="", **attributes):
        self.operator, self.constants, self.domain, self.attributes = operator, constants, domain, attributes
        self.inputs, self.outputs = inputs, outputs


def _float(w):
    return _Node("Gemm", [w.numpy()], w.shape[1], w.shape[0], transB=1)


def _eight_bits(w):
    params = absmax_params(w, 7, axis=0)  # in a byte: without VNNI, kernels add two products in 16 bits, which saturate
    codes = quantize(w, params).T.to(torch.int8).contiguous().numpy()
    return _Node("DynamicQuantizeMatMul", [codes, params.scale.numpy()], w.shape[1], w.shape[0], _CONTRIB)


def _rounded(w):
    params = zero_point_params(w, 4, group_size=GROUP)
    return _four_bits(quantize(w, params), params, 4)


def _four_bits(codes, params, accuracy_level):
    outputs, inputs = codes.shape
    codes, zeros = packed(codes, params)
    return _Node("MatMulNBits", [codes, np.asarray(params.scale, dtype=np.float32), zeros], inputs, outputs, _CONTRIB,
                 K=inputs, N=outputs, bits=4, block_size=params.group_size, accuracy_level=accuracy_level)


def _session(nodes, gather=True):
    """A session that computes the products; with ``gather`` only the first token of each is handed out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    names, arrays = [], []
    for i, node in enumerate(nodes):
        names += [f"{i}.{j}" for j in range(len(node.constants))]
        arrays += [np.ascontiguousarray(constant) for constant in node.constants]
    options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays])
    return onnxruntime.InferenceSession(_file(nodes, gather), options)


def _file(nodes, gather):
    """The bytes of an ONNX model."""
    made, constants, outputs = [], [], []
    for i, node in enumerate(nodes):
        product, output = f"product {i}" if gather else f"output {i}", f"output {i}"
        names = [f"{i}.{j}" for j in range(len(node.constants))]
        made.append(helper.make_node(node.operator, [f"x{node.inputs}", *names], [product], domain=node.domain,
                                     **node.attributes))
        constants += map(_outside, names, node.constants)
        if gather:
            made.append(helper.make_node("Gather", [product, "first"], [output]))
        outputs.append(_matrix(output, node.outputs))
    if gather:
        constants.append(helper.make_tensor("first", TensorProto.INT64, [1], [0]))
    inputs = [_matrix(f"x{n}", n) for n in {node.inputs for node in nodes}]
    graph = helper.make_graph(made, "qlab", inputs, outputs, constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=versions).SerializeToString()


def _matrix(name, width):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])


def _outside(name, array):
    """A constant whose numbers are given to the session."""
    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                         data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    tensor.external_data.add(key="location", value="given")
    return tensor
