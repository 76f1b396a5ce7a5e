"""The names and calls of pytorch-pretrained-bert 0.6, for code written for the entry points that PyTorch Hub once had.

The same models: only `forward` takes and gives what it did there, bare tensors and tuples, -1 for what is not labelled.
Source: huggingface/pytorch-transformers v0.6.2, hubconfs/gpt_hubconf.py, gpt2_hubconf.py, modeling_openai.py,
modeling_gpt2.py.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from typing_extensions import Unpack

from ..cache import Cache
from ..families import gpt, gpt2
from ..loading import ModelOptions, load_model
from .gpt import gptTokenizer
from .help import help_page, signature

F = TypeVar("F", bound=Callable)


class OriginalGptModel(gpt.GptModel):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """[B, S] -> [B, S, D]"""
        return super().forward(input_ids, None, token_type_ids, position_ids=position_ids).last_hidden_state


class OriginalGpt(gpt.Gpt):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
    ) -> Tensor:
        """[B, S] -> logits [B, S, V]; with lm_labels [B, S] the loss."""
        labels = _labels(lm_labels)
        output = super().forward(input_ids, None, token_type_ids, position_ids=position_ids, labels=labels)
        return output.logits if output.loss is None else output.loss


class OriginalGptDoubleHeads(gpt.GptDoubleHeads):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        mc_token_ids: Tensor,
        lm_labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | list[Tensor]:
        """[B, C, S], [B, C] -> logits [B, C, S, V] and [B, C]; with labels of either kind a list of their losses."""
        output = super().forward(
            input_ids,
            None,
            token_type_ids,
            position_ids=position_ids,
            mc_token_ids=mc_token_ids,
            labels=_labels(lm_labels),
            mc_labels=_labels(mc_labels),
        )
        losses = [loss for loss in (output.loss, output.mc_loss) if loss is not None]
        return losses or (output.logits, output.mc_logits)


class OriginalGpt2(gpt2.Gpt2):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
        past: Cache | None = None,
    ) -> tuple[Tensor, Cache] | Tensor:
        """[B, S] -> logits [B, S, V] and what to give as `past` with the tokens that follow; with lm_labels the loss.

        `past` is one cache that grows, not a new list each time: of two continuations of one text only one can go on.
        """
        cache = past
        if cache is None and lm_labels is None:
            cache = self.transformer.new_cache(len(input_ids), self.config.max_position_embeddings)
        labels = _labels(lm_labels)
        output = super().forward(input_ids, None, token_type_ids, position_ids=position_ids, labels=labels, cache=cache)
        return (output.logits, cache) if output.loss is None else output.loss  # type: ignore[return-value]


def _labels(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.masked_fill(labels == -1, -100)


def _renamed(function: F, name: str) -> F:
    """The same entry point under its original name."""

    @functools.wraps(function)
    def entry(*args, **options):
        return function(*args, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = name + (function.__doc__ or "").removeprefix(function.__name__)
    return entry  # type: ignore[return-value]


openAIGPTTokenizer = _renamed(gptTokenizer, "openAIGPTTokenizer")


@help_page(gpt.FAMILY, signature())
def openAIGPTModel(weights: str | Path, **options: Unpack[ModelOptions]) -> OriginalGptModel:
    """`gptModel` with its original call: model(input_ids, position_ids=None, token_type_ids=None) is the states
    [B, S, D].

    >>> tokenizer, model = openAIGPTTokenizer("gpt-nano"), openAIGPTModel("gpt-nano")
    >>> tokens = tokenizer.tokenize("Who was Jim Henson ? Jim Henson was a puppeteer")
    >>> model(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])).dim()
    3
    """
    return load_model(OriginalGptModel, gpt.FAMILY, weights, **options)


@help_page(gpt.FAMILY, signature())
def openAIGPTLMHeadModel(weights: str | Path, **options: Unpack[ModelOptions]) -> OriginalGpt:
    """`gpt` with its original call: model(input_ids, position_ids=None, token_type_ids=None, lm_labels=None) is the
    logits [B, S, V]; with lm_labels the loss.

    >>> tokenizer, model = openAIGPTTokenizer("gpt-nano"), openAIGPTLMHeadModel("gpt-nano")
    >>> tokens = tokenizer.tokenize("Who was Jim Henson ? Jim Henson was a puppeteer")
    >>> predictions = model(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]))
    >>> len(tokenizer.convert_ids_to_tokens([torch.argmax(predictions[0, -1, :]).item()]))
    1
    """
    return load_model(OriginalGpt, gpt.FAMILY, weights, **options)


@help_page(gpt.FAMILY, signature("head_seed"))
def openAIGPTDoubleHeadsModel(weights: str | Path, **options: Unpack[ModelOptions]) -> OriginalGptDoubleHeads:
    """`gptDoubleHeads` with its original call: model(input_ids, mc_token_ids, lm_labels=None, mc_labels=None,
    token_type_ids=None, position_ids=None) is both logits, [B, C, S, V] and [B, C]; with labels a list of the losses.

    >>> tokenizer, model = openAIGPTTokenizer("gpt-nano"), openAIGPTDoubleHeadsModel("gpt-nano", head_seed=0)
    >>> rows = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f"It was {x} .")) for x in ("he", "me")]
    >>> lm_logits, mc_logits = model(torch.tensor([rows]), torch.tensor([[3, 3]]))
    >>> mc_logits.shape
    torch.Size([1, 2])
    """
    return load_model(OriginalGptDoubleHeads, gpt.FAMILY, weights, **options)


@help_page(gpt2.FAMILY, signature())
def gpt2LMHeadModel(weights: str | Path, **options: Unpack[ModelOptions]) -> OriginalGpt2:
    """`gpt2` with its original call: model(input_ids, position_ids=None, token_type_ids=None, lm_labels=None,
    past=None) is the logits [B, S, V] and the past, to go in with the tokens that follow; with lm_labels the loss.

    >>> model = gpt2LMHeadModel("distilgpt2", pretrained=False)  # new parameters: nothing is downloaded
    >>> predictions, past = model(torch.tensor([[464, 4074]]))
    >>> model(torch.tensor([[5955]]), past=past)[0].shape
    torch.Size([1, 1, 50257])
    """
    return load_model(OriginalGpt2, gpt2.FAMILY, weights, **options)
