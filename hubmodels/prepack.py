"""A model laid out for inference: a copy whose linear maps are packed for a CPU, or whose blocks are CUDA graphs."""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .compiled import CompiledBlocks, CompiledSteps, check_compiler
from .convolution import FEW, ConvolvedLinear, convolves
from .errors import InputError
from .fused import FUSED, FusedBlocks, fused_blocks, fuses
from .graphs import GraphedBlocks, GraphedSteps, Record, record_on_cuda
from .kernels import has_varlen
from .layers import (
    Embeddings,
    Linear,
    WordScores,
    has_hooks,
    is_plain,
)
from .maps import (
    TOKENS,
    HalfLinear,
    Int8Linear,
    Int8RowLinear,
    Int8TracedLinear,
    PackedLinear,
    PackedMap,
    PackedWordScores,
    PlainMap,
    RowLinear,
)
from .products import multiplies

M = TypeVar("M", bound=nn.Module)
_FBGEMM = ("x86", "fbgemm")  # torch's quantised engines that are it


def prepacked(model: M, rows: int) -> M:
    """A copy of a model for inference, its linear maps packed for inputs of about `rows` tokens.

    Where that is not possible it is the model itself. The copy costs as much memory as the maps, shares everything else
    with the model, and does not see what becomes of the model's weights afterwards; but one for a single token
    multiplies several by the model's own. A part that has hooks, or is of another class than those of `layers`, goes on
    as it is. Dropout is left out where a block's additions are fused.
    """
    if not _packs(model):
        return model
    if rows == 1 and _sums_rows(model):
        return _twin(model, lambda weight, bias: RowLinear(weight, bias, PlainMap(weight, bias)))
    return _twin(model, lambda weight, bias: _packed(weight, bias, rows, PlainMap))


def _packed(weight: Tensor, bias: Tensor | None, rows: int, of_many: Callable[..., PackedMap]) -> PackedMap:
    """For inputs of about `rows` tokens; `of_many` makes what takes many, where a layout is for few alone."""
    if rows <= FEW and convolves(weight):
        return ConvolvedLinear(weight, bias, of_many(weight, bias))
    return PackedLinear(weight, bias, rows)


