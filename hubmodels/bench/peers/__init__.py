"""Other libraries on the same checkpoint, each set up as its own documentation says for speed on a CPU.

A peer is a builder: (directory, dtype) -> a callable. The directory holds config.json and model.safetensors as
`hubmodels.export` writes them; dtype is "float32", "bfloat16" or "int8". Every peer computes on as many threads as
torch does, and nothing of it is imported before it is built. Padding is on the right.
"""

from .common import DecoderBuilder, EncoderBuilder, PeerError
from .ctranslate2_peer import ctranslate2_decoder, ctranslate2_encoder
from .onnx_peer import onnx_decoder, onnx_encoder
from .openvino_peer import openvino_decoder, openvino_encoder
from .torch_peers import (
    transformer_encoder,
    transformers_compiled,
    transformers_decoder,
    transformers_eager,
    transformers_encoder,
    transformers_static,
)

ENCODERS: dict[str, EncoderBuilder] = {
    "transformers": transformers_encoder,
    "transformers eager": transformers_eager,
    "transformers compiled": transformers_compiled,
    "transformer encoder": transformer_encoder,
    "onnxruntime": onnx_encoder,
    "openvino": openvino_encoder,
    "ctranslate2": ctranslate2_encoder,
}
DECODERS: dict[str, DecoderBuilder] = {
    "transformers": transformers_decoder,
    "transformers static": transformers_static,
    "onnxruntime": onnx_decoder,
    "openvino": openvino_decoder,
    "ctranslate2": ctranslate2_decoder,
}
ON_CPU = ("onnxruntime", "openvino", "ctranslate2")  # the others' builders also take the device

__all__ = ["DECODERS", "ENCODERS", "ON_CPU", "PeerError"]
