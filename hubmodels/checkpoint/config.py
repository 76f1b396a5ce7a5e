"""A published config.json <-> a family's config dataclass. What we do not implement is refused, never ignored."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from ..errors import ConfigError
from .keymap import KeyMap

# Keys that say nothing about the forward pass: origin, training, generation, and the labels' names.
_SILENT = set(
    """
    _name_or_path _num_labels architectures attn_implementation _attn_implementation_autoset directionality
    dtype finetuning_task gradient_checkpointing id2label label2id language model_type name num_labels
    output_attentions output_hidden_states output_past pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type problem_type return_dict tie_word_embeddings
    tokenizer_class torch_dtype transformers_version use_cache vocab_file bos_token_id eos_token_id sep_token_id
    cls_token_id mask_token_id
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """Base of the families' frozen dataclasses.

    MODEL_TYPE: what config.json calls the family.
    SPELLED: published names of fields that we call otherwise -> ours.
    SILENT: published fields that say nothing about the family's forward pass.
    FIXED: published fields with the one value we implement.
    CHOICES: our fields with the values we implement.
    ADJUSTABLE: our fields that a user may set for a published checkpoint: they change no tensor's shape.
    """

    MODEL_TYPE: ClassVar[str]
    SPELLED: ClassVar[Mapping[str, str]] = {}
    SILENT: ClassVar[frozenset[str]] = frozenset()
    FIXED: ClassVar[Mapping[str, Any]] = {}
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ADJUSTABLE: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_published(cls, published: Mapping[str, Any], source: str) -> Self:
        """config.json's content -> config. `source` names the file in errors.

        Raises ConfigError naming each key and value that is not implemented. An unknown key may stand if it is off
        (null, false, 0 or empty).
        """
        ours = {field.name for field in dataclasses.fields(cls)}
        spelled = {name: name for name in ours - set(cls.SPELLED.values())} | dict(cls.SPELLED)
        silent = _SILENT | cls.SILENT
        refused = []
        for key, value in published.items():
            if key == "model_type" and value != cls.MODEL_TYPE:
                refused.append(f"model_type = {value!r} (expected {cls.MODEL_TYPE!r})")
            elif key in cls.FIXED and value != cls.FIXED[key]:
                refused.append(f"{key} = {value!r} (implemented: {cls.FIXED[key]!r})")
            elif value and key not in spelled and key not in cls.FIXED and key not in silent:
                refused.append(f"{key} = {value!r} (unknown key)")
        if refused:
            raise ConfigError(
                f"{source}: not implemented for {cls.MODEL_TYPE}: {'; '.join(refused)}. If a key does not change the "
                "forward pass, take it out of the file and load again"
            )
        try:
            return cls(**{spelled[key]: value for key, value in published.items() if key in spelled})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_published(self) -> dict[str, Any]:
        """What config.json holds for this config."""
        theirs = {ours: theirs for theirs, ours in self.SPELLED.items()}
        fields = {theirs.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return {"model_type": self.MODEL_TYPE, **fields, **self.FIXED}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind: Any = field.type
            fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(0.5, kind))
            if not fits or isinstance(value, bool) != (kind is bool):
                raise ConfigError(f"{field.name} = {value!r}: expected {getattr(kind, '__name__', kind)}")
            if type(value) is int and kind is not float and value < (0 if field.name.endswith("_id") else 1):
                raise ConfigError(f"{field.name} = {value}: expected a positive number")
            if field.name.endswith(("_prob", "_dropout")) and not 0 <= (value or 0) < 1:
                raise ConfigError(f"{field.name} = {value}: expected a probability, 0 <= p < 1")
            if kind is float and not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} = {value}: expected a number, 0 or more")
            if field.name in self.CHOICES and value not in self.CHOICES[field.name]:
                raise ConfigError(f"{field.name} = {value!r}: implemented are {', '.join(self.CHOICES[field.name])}")
        size, heads = getattr(self, "hidden_size", 0), getattr(self, "num_attention_heads", 1)
        if size % heads:
            raise ConfigError(f"hidden_size = {size}: expected a multiple of num_attention_heads = {heads}")


@dataclasses.dataclass(frozen=True)
class OpenAIConfig(FamilyConfig):
    """The fields that OpenAI's two families share, and how their config.json spells them."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.1
    embedding_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    summary_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    SPELLED: ClassVar[Mapping[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "resid_pdrop": "hidden_dropout_prob",
        "embd_pdrop": "embedding_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
        "summary_first_dropout": "summary_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    }
    SILENT: ClassVar[frozenset[str]] = frozenset(
        {"n_ctx", "n_special", "predict_special_tokens", "task_specific_params", "pad_token_id", "is_decoder"}
    )
    ADJUSTABLE: ClassVar[tuple[str, ...]] = (
        "hidden_act",
        "hidden_dropout_prob",
        "embedding_dropout_prob",
        "attention_probs_dropout_prob",
        "summary_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
    )


class Family(NamedTuple):
    """What loading has to know of a family. name: as in the manifest."""

    name: str
    config: type[FamilyConfig]
    keys: KeyMap
