"""A quantized network as an ONNX file. ``python -m tests.onnx_export`` writes the sample ``digits_int8.onnx``."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

from qlab import digits, ptq, samples
from qlab.affine import as_numpy
from qlab.integer import _modules, _sum_scale, convert

FILE = "digits_int8.onnx"
_OPERATORS = {nn.ReLU: "Relu", nn.ReLU6: "Clip", nn.AdaptiveAvgPool2d: "GlobalAveragePool", nn.Flatten: "Flatten"}


def to_onnx(model, input_shape):
    """The network of `qlab.integer.convert` as an ONNX model in QDQ form (opset 21): bytes.

    What enters a layer passes QuantizeLinear and DequantizeLinear; weights and biases are stored as int8 and int32, and
    pass DequantizeLinear. Engines fuse these nodes and the Conv or Gemm between them into integer kernels. Input
    "images", float32 of shape (N, *input_shape); output "logits", float32. ONNX Runtime, "Quantize ONNX models",
    section "ONNX quantization representation format".
    """
    net = convert(model, input_shape)
    graph = _Graph()
    for name, module in _modules(model):
        graph.add(name or "layer", module, net.layers.get(name))
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", *net.input_shape])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", *net.output_shape])
    graph.node("Identity", [graph.last], "logits")
    built = helper.make_graph(graph.nodes, "qlab", [images], [logits], graph.constants)
    file = helper.make_model(built, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString()


class _Graph:
    """Nodes and constants of an ONNX graph that grows at its end."""

    def __init__(self):
        self.nodes, self.constants, self.last = [], [], "images"

    def constant(self, name, value, dtype):
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, operator, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def add(self, name, module, integers):
        """The nodes of one module; ``integers`` is its `IntegerLayer`, if it has one."""
        if integers:
            inputs = self.layer_inputs(name, module, integers)
            operator, attributes = "Gemm", {"transB": 1}
            if integers.weight.ndim == 4:
                operator, attributes = "Conv", {"strides": integers.stride, "pads": integers.padding * 2,
                                                "group": integers.groups}
        else:
            operator, inputs, attributes = _OPERATORS[type(module)], [self.last], {}
            if operator == "Clip":
                inputs += [self.constant(f"{name}.{end}", x, np.float32) for end, x in (("min", 0), ("max", 6))]
        self.last = self.node(operator, inputs, f"{name}.output", **attributes)

    def layer_inputs(self, name, module, integers):
        """x̂, ŵ and the bias, each out of a DequantizeLinear."""
        params = module.input_params
        grid = self.grid(f"{name}.input", params.scale, params.zero_point, np.int8)
        codes = self.node("QuantizeLinear", [self.last, *grid], f"{name}.input_codes")
        if (params.qmin, params.qmax) != (-128, 127):
            limits = [self.constant(f"{name}.{end}", getattr(params, end), np.int8) for end in ("qmin", "qmax")]
            codes = self.node("Clip", [codes, *limits], f"{name}.clipped_codes")
        values = [self.node("DequantizeLinear", [codes, *grid], f"{name}.input")]
        zero_point = module.weight_params.zero_point
        for part, q, s, z in (("weight", integers.weight, module.weight_params.scale, zero_point),
                              ("bias", integers.bias, _sum_scale(module), zero_point * 0)):
            stored = [self.constant(f"{name}.{part}_codes", q, q.dtype), *self.grid(f"{name}.{part}", s, z, q.dtype)]
            values.append(self.node("DequantizeLinear", stored, f"{name}.{part}", axis=0))
        return values

    def grid(self, name, scale, zero_point, dtype):
        return [self.constant(f"{name}_scale", as_numpy(scale), np.float32),
                self.constant(f"{name}_zero_point", as_numpy(zero_point), dtype)]


def lesson_network():
    """The digits network in 8 bits, as lesson 04 makes it."""
    folded = ptq.fold_batch_norm(digits.load())
    ranges = ptq.calibrate(ptq.observe(folded, digits.data().train_images[:256]), bits=8, calibrator="min-max")
    return ptq.quantize_static(folded, ranges, weight_bits=8, activation_bits=8)


if __name__ == "__main__":
    Path(samples.__file__).with_name(FILE).write_bytes(to_onnx(lesson_network(), (1, 8, 8)))
