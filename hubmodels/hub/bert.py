"""BERT's entry points. Each is one line into `loading`; its docstring is its help page."""

from pathlib import Path

from typing_extensions import Unpack

from ..families import bert
from ..loading import ModelOptions, load_model, load_tokenizer
from ..tokenizers import WordPieceTokenizer
from .help import TOKENIZER, help_page, signature


@help_page(bert.FAMILY, TOKENIZER)
def bertTokenizer(weights: str | Path, *, progress: bool = True, cache_dir=None) -> WordPieceTokenizer:
    """Text -> tensors for the BERT models.

    tokenizer(texts, pairs=None, max_length=None, offsets=False) takes one text or a list, and gives input_ids,
    attention_mask and token_type_ids, each [B, S]. Also: decode, tokens, mask_token, mask_token_id, vocab_size.
    weights may also be the path of a vocab.txt or tokenizer.json, or of a directory with one.

    >>> tokenizer = bertTokenizer("bert-nano")
    >>> tokenizer.decode(tokenizer("The ship sailed.")["input_ids"][0])
    'the ship sailed.'
    """
    return load_tokenizer(WordPieceTokenizer, weights, progress=progress, cache_dir=cache_dir)


@help_page(bert.FAMILY, signature("head_seed"))
def bertModel(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertModel:
    """The encoder with its pooler: last_hidden_state [B, S, D], zeros at padding, and pooler_output [B, D].

    >>> tokenizer, model = bertTokenizer("bert-nano"), bertModel("bert-nano")
    >>> model(**tokenizer(["The ship sailed.", "It sank."])).pooler_output.shape
    torch.Size([2, 256])
    """
    return load_model(bert.BertModel, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("head_seed"))
def bertForPreTraining(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertForPreTraining:
    """Both of BERT's pretraining tasks: prediction_logits [B, S, V] and seq_relationship_logits [B, 2].

    forward takes labels [B, S] (-100 = none) and next_sentence_label [B] (0 = follows, 1 = random) for the loss.

    >>> tokenizer, model = bertTokenizer("bert-nano"), bertForPreTraining("bert-nano")
    >>> model(**tokenizer("The ship sailed.", "It sank.")).seq_relationship_logits.shape
    torch.Size([1, 2])
    """
    return load_model(bert.BertForPreTraining, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("head_seed"))
def bertForMaskedLM(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertForMaskedLM:
    """Fill in [MASK]: logits [B, S, V].

    With labels [B, S] (-100 = none) also the loss; logits then has a row for each labelled position, [M, V].

    >>> tokenizer, model = bertTokenizer("bert-nano"), bertForMaskedLM("bert-nano")
    >>> inputs = tokenizer("the ship sailed across the [MASK] .")
    >>> words = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].topk(3).indices
    >>> words.shape
    torch.Size([1, 3])
    """
    return load_model(bert.BertForMaskedLM, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("head_seed"))
def bertForNextSentencePrediction(
    weights: str | Path, **options: Unpack[ModelOptions]
) -> bert.BertForNextSentencePrediction:
    """Does the second text follow the first? logits [B, 2]: class 0 it does, class 1 it is a random one.

    >>> tokenizer, model = bertTokenizer("bert-nano"), bertForNextSentencePrediction("bert-nano")
    >>> model(**tokenizer("The ship sailed.", "It sank.")).logits.shape
    torch.Size([1, 2])
    """
    return load_model(bert.BertForNextSentencePrediction, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("num_labels", "head_seed"))
def bertForSequenceClassification(
    weights: str | Path, **options: Unpack[ModelOptions]
) -> bert.BertForSequenceClassification:
    """A class per text or pair: logits [B, num_labels]. num_labels=1 is regression.

    labels: classes [B], floats [B, num_labels] for several classes at once, floats [B] for regression.

    >>> tokenizer = bertTokenizer("bert-nano")
    >>> model = bertForSequenceClassification("bert-nano", num_labels=3, head_seed=0)
    >>> model(**tokenizer(["The ship sailed.", "It sank."])).logits.shape
    torch.Size([2, 3])
    """
    return load_model(bert.BertForSequenceClassification, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("num_labels", "head_seed"))
def bertForTokenClassification(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertForTokenClassification:
    """A class per token: logits [B, S, num_labels]; labels [B, S], -100 = none.

    >>> tokenizer = bertTokenizer("bert-nano")
    >>> model = bertForTokenClassification("bert-nano", num_labels=5, head_seed=0)
    >>> model(**tokenizer("The ship sailed.")).logits.shape[-1]
    5
    """
    return load_model(bert.BertForTokenClassification, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("head_seed"))
def bertForQuestionAnswering(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertForQuestionAnswering:
    """Where an answer begins and ends: start_logits and end_logits [B, S].

    forward takes start_positions and end_positions [B] for the loss.

    >>> tokenizer = bertTokenizer("bert-nano")
    >>> model = bertForQuestionAnswering("bert-nano", head_seed=0)
    >>> start, end = model(**tokenizer("What sailed?", "The ship sailed."))[1:3]
    >>> start.shape == end.shape
    True
    """
    return load_model(bert.BertForQuestionAnswering, bert.FAMILY, weights, **options)


@help_page(bert.FAMILY, signature("head_seed"))
def bertForMultipleChoice(weights: str | Path, **options: Unpack[ModelOptions]) -> bert.BertForMultipleChoice:
    """Which of C candidates? Inputs [B, C, S], logits [B, C]; labels [B], the right one.

    >>> tokenizer = bertTokenizer("bert-nano")
    >>> model = bertForMultipleChoice("bert-nano", head_seed=0)
    >>> inputs = tokenizer(["The ship", "The ship"], ["sailed.", "sang."])
    >>> model(**{name: tensor[None] for name, tensor in inputs.items()}).logits.shape
    torch.Size([1, 2])
    """
    return load_model(bert.BertForMultipleChoice, bert.FAMILY, weights, **options)
