"""GPT: BERT's post-norm blocks, but every word sees only those before it, and the model says which comes next.

Radford et al. 2018, https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf.
Checked against transformers' modeling_openai.py (5.23); OpenAI's original is openai/finetune-transformer-lm, train.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..checkpoint.config import Family, OpenAIConfig
from ..checkpoint.keymap import ALIAS, DROP, TRANSPOSE, KeyMap
from ..language_model import DoubleHeads, LanguageModel
from ..layers import Attention, Embeddings, FeedForward, PostNormBlock
from ..transformer import Decoder

# What the family's config.json calls gelu is the tanh form; its names are older than those of today.
_ACTIVATIONS = {"gelu": "gelu_new", "swish": "silu"}


@dataclass(frozen=True)
class GptConfig(OpenAIConfig):
    """Defaults are openai-gpt."""

    vocab_size: int = 40478
    max_position_embeddings: int = 512

    MODEL_TYPE: ClassVar[str] = "openai-gpt"
    SPELLED: ClassVar[dict[str, str]] = {**OpenAIConfig.SPELLED, "afn": "hidden_act"}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"hidden_act": ("gelu_new", "relu", "silu")}
    FIXED: ClassVar[dict[str, Any]] = {
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_proj_to_labels": True,
        "summary_activation": None,
    }

    @classmethod
    def from_published(cls, published: Mapping[str, Any], source: str) -> Self:
        spelled = published.get("afn", "gelu")
        activation = _ACTIVATIONS.get(spelled, spelled) if isinstance(spelled, str) else spelled
        return super().from_published({**published, "afn": activation}, source)

    def to_published(self) -> dict[str, Any]:
        published = super().to_published()
        return {**published, "afn": {"gelu_new": "gelu"}.get(published["afn"], published["afn"])}


KEYS = KeyMap(
    transformer=[
        ("embeddings.word.weight", "tokens_embed.weight"),
        ("embeddings.position.weight", "positions_embed.weight"),
        (None, DROP("position_ids", "it counts 0, 1, 2 …; positions are computed")),
        ("layers.{i}.attention.qkv.weight", TRANSPOSE("h.{i}.attn.c_attn.weight")),
        ("layers.{i}.attention.qkv.bias", "h.{i}.attn.c_attn.bias"),
        ("layers.{i}.attention.output.weight", TRANSPOSE("h.{i}.attn.c_proj.weight")),
        ("layers.{i}.attention.output.bias", "h.{i}.attn.c_proj.bias"),
        (None, DROP("h.{i}.attn.bias", "it is the triangle of the causal mask, which is computed")),
        ("layers.{i}.attention_norm.{wb}", "h.{i}.ln_1.{wb}"),
        ("layers.{i}.feed_forward.inner.weight", TRANSPOSE("h.{i}.mlp.c_fc.weight")),
        ("layers.{i}.feed_forward.inner.bias", "h.{i}.mlp.c_fc.bias"),
        ("layers.{i}.feed_forward.output.weight", TRANSPOSE("h.{i}.mlp.c_proj.weight")),
        ("layers.{i}.feed_forward.output.bias", "h.{i}.mlp.c_proj.bias"),
        ("layers.{i}.feed_forward_norm.{wb}", "h.{i}.ln_2.{wb}"),
    ],
    heads=[
        ("embeddings.word.weight", ALIAS("lm_head.weight")),
        ("choice.{wb}", "multiple_choice_head.summary.{wb}"),
    ],
    prefix=("transformer.", "transformer."),
)
FAMILY = Family("gpt", GptConfig, KEYS)


class GptModel(Decoder):
    family = FAMILY
    architecture = "OpenAIGPTModel"

    def __init__(self, config: GptConfig):
        size = config.hidden_size
        super().__init__(
            config,
            Embeddings(config.vocab_size, config.max_position_embeddings, size, dropout=config.embedding_dropout_prob),
            [_block(config) for _ in range(config.num_hidden_layers)],
        )


class Gpt(LanguageModel):
    architecture = "OpenAIGPTLMHeadModel"

    def __init__(self, config: GptConfig):
        super().__init__(GptModel(config))


class GptDoubleHeads(DoubleHeads):
    architecture = "OpenAIGPTDoubleHeadsModel"

    def __init__(self, config: GptConfig):
        super().__init__(GptModel(config), config.hidden_size, config.summary_dropout_prob)


def _block(config: GptConfig) -> PostNormBlock:
    size = config.hidden_size
    return PostNormBlock(
        Attention(size, config.num_attention_heads, dropout=config.attention_probs_dropout_prob),
        FeedForward(size, 4 * size, config.hidden_act),
        size,
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
    )
