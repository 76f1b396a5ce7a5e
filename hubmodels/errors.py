"""The errors of this package. Each says what failed, what was expected and found, where, and what to do next."""


class HubModelsError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(HubModelsError, ValueError):
    """A tensor, text or option given to a model, tokenizer or task does not fit."""


class CatalogError(HubModelsError, LookupError):
    """A weights name is unknown, or the manifest is not valid."""


class StoreError(HubModelsError, OSError):
    """A file of a checkpoint is missing, cannot be fetched, or is not the file that was pinned."""


class CheckpointError(HubModelsError, ValueError):
    """A checkpoint file cannot be read, or its tensors do not fit the model."""


class ConfigError(HubModelsError, ValueError):
    """A config value is not valid or not implemented."""
