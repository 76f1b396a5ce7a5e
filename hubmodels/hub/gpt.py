"""GPT's entry points. Each is one line into `loading`; its docstring is its help page."""

from pathlib import Path

from typing_extensions import Unpack

from ..families import gpt as family
from ..loading import ModelOptions, load_model, load_tokenizer
from ..tokenizers import BytePairTokenizer
from .help import TOKENIZER, help_page, signature


@help_page(family.FAMILY, TOKENIZER)
def gptTokenizer(weights: str | Path, *, progress: bool = True, cache_dir=None) -> BytePairTokenizer:
    """Text -> tensors for the GPT models.

    tokenizer(texts, max_length=None, offsets=False) takes one text or a list, and gives input_ids and attention_mask,
    each [B, S]. Also: decode, tokens, tokenize, convert_tokens_to_ids, convert_ids_to_tokens, end_token_id, vocab_size.
    openai-gpt's is lower-cased and forgets how words were parted; gpt-nano's, like GPT-2's, gives every text back.
    weights may also be the path of a tokenizer.json, or of a directory with one or with a vocabulary and its merges.

    >>> tokenizer = gptTokenizer("gpt-nano")
    >>> tokenizer.decode(tokenizer("The ship sailed.")["input_ids"][0])
    'The ship sailed.'
    """
    return load_tokenizer(BytePairTokenizer, weights, progress=progress, cache_dir=cache_dir)


@help_page(family.FAMILY, signature())
def gptModel(weights: str | Path, **options: Unpack[ModelOptions]) -> family.GptModel:
    """The decoder: last_hidden_state [B, S, D], zeros at padding.

    >>> tokenizer, model = gptTokenizer("gpt-nano"), gptModel("gpt-nano")
    >>> model(**tokenizer(["The ship sailed.", "It sank."])).last_hidden_state.shape[-1]
    224
    """
    return load_model(family.GptModel, family.FAMILY, weights, **options)


@help_page(family.FAMILY, signature())
def gpt(weights: str | Path, **options: Unpack[ModelOptions]) -> family.Gpt:
    """The language model: which word comes next? logits [B, S, V].

    labels [B, S] (-100 = none), as a rule the input_ids themselves, give the loss. model.generate(**inputs) goes on
    from the input; model.stream gives each token as it comes.

    >>> tokenizer, model = gptTokenizer("gpt-nano"), gpt("gpt-nano")
    >>> prompt = tokenizer("The ship")
    >>> added = model.generate(**prompt, max_new_tokens=5)[0].ids
    >>> tokenizer.decode([*prompt["input_ids"][0], *added]).startswith("The ship")
    True
    """
    return load_model(family.Gpt, family.FAMILY, weights, **options)


@help_page(family.FAMILY, signature("head_seed"))
def gptDoubleHeads(weights: str | Path, **options: Unpack[ModelOptions]) -> family.GptDoubleHeads:
    """The language model with a second head that chooses between C candidates: logits [B, C, S, V], mc_logits [B, C].

    Inputs are [B, C, S]. mc_token_ids [B, C] says which column decides; if not given, each candidate's last token.
    labels [B, C, S] give loss, mc_labels [B] give mc_loss.

    >>> tokenizer, model = gptTokenizer("gpt-nano"), gptDoubleHeads("gpt-nano", head_seed=0)
    >>> inputs = tokenizer(["The ship sailed.", "The ship sang."])
    >>> model(**{name: tensor[None] for name, tensor in inputs.items()}).mc_logits.shape
    torch.Size([1, 2])
    """
    return load_model(family.GptDoubleHeads, family.FAMILY, weights, **options)
