"""ONNX Runtime's MultiHeadAttention on a CPU: the operator of a graph, with as many threads as torch has."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.peers.base import Peer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_INPUTS = ("query", "key", "value")
# Older ones than the newest, which ONNX may write before ONNX Runtime reads them.
_IR_VERSION, _OPSET = 10, 17


def peer() -> Peer:
    """The one contender, on packed qkv."""
    return Peer("onnxruntime", _attend, refuses=_reason)


def _reason(qkv: Tensor) -> str | None:
    if qkv.device.type != "cpu":
        return "is raced on CPUs only"
    if qkv.dtype != torch.float32:
        return f"has no MultiHeadAttention in {str(qkv.dtype).removeprefix('torch.')} on a CPU"
    return "has no backward" if qkv.requires_grad else None


def _attend(qkv: Tensor) -> Tensor:
    session = _session(qkv.shape[3], torch.get_num_threads())
    # It takes contiguous [B, N, C], and gives that.
    inputs = {name: x.contiguous().numpy() for name, x in zip(_INPUTS, qkv.flatten(3).unbind(2), strict=True)}
    (output,) = session.run(None, inputs)
    return torch.from_numpy(output)


@lru_cache(maxsize=4)
def _session(heads: int, threads: int) -> InferenceSession:
    import onnxruntime
    from onnx import TensorProto, helper

    def tensor(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", "channels"])

    domain = "com.microsoft"
    node = helper.make_node("MultiHeadAttention", _INPUTS, ["output"], domain=domain, num_heads=heads)
    graph = helper.make_graph([node], "attention", [tensor(name) for name in _INPUTS], [tensor("output")])
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads wait for the next call in a loop, which would take a core from the contender after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
