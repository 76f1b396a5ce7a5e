"""GPT-2: GPT with the norms moved before attention and feed-forward, and one more after the last block.

Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf.
Checked against transformers' modeling_gpt2.py (5.23); OpenAI's original is openai/gpt-2, src/model.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..checkpoint.config import Family, OpenAIConfig
from ..checkpoint.keymap import ALIAS, DROP, TRANSPOSE, KeyMap
from ..language_model import LanguageModel
from ..layers import ACTIVATIONS, Attention, Embeddings, FeedForward, LayerNorm, PreNormBlock
from ..transformer import Decoder

_END_OF_TEXT = 50256


@dataclass(frozen=True)
class Gpt2Config(OpenAIConfig):
    """Defaults are gpt2, the small one."""

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    intermediate_size: int | None = None  # None: 4 * hidden_size
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    MODEL_TYPE: ClassVar[str] = "gpt2"
    SPELLED: ClassVar[dict[str, str]] = {
        **OpenAIConfig.SPELLED,
        "activation_function": "hidden_act",
        "n_inner": "intermediate_size",
    }
    # reorder_and_upcast_attn is about the rounding of scores in half precision: our kernels add them up in float32.
    SILENT: ClassVar[frozenset[str]] = OpenAIConfig.SILENT | {
        "reorder_and_upcast_attn",
        "summary_type",
        "summary_use_proj",
        "summary_proj_to_labels",
        "summary_activation",
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"hidden_act": tuple(ACTIVATIONS)}
    FIXED: ClassVar[dict[str, Any]] = {"add_cross_attention": False}

    def to_published(self) -> dict[str, Any]:
        """transformers takes <|endoftext|>'s id for granted, also of a vocabulary that is too small for it."""
        ends = {} if self.vocab_size > _END_OF_TEXT else {"bos_token_id": None, "eos_token_id": None}
        return {**super().to_published(), **ends}


KEYS = KeyMap(
    transformer=[
        ("embeddings.word.weight", "wte.weight"),
        ("embeddings.position.weight", "wpe.weight"),
        ("layers.{i}.attention_norm.{wb}", "h.{i}.ln_1.{wb}"),
        ("layers.{i}.attention.qkv.weight", TRANSPOSE("h.{i}.attn.c_attn.weight")),
        ("layers.{i}.attention.qkv.bias", "h.{i}.attn.c_attn.bias"),
        ("layers.{i}.attention.output.weight", TRANSPOSE("h.{i}.attn.c_proj.weight")),
        ("layers.{i}.attention.output.bias", "h.{i}.attn.c_proj.bias"),
        (None, DROP("h.{i}.attn.bias", "it is the triangle of the causal mask, which is computed")),
        (None, DROP("h.{i}.attn.masked_bias", "it is the score of a masked place, which is computed")),
        ("layers.{i}.feed_forward_norm.{wb}", "h.{i}.ln_2.{wb}"),
        ("layers.{i}.feed_forward.inner.weight", TRANSPOSE("h.{i}.mlp.c_fc.weight")),
        ("layers.{i}.feed_forward.inner.bias", "h.{i}.mlp.c_fc.bias"),
        ("layers.{i}.feed_forward.output.weight", TRANSPOSE("h.{i}.mlp.c_proj.weight")),
        ("layers.{i}.feed_forward.output.bias", "h.{i}.mlp.c_proj.bias"),
        ("norm.{wb}", "ln_f.{wb}"),
    ],
    heads=[("embeddings.word.weight", ALIAS("lm_head.weight"))],
    prefix=("transformer.", "transformer."),
)
FAMILY = Family("gpt2", Gpt2Config, KEYS)


class Gpt2Model(Decoder):
    family = FAMILY
    architecture = "GPT2Model"

    def __init__(self, config: Gpt2Config):
        size = config.hidden_size
        super().__init__(
            config,
            Embeddings(config.vocab_size, config.max_position_embeddings, size, dropout=config.embedding_dropout_prob),
            [_block(config, number) for number in range(config.num_hidden_layers)],
            LayerNorm(size, eps=config.layer_norm_eps),
        )


class Gpt2(LanguageModel):
    architecture = "GPT2LMHeadModel"

    def __init__(self, config: Gpt2Config):
        super().__init__(Gpt2Model(config))


def _block(config: Gpt2Config, number: int) -> PreNormBlock:
    size, heads = config.hidden_size, config.num_attention_heads
    scale = 1.0 if config.scale_attn_weights else (size // heads) ** 0.5
    if config.scale_attn_by_inverse_layer_idx:
        scale /= number + 1
    inner = 4 * size if config.intermediate_size is None else config.intermediate_size
    attention = Attention(size, heads, dropout=config.attention_probs_dropout_prob, scale=scale)
    feed_forward = FeedForward(size, inner, config.hidden_act)
    # So that what 2L parts add up to does not grow with L: Radford 2019 §2.3.
    attention.output.start = feed_forward.output.start = (2 * config.num_hidden_layers) ** -0.5
    dropout = config.hidden_dropout_prob
    return PreNormBlock(attention, feed_forward, size, eps=config.layer_norm_eps, dropout=dropout)
