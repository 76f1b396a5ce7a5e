"""GPT-2's entry points. Each is one line into `loading`; its docstring is its help page."""

from pathlib import Path

from typing_extensions import Unpack

from ..families import gpt2 as family
from ..loading import ModelOptions, load_model, load_tokenizer
from ..tokenizers import BytePairTokenizer
from .help import TOKENIZER, help_page, signature


@help_page(family.FAMILY, TOKENIZER)
def gpt2Tokenizer(weights: str | Path, *, progress: bool = True, cache_dir=None) -> BytePairTokenizer:
    """Text -> tensors for the GPT-2 models.

    tokenizer(texts, max_length=None, offsets=False) takes one text or a list, and gives input_ids and attention_mask,
    each [B, S]. Also: decode, tokens, tokenize, convert_tokens_to_ids, convert_ids_to_tokens, end_token_id, vocab_size.
    Every text comes back from its ids. weights may also be the path of a tokenizer.json, or of a directory with one or
    with vocab.json and merges.txt.

    >>> tokenizer = gpt2Tokenizer("gpt-nano")  # the same kind; that of "gpt2" is downloaded
    >>> tokenizer.decode(tokenizer("naïve 🙂")["input_ids"][0])
    'naïve 🙂'
    """
    return load_tokenizer(BytePairTokenizer, weights, progress=progress, cache_dir=cache_dir)


@help_page(family.FAMILY, signature())
def gpt2Model(weights: str | Path, **options: Unpack[ModelOptions]) -> family.Gpt2Model:
    """The decoder: last_hidden_state [B, S, D], zeros at padding.

    >>> model = gpt2Model("distilgpt2", pretrained=False)  # new parameters: nothing is downloaded
    >>> model(torch.tensor([[464, 4074]])).last_hidden_state.shape
    torch.Size([1, 2, 768])
    """
    return load_model(family.Gpt2Model, family.FAMILY, weights, **options)


@help_page(family.FAMILY, signature())
def gpt2(weights: str | Path, **options: Unpack[ModelOptions]) -> family.Gpt2:
    """The language model: which word comes next? logits [B, S, V].

    labels [B, S] (-100 = none), as a rule the input_ids themselves, give the loss. model.generate(**inputs) goes on
    from the input; model.stream gives each token as it comes.

    >>> model = gpt2("distilgpt2", pretrained=False)  # new parameters: nothing is downloaded
    >>> len(model.generate(torch.tensor([[464, 4074]]), max_new_tokens=3)[0].ids)
    3
    """
    return load_model(family.Gpt2, family.FAMILY, weights, **options)