def accelerate(model: M, dtype: torch.dtype | None = None, *, compiled: bool = False) -> M:
    """A copy of a model for inference on this CPU, packed once: `accelerate(bertModel("bert-base-uncased"))`.

    It is called as the model is, equals it to the rounding of its dtype, and `acceleration` says what was done. Of a
    language model in half precision, and of any other where the CPU has no products of its dtype, it computes in
    float32 on the half precision weights, and is both faster and nearer to the model in float32 than the model itself.
    Otherwise as `prepacked`: a language model for one token and, beside it, for several, an encoder on an AMD CPU
    without AVX512 for a few and, beside it, for many; each costs as much memory again as the maps. It is in eval
    mode, has no dropout and gives no gradients.
    dtype: of the packed weights; None: as they are; torch.int8: a quarter of float32's bytes, rounded to 255 steps for
    each row of a weight and each token, everything else in float32; for a token 127 steps where the CPU has no VNNI.
    Best where few tokens read all the weights. A language model's weights are held once more for a single token, which
    is not rounded itself: alone, a text's words may be others than beside other texts.
    On a GPU nothing is packed: an encoder in half precision runs its blocks, and a language model the steps of its
    generation, as CUDA graphs.
    compiled: by torch.compile and a C++ compiler, for a CPU, what reads all the weights for few tokens: a language
    model's steps of generation, of which nothing else is packed unless dtype says so, and an encoder's blocks, in
    bfloat16 or torch.int8, for up to 32 tokens. The first takes one to two minutes, steps of several rows again, and
    the weights' memory; then they are the fastest there are. In torch.int8 a step's single token, and with AMX each, is
    rounded to bfloat16: there a text's result depends on whether its batch has more than 32 tokens.
    Raises InputError for what is no model of this library, is elsewhere, a dtype that cannot be packed here, or what
    cannot be compiled.
    """
    table = _table(model)
    if not (table.is_cpu or table.is_cuda):
        raise InputError(f"accelerate: expected a model on a CPU or a GPU, got one on {table.device}")
    generates = _generates(model)
    if compiled:
        _check_compiled(model, table, dtype)
    if table.is_cuda:
        if dtype is not None:
            raise InputError(f"accelerate: dtype = {dtype}: expected None on {table.device}, where nothing is packed")
        fast = graphed(model)
    elif dtype is not None:
        _check_int8(model, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deprecated")  # torch has no other way yet to FBGEMM's layout
            kind = Int8TracedLinear if compiled else Int8RowLinear if generates else Int8Linear
            fast = _in_float32(_twin(model, kind))
    elif compiled and generates:
        fast = _twin(model, None)
    elif (generates or not _onednn_packs(table)) and _fbgemm_packs(model):
        fast = _in_float32(_twin(model, HalfLinear))
    elif _packs(model) and _sums_rows(model):
        fast = _twin(model, lambda weight, bias: RowLinear(weight, bias, _packed(weight, bias, TOKENS, PlainMap)))
    elif _packs(model):
        fast = _twin(model, lambda weight, bias: _packed(weight, bias, TOKENS, PackedLinear))
    else:
        fast = _twin(model, None)
    if dtype is not None and not any(isinstance(part, Int8Linear) for part in fast.modules()):
        raise InputError("accelerate: there is no map left to pack; accelerate the model that this one was made of")
    _settle(fast, model)
    if generates and table.is_cpu:
        fast.steps = CompiledSteps() if compiled else None  # type: ignore[assignment]
    elif table.is_cpu:
        shortcut = fused_blocks(_transformer(fast).layers)
        _transformer(fast).shortcut = _compiled_blocks(fast, model, dtype, shortcut) if compiled else shortcut
    fast.acceleration = _told(fast, table)  # type: ignore[assignment]
    return fast


def _compiled_blocks(
    fast: nn.Module, model: nn.Module, dtype: torch.dtype | None, others: FusedBlocks | None
) -> CompiledBlocks:
    like = fast if dtype is not None else _settle(_twin(model, None), model)  # oneDNN's layout is in no program
    return CompiledBlocks(_transformer(fast).layers, _transformer(like).layers, others)


def _settle(fast: M, model: nn.Module) -> M:
    """A twin in eval mode, without gradients."""
    own = set(model.modules())  # the copy shares those with hooks
    for part in fast.modules():
        if part not in own:
            part.training = False
            kept = part._parameters.items()
            part._parameters = {key: None if p is None else nn.Parameter(p.detach(), False) for key, p in kept}
    return fast


def graphed(model: M, record: Record = record_on_cuda) -> M:
    """A copy that shares everything, and runs as graphs where it can."""
    fast: Any = _twin(model, None)
    if _generates(model):
        fast.steps = GraphedSteps(record)
    transformer, table = _transformer(fast), _table(model)
    if not transformer.causal and table.itemsize == 2 and has_varlen(table.device):
        transformer.shortcut = GraphedBlocks(transformer.layers, record)
    return fast


def _transformer(model: nn.Module) -> Any:
    return getattr(model, "transformer", model)


def _table(model: nn.Module) -> Tensor:
    """[V, D]"""
    embeddings = getattr(_transformer(model), "embeddings", None)
    if not isinstance(embeddings, Embeddings):
        raise InputError(f"accelerate: expected a model of this library, got a {type(model).__name__}")
    return embeddings.word.weight


def _told(model: nn.Module, table: Tensor) -> str:
    steps, shortcut = getattr(model, "steps", None), getattr(_transformer(model), "shortcut", None)
    counts = {kind: sum(isinstance(part, kind) for part in model.modules()) for kind in (HalfLinear, Int8Linear)}
    by_onednn = {part for part in model.modules() if isinstance(part, (PackedLinear, ConvolvedLinear))}
    by_onednn -= {part.many for part in by_onednn if isinstance(part, ConvolvedLinear)}
    fused = sum(type(part) in FUSED.values() for part in model.modules())
    single = ", for single tokens by rows" if any(isinstance(part, RowLinear) for part in model.modules()) else ""
    single = ", steps of generation without beams compiled" if isinstance(steps, CompiledSteps) else single
    single = f", up to {shortcut.most} tokens compiled" if isinstance(shortcut, CompiledBlocks) else single
    dtype = str(table.dtype).removeprefix("torch.")
    if isinstance(steps, GraphedSteps):
        return "steps of generation without beams are a CUDA graph, from 64 words on and until a row ends"
    if isinstance(shortcut, GraphedBlocks):
        return f"the blocks are CUDA graphs, for numbers of tokens that are at most an eighth apart, in {dtype}"
    if counts[Int8Linear]:
        return f"{counts[Int8Linear]} linear maps packed by FBGEMM in int8 from {dtype}{single}, the rest in float32"
    if isinstance(steps, CompiledSteps):
        return f"steps of generation without beams are compiled, in {dtype}"
    if counts[HalfLinear]:
        return f"{counts[HalfLinear]} linear maps packed by FBGEMM from {dtype}, computed in float32"
    if by_onednn:
        return f"{len(by_onednn)} linear maps packed by oneDNN in {dtype}{single}, {fused} blocks fused"
    why = "autocast is on" if torch.is_autocast_enabled("cpu") else f"torch has no packed layout of {dtype} here"
    return f"nothing: {why}"


def _twin(model: M, pack: Callable[[Tensor, Tensor | None], nn.Module] | None) -> M:
    """A copy that shares all but its modules and the weights of linear maps; those are packed side by side. None: they
    stay.
    """
    table = _table(model)
    maps: dict[nn.Module, tuple[Any, Any]] = {}
    for part in model.modules() if pack else ():
        if is_plain(part, Linear):  # not an adapter that was made of one
            maps[part] = (part.weight, part.bias)
        elif is_plain(part, WordScores):
            maps[part] = (table, None)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        packed = dict(zip(maps, pool.map(lambda part: pack(*maps[part]), maps), strict=True))  # type: ignore[misc]

    def twin(module: nn.Module) -> nn.Module:
        if module in packed:
            return PackedWordScores(packed[module]) if isinstance(module, WordScores) else packed[module]
        if isinstance(module, PackedMap):
            return module
        if has_hooks(module) and module not in (model, _transformer(model)):
            return module
        copied = copy.copy(module)
        copied.__dict__ |= {key: copy.copy(held) for key, held in vars(module).items() if isinstance(held, dict)}
        copied._modules = {name: part and twin(part) for name, part in module._modules.items()}
        if type(module) in FUSED and fuses(copied):
            copied.__class__ = FUSED[type(module)]
        return copied

    return twin(model)  # type: ignore[return-value]


def _in_float32(model: M) -> M:
    """A twin with float32 parameters, but for a word table of less: its rows are added to float32 positions."""
    for name, module in model.named_modules():
        if not (name.endswith("embeddings.word") and _table(model).itemsize <= 4) and not has_hooks(module):
            wide = {
                key: None if p is None else nn.Parameter(p.detach().float()) for key, p in module._parameters.items()
            }
            module._parameters = wide
    return model


def _check_compiled(model: nn.Module, table: Tensor, dtype: torch.dtype | None) -> None:
    multiplied = dtype == torch.int8 or (table.dtype == torch.bfloat16 and multiplies(torch.bfloat16))
    encodes = multiplied and not _transformer(model).causal
    if not (_generates(model) or encodes) or not table.is_cpu:
        raise InputError(
            "accelerate: compiled = True: expected on a CPU a language model, or an encoder for torch.int8 or, if that "
            f"CPU multiplies it, in bfloat16, got a {type(model).__name__} in {table.dtype} on {table.device}"
        )
    if any(map(has_hooks, model.modules())):
        raise InputError("accelerate: compiled = True: a part of the model has hooks, which may not run in a program")
    check_compiler()


def _check_int8(model: nn.Module, dtype: torch.dtype) -> None:
    if dtype != torch.int8:
        raise InputError(f"accelerate: dtype = {dtype}: expected None, the model's own, or torch.int8")
    if _table(model).dtype != torch.float32 and any(map(_goes_on, model.modules())):
        raise InputError(
            "accelerate: dtype = torch.int8: parts with hooks or of other classes go on as they are, the rest would be "
            f"float32: expected a model in float32, got one in {_table(model).dtype}"
        )
    if not _has_fbgemm():
        raise InputError(
            f"accelerate: dtype = torch.int8: expected torch.backends.quantized.engine to be {' or '.join(_FBGEMM)}, "
            f"which this CPU may not have; it is {torch.backends.quantized.engine}"
        )


def _goes_on(part: nn.Module) -> bool:
    """Whether a twin's part would stay in the model's dtype."""
    return has_hooks(part) or "forward" in vars(part) or (isinstance(part, nn.Linear) and type(part) is not Linear)


def _fbgemm_packs(model: nn.Module) -> bool:
    """Whether the model is in half precision, fits into float16, and nothing in it goes on as it is."""
    table, parts = _table(model), list(model.modules())
    if table.itemsize != 2 or not _has_fbgemm():
        return False
    if any(map(_goes_on, parts)):
        return False
    return all(float(p.detach().abs().max()) < torch.finfo(torch.float16).max for p in model.parameters())


def _sums_rows(model: nn.Module) -> bool:
    """Whether FBGEMM's bags are there for a model that takes single tokens."""
    return _generates(model) and _table(model).dtype == torch.float32 and _has_fbgemm()


def _generates(model: nn.Module) -> bool:
    return "scores" in model._modules


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in _FBGEMM


def _packs(model: nn.Module) -> bool:
    return _onednn_packs(_table(model)) and not torch.is_autocast_enabled("cpu")  # it would cast inputs, no weight


def _onednn_packs(weight: Tensor) -> bool:
    if not (weight.is_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies(torch.bfloat16))
