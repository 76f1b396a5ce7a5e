"""`products.look_up`: of a word table that is looked up and multiplied there is one gradient, and it is autograd's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import B, S, V, distance, generator, inputs_of, ours, without_dropout
from torch.profiler import profile

from hubmodels import heads, layers, products

WORDS, SIZE, TOKENS = 211, 16, 40
MASKED = "BertForMaskedLM"


def table(dtype=torch.float64):
    return torch.randn(WORDS, SIZE, generator=generator(1), dtype=torch.float64).to(dtype).requires_grad_()


def ids_of(dtype=torch.int64):
    ids = torch.randint(WORDS, (TOKENS,), generator=generator(2), dtype=dtype)
    ids[::5] = 7  # a word that comes often
    ids[1::9] = 0
    return ids


def plainly(ids, weight, padding):
    return F.embedding(ids, weight, padding), weight


def scores(vectors, weight):
    return F.linear(vectors.tanh()[:9], weight)


def lookups_alone(vectors, weight):
    return vectors


def table_alone(vectors, weight):
    return weight


def both_twice(vectors, weight):
    return scores(vectors, weight) + scores(vectors.flip(0), weight)


def a_sum(vectors, weight):
    return weight.sum() + vectors.sum()


def is_ours(vectors):
    return "_LookUp" in type(vectors.grad_fn).__name__


def gradient(look_up, use, weight, padding=0, ids=None):
    weight = weight.detach().requires_grad_()
    used = use(*look_up(ids_of() if ids is None else ids, weight, padding))
    used.pow(3).sum().backward()
    assert weight.grad.layout == torch.strided
    return weight.grad


@pytest.mark.parametrize("padding", [None, 0, 7])
@pytest.mark.parametrize("use", [scores, lookups_alone, table_alone, both_twice, a_sum])
def test_the_gradient_is_torchs(use, padding):
    assert is_ours(products.look_up(ids_of(), table(), padding)[0])
    found, right = (gradient(each, use, table(), padding) for each in (products.look_up, plainly))
    assert distance(found, right) <= 1e-14 * float(right.abs().max())
    assert torch.equal(found, gradient(products.look_up, use, table(), padding))  # bit by bit, as going on needs it


def test_short_ids():
    found, right = (gradient(each, scores, table(), ids=ids_of(torch.int32)) for each in (products.look_up, plainly))
    assert distance(found, right) <= 1e-14 * float(right.abs().max())


def tables_made(look_up, monkeypatch):
    """How many tensors of the table's size the way back takes memory for"""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_LARGE", 0)
    weight = table(torch.float32)
    vectors, weight = look_up(ids_of(), weight, 0)
    loss = products.linear(vectors.tanh()[:9], weight).pow(3).sum()
    with profile(profile_memory=True) as seen:
        loss.backward()
    made = [event for event in seen.events() if event.name in ("aten::mm", "aten::empty")]
    return sum(event.cpu_memory_usage >= 4 * WORDS * SIZE for event in made)


def test_there_is_one_table_of_it(monkeypatch):
    assert tables_made(products.look_up, monkeypatch) == 1
    assert tables_made(plainly, monkeypatch) == 2


def test_what_somebody_holds_is_not_written_to():
    """The table's gradient is also that of what was added to it, and somebody keeps it."""
    weight, added, held = table(), torch.zeros(WORDS, SIZE, dtype=torch.float64, requires_grad=True), []
    vectors, same = products.look_up(ids_of(), weight, 0)
    same.register_hook(held.append)
    scores(vectors, same + added).pow(3).sum().backward()
    right = torch.autograd.grad(scores(F.embedding(ids_of(), weight), weight + added).pow(3).sum(), added)[0]
    assert distance(added.grad, right) <= 1e-14 * float(right.abs().max())
    assert torch.equal(held[0], added.grad)
    assert not torch.equal(weight.grad, added.grad)


def test_gradients_add_up():
    weight = table()
    once = gradient(products.look_up, scores, weight)
    for _ in range(2):
        scores(*products.look_up(ids_of(), weight, 0)).pow(3).sum().backward()
    assert distance(weight.grad, 2 * once) <= 1e-14 * float(once.abs().max())


def test_gradients_have_gradients():
    weight, ids = table()[:9].detach().requires_grad_(), ids_of() % 9
    assert torch.autograd.gradgradcheck(lambda w: scores(*products.look_up(ids, w, None)), (weight,))


def test_a_way_back_can_be_gone_twice():
    weight = table()
    loss = scores(*products.look_up(ids_of(), weight, 0)).pow(3).sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], first)


def test_everything_else_is_torchs():
    ids, weight = ids_of(), table()
    with torch.no_grad():
        assert products.look_up(ids, weight, 0)[1] is weight
    assert not is_ours(products.look_up(ids, table(torch.bfloat16), 0)[0])
    assert not products.look_up(ids, weight.detach(), 0)[0].requires_grad

    def loss(weight):
        return scores(*products.look_up(ids, weight, None)).pow(3).sum()

    right = gradient(plainly, scores, weight, padding=None)
    assert distance(torch.func.grad(loss)(weight.detach()), right) <= 1e-14 * float(right.abs().max())
    _, forwards = torch.func.jvp(loss, (weight.detach(),), (torch.ones_like(weight).detach(),))
    assert distance(forwards, right.sum()) <= 1e-9


# In a model


def trained():
    return without_dropout(ours(MASKED, torch.float64))


def word_gradient(model, labelled=True):
    labels = torch.randint(V, (B, S), generator=generator(4))
    labels[:, ::2] = heads.IGNORED
    model.zero_grad()
    output = model(**inputs_of(MASKED, "right"), labels=labels if labelled else None)
    (output.loss if labelled else output.logits.pow(2).sum()).backward()
    return model.transformer.embeddings.word.weight.grad


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_learns_the_same(labelled, monkeypatch):
    model, calls, real = trained(), [], products._LookUp.apply
    monkeypatch.setattr(products._LookUp, "apply", lambda *given: calls.append(given) or real(*given))
    found = word_gradient(model, labelled)
    assert len(calls) == 1
    monkeypatch.setattr(products, "look_up", plainly)
    right = word_gradient(model, labelled)
    assert distance(found, right) <= 1e-13 * float(right.abs().max())


def as_sparse(word):
    word.sparse = True


def as_limited(word):
    word.max_norm = 1e9


def as_counted(word):
    word.scale_grad_by_freq = True


def as_subclass(word):
    word.__class__ = type("Own", (layers.Embedding,), {"forward": lambda self, ids: F.embedding(ids, self.weight) + 1})


def as_method(word):
    word.forward = lambda ids: F.embedding(ids, word.weight) + 1


def as_hooked(word):
    word.register_forward_hook(lambda _, __, vectors: vectors + 1)


PLUS_NOTHING = (as_sparse, as_limited, as_counted)


@pytest.mark.parametrize("change", [*PLUS_NOTHING, as_subclass, as_method, as_hooked])
def test_who_changes_how_words_are_looked_up_is_asked(change, monkeypatch):
    model = trained()
    changed = copy.deepcopy(model)
    change(changed.transformer.embeddings.word)
    monkeypatch.setattr(products, "look_up", lambda *_: pytest.fail("it was passed by"))
    inputs = inputs_of(MASKED, "right")
    with torch.no_grad():
        words = model.transformer.embeddings.word.weight[inputs["input_ids"]]
        given = {**inputs, "input_ids": None, "inputs_embeds": words if change in PLUS_NOTHING else words + 1}
        assert distance(changed(**inputs).logits, model(**given).logits) <= 1e-12
