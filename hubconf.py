"""torch.hub.load("OWNER/hubmodels:TAG", "bertForMaskedLM", "bert-base-uncased", trust_repo=True)"""

import os as _os
import sys as _sys

dependencies = ["torch", "huggingface_hub", "requests", "safetensors"]

# torch.hub has this directory on sys.path only while it runs, and Python keeps what was imported. So a second tag in
# one process would silently run the first one's code, and a worker process could not unpickle a model. Here another
# version's modules make way (its models go on working), and this directory stays on the path: at the end, or before any
# other version, where a worker looks first.
_HERE = _os.path.dirname(_os.path.abspath(__file__))
_other = getattr(_sys.modules.get("hubmodels"), "__file__", None) or _os.path.join(_HERE, "hubmodels", "__init__.py")
if not _os.path.abspath(_other).startswith(_os.path.join(_HERE, "")):
    for _name in [name for name in _sys.modules if name == "hubmodels" or name.startswith("hubmodels.")]:
        del _sys.modules[_name]
_kept = [entry for entry in _sys.path[1:] if entry != _HERE]
_rivals = (i for i, entry in enumerate(_kept) if _os.path.isfile(_os.path.join(entry, "hubmodels", "__init__.py")))
_kept.insert(next(_rivals, len(_kept)), _HERE)
_sys.path[1:] = _kept
_sys.path_importer_cache.pop(_sys.path[0], None)  # a relative path may have meant another directory before a chdir

from hubmodels.hub import (
    bertForMaskedLM,
    bertForMultipleChoice,
    bertForNextSentencePrediction,
    bertForPreTraining,
    bertForQuestionAnswering,
    bertForSequenceClassification,
    bertForTokenClassification,
    bertModel,
    bertTokenizer,
    catalog,
    gpt,
    gpt2,
    gpt2LMHeadModel,
    gpt2Model,
    gpt2Tokenizer,
    gptDoubleHeads,
    gptModel,
    gptTokenizer,
    openAIGPTDoubleHeadsModel,
    openAIGPTLMHeadModel,
    openAIGPTModel,
    openAIGPTTokenizer,
)
