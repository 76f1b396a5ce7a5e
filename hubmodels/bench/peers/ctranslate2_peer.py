"""CTranslate2, which leaves out padding itself, in float32 and int8."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import DecoderRun, EncoderRun, PeerError, need, quiet
from .torch_peers import from_transformers


def ctranslate2_encoder(directory: Path, dtype: str) -> EncoderRun:
    """It computes no padding; its states come back in the padded shape."""
    ctranslate2, numpy = need("ctranslate2"), need("numpy")
    model = _ctranslate2_model(directory, dtype, ctranslate2.Encoder)

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, lengths = input_ids.int().contiguous(), attention_mask.sum(1, dtype=torch.int32)
        view = ctranslate2.StorageView.from_array
        found = model.forward_batch(view(ids.numpy()), view(lengths.numpy())).last_hidden_state
        states = torch.from_numpy(numpy.asarray(found))
        return states if attention_mask.all() else states * attention_mask.unsqueeze(2)

    return run


def _ctranslate2_model(directory: Path, dtype: str, cls: Any) -> Any:
    """Converted on the way: cls(the converted directory)"""
    converter = _ctranslate2_converter(directory)
    with tempfile.TemporaryDirectory() as work:
        target = str(Path(work, "model"))
        with quiet():
            converter.convert(target)
        try:
            return cls(target, "cpu", compute_type=dtype, inter_threads=1, intra_threads=torch.get_num_threads())
        except ValueError as error:
            raise PeerError(f"ctranslate2: dtype = {dtype!r}: it does not compute in that here: {error}") from error


def _ctranslate2_converter(directory: Path) -> Any:
    """CTranslate2's own, which would also read a tokenizer, and a field that transformers 5 has no more."""
    need("transformers")
    base: Any = need("ctranslate2.converters").TransformersConverter

    class Converter(base):
        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            self.model = from_transformers(model_class.__name__, Path(model_name_or_path))
            self.model.config.position_embedding_type = "absolute"
            return self.model

        def load_tokenizer(self, *_: Any, **__: Any) -> "_Numbers":
            return _Numbers(self.model.config.vocab_size)

    return Converter(str(directory))


class _Numbers:
    """What CTranslate2 asks of a tokenizer; the words are the ids' numbers."""

    unk_token = bos_token = eos_token = "0"

    def __init__(self, words: int):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.words)}


def ctranslate2_decoder(directory: Path, dtype: str) -> DecoderRun:
    """`generate_batch`, greedy."""
    ctranslate2 = need("ctranslate2")
    model = _ctranslate2_model(directory, dtype, ctranslate2.Generator)
    config = need("transformers").AutoConfig.from_pretrained(directory)
    options = {"include_prompt_in_result": False, "end_token": [config.vocab_size]}  # no word: it never stops

    def run(input_ids: Tensor, n: int) -> Tensor:
        prompts = [[str(number) for number in row] for row in input_ids.tolist()]
        found = model.generate_batch(prompts, max_length=n, **options)
        return torch.tensor([result.sequences_ids[0] for result in found])

    return run
