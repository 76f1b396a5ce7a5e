"""BERT: a post-norm transformer encoder that sees both sides of every word.

Devlin et al. 2018, https://arxiv.org/abs/1810.04805. Checked against transformers' modeling_bert.py (5.23), which
reads the published PyTorch checkpoints; Google's original is google-research/bert, modeling.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..checkpoint.config import Family, FamilyConfig
from ..checkpoint.keymap import ALIAS, DROP, FUSE, KeyMap
from ..errors import ConfigError
from ..heads import (
    MaskedLM,
    MultipleChoice,
    NextSentencePrediction,
    PreTraining,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    WordPrediction,
)
from ..layers import ACTIVATIONS, Attention, FeedForward, Linear, NormalisedEmbeddings, PostNormBlock
from ..transformer import Encoder


@dataclass(frozen=True)
class BertConfig(FamilyConfig):
    """Defaults are bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    classifier_dropout: float | None = None  # None: hidden_dropout_prob

    MODEL_TYPE: ClassVar[str] = "bert"
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"hidden_act": tuple(ACTIVATIONS)}
    ADJUSTABLE: ClassVar[tuple[str, ...]] = (
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "layer_norm_eps",
        "initializer_range",
    )
    FIXED: ClassVar[dict[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(f"pad_token_id = {self.pad_token_id}: expected less than vocab_size = {self.vocab_size}")


KEYS = KeyMap(
    transformer=[
        ("embeddings.word.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.position.weight", "embeddings.position_embeddings.weight"),
        ("embeddings.token_type.weight", "embeddings.token_type_embeddings.weight"),
        ("embeddings.norm.{wb}", "embeddings.LayerNorm.{wb}"),
        (None, DROP("embeddings.position_ids", "it counts 0, 1, 2 …; positions are computed")),
        (
            "layers.{i}.attention.qkv.{wb}",
            FUSE(
                "encoder.layer.{i}.attention.self.query.{wb}",
                "encoder.layer.{i}.attention.self.key.{wb}",
                "encoder.layer.{i}.attention.self.value.{wb}",
            ),
        ),
        ("layers.{i}.attention.output.{wb}", "encoder.layer.{i}.attention.output.dense.{wb}"),
        ("layers.{i}.attention_norm.{wb}", "encoder.layer.{i}.attention.output.LayerNorm.{wb}"),
        ("layers.{i}.feed_forward.inner.{wb}", "encoder.layer.{i}.intermediate.dense.{wb}"),
        ("layers.{i}.feed_forward.output.{wb}", "encoder.layer.{i}.output.dense.{wb}"),
        ("layers.{i}.feed_forward_norm.{wb}", "encoder.layer.{i}.output.LayerNorm.{wb}"),
        ("pooler.{wb}", "pooler.dense.{wb}"),
    ],
    heads=[
        ("head.dense.{wb}", "cls.predictions.transform.dense.{wb}"),
        ("head.norm.{wb}", "cls.predictions.transform.LayerNorm.{wb}"),
        ("head.bias", "cls.predictions.bias"),
        ("head.bias", ALIAS("cls.predictions.decoder.bias")),
        ("embeddings.word.weight", ALIAS("cls.predictions.decoder.weight")),
        ("next_sentence.{wb}", "cls.seq_relationship.{wb}"),
        ("classifier.{wb}", "classifier.{wb}"),
        ("qa_outputs.{wb}", "qa_outputs.{wb}"),
    ],
    prefix=("transformer.", "bert."),
)
FAMILY = Family("bert", BertConfig, KEYS)


class BertModel(Encoder):
    """The encoder. `pooler=False` leaves out the map that makes `pooler_output` of the first token."""

    family = FAMILY

    def __init__(self, config: BertConfig, pooler: bool = True):
        size = config.hidden_size
        super().__init__(
            config,
            NormalisedEmbeddings(
                config.vocab_size,
                config.max_position_embeddings,
                config.type_vocab_size,
                size,
                padding=config.pad_token_id,
                eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
            ),
            [_block(config) for _ in range(config.num_hidden_layers)],
            Linear(size, size) if pooler else None,
        )


class BertForPreTraining(PreTraining):
    def __init__(self, config: BertConfig):
        super().__init__(BertModel(config), _word_prediction(config), config.hidden_size)


class BertForMaskedLM(MaskedLM):
    def __init__(self, config: BertConfig):
        super().__init__(BertModel(config, pooler=False), _word_prediction(config))


class BertForNextSentencePrediction(NextSentencePrediction):
    def __init__(self, config: BertConfig):
        super().__init__(BertModel(config), config.hidden_size)


class BertForSequenceClassification(SequenceClassification):
    def __init__(self, config: BertConfig, num_labels: int = 2):
        super().__init__(BertModel(config), config.hidden_size, num_labels, _classifier_dropout(config))


class BertForMultipleChoice(MultipleChoice):
    def __init__(self, config: BertConfig):
        super().__init__(BertModel(config), config.hidden_size, _classifier_dropout(config))


class BertForTokenClassification(TokenClassification):
    def __init__(self, config: BertConfig, num_labels: int = 2):
        super().__init__(BertModel(config, pooler=False), config.hidden_size, num_labels, _classifier_dropout(config))


class BertForQuestionAnswering(QuestionAnswering):
    def __init__(self, config: BertConfig):
        super().__init__(BertModel(config, pooler=False), config.hidden_size)


def _block(config: BertConfig) -> PostNormBlock:
    size = config.hidden_size
    return PostNormBlock(
        Attention(size, config.num_attention_heads, dropout=config.attention_probs_dropout_prob),
        FeedForward(size, config.intermediate_size, config.hidden_act),
        size,
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
    )


def _classifier_dropout(config: BertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _word_prediction(config: BertConfig) -> WordPrediction:
    return WordPrediction(config.hidden_size, config.vocab_size, config.hidden_act, config.layer_norm_eps)
