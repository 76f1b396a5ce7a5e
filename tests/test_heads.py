"""The heads' losses by hand and against transformers, rows of padding, and what is refused."""

import math
import re

import pytest
import torch
import transformers
from reference import (
    CHOICES,
    LABELS,
    NAMES,
    PATTERNS,
    POSITIONS,
    TYPES,
    B,
    D,
    S,
    V,
    distance,
    follow_padding,
    generator,
    gradients,
    gradients_as_theirs,
    inputs_of,
    labels_of,
    mask_of,
    pair,
)

from hubmodels.errors import InputError

EXACT = 1e-10
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def results(outputs):
    """The outputs that belong to rows: all tensors but the loss."""
    return {k: v for k, v in outputs._asdict().items() if isinstance(v, torch.Tensor) and k != "loss"}


def objective(outputs):
    loss = getattr(outputs, "loss", None)
    return outputs.last_hidden_state.square().sum() + outputs.pooler_output.sum() if loss is None else loss


def nll(logits, label):
    """-log softmax(logits)[label] of one list of numbers, written out"""
    numbers = logits.tolist()
    top = max(numbers)
    return top + math.log(sum(math.exp(n - top) for n in numbers)) - numbers[label]


def mean(numbers):
    return sum(numbers) / len(numbers)


# Rows


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_padding_makes_no_nan(name, dtype, explicit):
    ours, _ = pair(name, dtype)
    inputs = {**inputs_of(name, "right"), **labels_of(name)}
    inputs["attention_mask"][2] = 0
    outputs = ours(**inputs, output_attentions=explicit, output_hidden_states=True)
    for field, value in results(outputs).items():
        assert value.isfinite().all(), field
    assert all(state.isfinite().all() for state in outputs.hidden_states)
    loss = objective(outputs)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_nothing_but_padding_makes_no_nan(name, dtype, explicit):
    ours, _ = pair(name, dtype)
    inputs = {**inputs_of(name, "right"), **labels_of(name)}
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    outputs = ours(**inputs, output_attentions=explicit)
    for field, value in results(outputs).items():
        assert value.isfinite().all(), field
    loss = objective(outputs)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(name, pattern):
    ours, _ = pair(name)
    inputs = inputs_of(name, pattern)
    with torch.no_grad():
        together = results(ours(**inputs))
        for row in range(B):
            alone = results(ours(**{key: value[row : row + 1] for key, value in inputs.items()}))
            for field, value in alone.items():
                assert distance(value[0], together[field][row]) <= EXACT, field


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_a_neighbour_of_padding(name):
    ours, _ = pair(name)
    inputs = inputs_of(name, "right")
    with torch.no_grad():
        before = results(ours(**inputs))
        inputs["attention_mask"][2] = 0
        after = results(ours(**inputs))
    others = [0, 1, 3, 4]
    for field in before:
        assert distance(before[field][others], after[field][others]) <= EXACT
        assert distance(before[field][2], after[field][2]) > 1e-3


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("pattern", PATTERNS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_padding_has_no_effect(name, pattern, explicit):
    ours, _ = pair(name)
    inputs = {**inputs_of(name, pattern), **labels_of(name), "output_attentions": explicit}
    padding = inputs["attention_mask"] == 0
    before = ours(**inputs)
    inputs["input_ids"] = torch.where(padding, (inputs["input_ids"] + 11) % V, inputs["input_ids"])
    inputs["token_type_ids"] = torch.where(padding, 1 - inputs["token_type_ids"], inputs["token_type_ids"])
    after = ours(**inputs)
    for field, value in results(before).items():
        assert torch.equal(value, results(after)[field]), field
    assert torch.equal(objective(before), objective(after))


# Losses


def test_masked_lm_scores_labelled_tokens_only_in_reading_order():
    ours, _ = pair("BertForMaskedLM")
    inputs, labels = inputs_of("BertForMaskedLM", "left"), labels_of("BertForMaskedLM")["labels"]
    counted = (labels != -100) & inputs["attention_mask"].bool()
    assert ((labels != -100) & ~counted).any()  # some labels stand at padding
    with torch.no_grad():
        dense = ours(**inputs).logits
        out = ours(**inputs, labels=labels)
    assert out.logits.shape == (int(counted.sum()), V)
    assert distance(out.logits, dense[counted]) <= EXACT
    losses = [nll(dense[r, c], labels[r, c]) for r in range(B) for c in range(S) if counted[r, c]]
    assert float(out.loss) == pytest.approx(mean(losses), abs=EXACT)


def test_masked_lm_gradients_equal_those_of_the_dense_loss():
    ours, _ = pair("BertForMaskedLM")
    inputs, labels = inputs_of("BertForMaskedLM", "interleaved"), labels_of("BertForMaskedLM")["labels"]
    counted = (labels != -100) & inputs["attention_mask"].bool()
    parameters = list(ours.parameters())
    chosen = torch.autograd.grad(ours(**inputs, labels=labels).loss, parameters)
    log_probs = ours(**inputs).logits.log_softmax(-1)
    dense = -(log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted).sum() / counted.sum()
    assert max(map(distance, chosen, torch.autograd.grad(dense, parameters))) <= EXACT


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def seen_by_the_last_block(model, **inputs):
    """How many tokens its feed-forward gets"""
    found = []
    handle = model.transformer.layers[-1].feed_forward.register_forward_hook(lambda _, args, __: found.append(args[0]))
    output = model(**inputs)
    handle.remove()
    return len(found[0]), output


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_in_training_the_last_block_leaves_out_what_nobody_reads(name, pattern, checkpointing):
    """Nothing else changes: in eval mode it makes all states."""
    model, _ = pair(name, **STILL)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    real = inputs["attention_mask"].bool()
    read = (labels["labels"] != -100) & real
    read[torch.arange(B), real.int().argmax(1)] = True  # [CLS], which a pooler reads
    model.gradient_checkpointing = checkpointing
    seen, outputs, found = [], [], []
    for training in (True, False):
        count, output = seen_by_the_last_block(model.train(training), **inputs, **labels)
        seen.append(count)
        outputs.append(output)
        found.append(torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True))
    assert seen == [int(read.sum()), int(real.sum())]
    for mine, right in zip(outputs[0][:-2], outputs[1][:-2], strict=True):
        assert distance(mine, right) <= EXACT
    for mine, right in zip(*found, strict=True):
        assert (mine is None) == (right is None)
        assert mine is None or distance(mine, right) <= EXACT


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "no labels"])
def test_all_states_are_made_where_somebody_sees_them(asked):
    model, _ = pair("BertForMaskedLM", **STILL)
    inputs = inputs_of("BertForMaskedLM", "right")
    told = {} if asked == "no labels" else {**labels_of("BertForMaskedLM"), asked: True}
    count, output = seen_by_the_last_block(model.train(), **inputs, **told)
    assert count == int(inputs["attention_mask"].sum())
    if asked == "output_hidden_states":
        assert output.hidden_states[-1].shape == (B, S, D)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"])
def test_no_label_at_all_is_a_loss_of_zero(name):
    ours, _ = pair(name)
    loss = ours(**inputs_of(name, "right"), labels=torch.full((B, S), -100)).loss
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_next_sentence_class_0_is_next():
    ours, _ = pair("BertForNextSentencePrediction")
    inputs = inputs_of("BertForNextSentencePrediction", "right")
    labels = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        out = ours(**inputs, labels=labels)
        assert float(out.loss) == pytest.approx(mean([nll(r, n) for r, n in zip(out.logits, labels, strict=True)]))
        ours.next_sentence.bias += torch.tensor([50.0, -50.0])
        assert float(ours(**inputs, labels=torch.zeros(B, dtype=torch.long)).loss) < 1e-9
        assert float(ours(**inputs, labels=torch.ones(B, dtype=torch.long)).loss) > 50


def test_pretraining_loss_is_the_sum_of_both():
    ours, _ = pair("BertForPreTraining")
    inputs, labels = inputs_of("BertForPreTraining", "right"), labels_of("BertForPreTraining")
    counted = (labels["labels"] != -100) & inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = ours(**inputs)
        both = ours(**inputs, **labels)
        words = ours(**inputs, labels=labels["labels"])
        relation = ours(**inputs, next_sentence_label=labels["next_sentence_label"])
    rows = zip(plain.prediction_logits[counted], labels["labels"][counted], strict=True)
    word_loss = mean([nll(row, label) for row, label in rows])
    pairs = zip(plain.seq_relationship_logits, labels["next_sentence_label"], strict=True)
    relation_loss = mean([nll(row, label) for row, label in pairs])
    assert plain.loss is None
    assert float(words.loss) == pytest.approx(word_loss, abs=EXACT)
    assert float(relation.loss) == pytest.approx(relation_loss, abs=EXACT)
    assert float(both.loss) == pytest.approx(word_loss + relation_loss, abs=EXACT)
    assert both.prediction_logits.shape == (int(counted.sum()), V)
    assert relation.prediction_logits.shape == (B, S, V)


def test_sequence_classes():
    ours, _ = pair("BertForSequenceClassification")
    inputs = inputs_of("BertForSequenceClassification", "right")
    labels = torch.tensor([0, 6, -100, 3, 3])
    with torch.no_grad():
        out = ours(**inputs, labels=labels)
    assert out.logits.shape == (B, LABELS)
    losses = [nll(out.logits[row], labels[row]) for row in (0, 1, 3, 4)]
    assert float(out.loss) == pytest.approx(mean(losses), abs=EXACT)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_one_label_is_regression(shape):
    ours, theirs = pair("BertForSequenceClassification", num_labels=1)
    inputs = inputs_of("BertForSequenceClassification", "right")
    labels = torch.randn(shape, generator=generator(30), dtype=torch.float64)
    out = ours(**inputs, labels=labels)
    assert out.logits.shape == (B, 1)
    by_hand = mean([(x - y) ** 2 for x, y in zip(out.logits.view(-1).tolist(), labels.view(-1).tolist(), strict=True)])
    assert float(out.loss.detach()) == pytest.approx(by_hand, abs=EXACT)
    assert_same_step(out, theirs(**inputs, labels=labels), ours, theirs)


def test_float_labels_are_a_yes_or_no_per_class():
    ours, theirs = pair("BertForSequenceClassification")
    inputs = inputs_of("BertForSequenceClassification", "right")
    labels = (torch.rand(B, LABELS, generator=generator(31)) < 0.4).double()
    labels[0, 0] = 0.25
    out = ours(**inputs, labels=labels)
    by_hand = []
    for x, y in zip(out.logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        yes = 1 / (1 + math.exp(-x))
        by_hand.append(-y * math.log(yes) - (1 - y) * math.log(1 - yes))
    assert float(out.loss.detach()) == pytest.approx(mean(by_hand), abs=EXACT)
    assert_same_step(out, theirs(**inputs, labels=labels), ours, theirs)


def assert_same_step(got, expected, ours, theirs):
    assert distance(got.loss, expected.loss) <= EXACT
    got.loss.backward()
    expected.loss.backward()
    their_gradients = gradients(theirs)
    for key, gradient in gradients_as_theirs(ours).items():
        assert distance(gradient, their_gradients[key]) <= EXACT, key


def test_token_classes_ignore_minus_100_and_padding():
    ours, _ = pair("BertForTokenClassification")
    inputs, labels = inputs_of("BertForTokenClassification", "left"), labels_of("BertForTokenClassification")["labels"]
    counted = (labels != -100) & inputs["attention_mask"].bool()
    with torch.no_grad():
        out = ours(**inputs, labels=labels)
    assert out.logits.shape == (B, S, LABELS)
    losses = [nll(row, label) for row, label in zip(out.logits[counted], labels[counted], strict=True)]
    assert 0 < len(losses) < B * S
    assert float(out.loss) == pytest.approx(mean(losses), abs=EXACT)


def test_multiple_choice_is_a_softmax_over_the_candidates():
    ours, _ = pair("BertForMultipleChoice")
    inputs = inputs_of("BertForMultipleChoice", "right")
    labels = torch.tensor([0, 7, 3, 3, 5])
    with torch.no_grad():
        out = ours(**inputs, labels=labels)
    assert out.logits.shape == (B, CHOICES)
    assert float(out.loss) == pytest.approx(mean([nll(r, n) for r, n in zip(out.logits, labels, strict=True)]))


def test_answers_are_sought_among_real_tokens_only():
    ours, _ = pair("BertForQuestionAnswering")
    inputs = inputs_of("BertForQuestionAnswering", "right")
    mask = inputs["attention_mask"].bool()
    starts, ends = torch.tensor([8, 2, 0, 1, 3]), torch.tensor([8, 7, 4, 2, 4])
    assert mask[range(B), starts].all()
    assert mask[range(B), ends].all()
    with torch.no_grad():
        out = ours(**inputs, start_positions=starts, end_positions=ends)
    expected = [
        mean([nll(logits[row][mask[row]], labels[row]) for row in range(B)])
        for logits, labels in ((out.start_logits, starts), (out.end_logits, ends))
    ]
    assert float(out.loss) == pytest.approx(mean(expected), abs=EXACT)
    assert (out.start_logits.argmax(1) < mask.sum(1)).all()
    assert not out.start_logits.softmax(1)[~mask].any()


@pytest.mark.parametrize("column", [True, False], ids=["[B, 1]", "[B]"])
@pytest.mark.parametrize("pattern", ["none", "right"])
def test_answer_positions_out_of_range_are_treated_as_in_transformers(pattern, column):
    ours, theirs = pair("BertForQuestionAnswering")
    inputs = inputs_of("BertForQuestionAnswering", pattern)
    starts, ends = torch.tensor([-3, S, S + 40, 4, 0]), torch.tensor([-1, 3, 2, S + 1, S])
    if column:
        starts, ends = starts[:, None], ends[:, None]
    with follow_padding(theirs, inputs["attention_mask"]):
        expected = theirs(**inputs, start_positions=starts, end_positions=ends)
        assert_same_step(ours(**inputs, start_positions=starts, end_positions=ends), expected, ours, theirs)


def test_an_answer_at_padding_counts_as_none():
    ours, _ = pair("BertForQuestionAnswering")
    inputs = inputs_of("BertForQuestionAnswering", "right")
    at_padding, nowhere = torch.tensor([0, 8, 1, 8, 8]), torch.tensor([0, S, 1, S, S])
    with torch.no_grad():
        loss = ours(**inputs, start_positions=at_padding, end_positions=at_padding).loss
        assert float(loss) == float(ours(**inputs, start_positions=nowhere, end_positions=nowhere).loss)
        assert 0 < float(loss) < 50
        none = torch.full((B,), S)
        assert float(ours(**inputs, start_positions=none, end_positions=none).loss) == 0.0
        assert ours(**inputs, start_positions=none).loss is None


CLASSIFIERS = ["BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"]


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "classifier_dropout"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_dropout_before_the_classifier(name, field):
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, theirs = pair(name, **{**others, field: 0.5})
    assert ours.dropout.p == theirs.dropout.p == 0.5
    inputs = inputs_of(name, "none")
    with torch.no_grad():
        draws = [ours.train()(**inputs, output_hidden_states=True) for _ in range(2)]
        assert distance(draws[0].logits, draws[1].logits) > 1e-3
        states = distance(draws[0].hidden_states[-1], draws[1].hidden_states[-1])
        assert (states > 1e-3) == (field == "hidden_dropout_prob")
        assert torch.equal(ours.eval()(**inputs).logits, ours(**inputs).logits)


# What is refused. The texts are what a user reads: which argument, what was expected, what came.


def refusal(name, **changes):
    ours, _ = pair(name)
    arguments = {**inputs_of(name, "right"), **changes}
    with pytest.raises(InputError) as error:
        ours(**{key: value for key, value in arguments.items() if value is not None})
    return str(error.value)


def long(*shape, value=0):
    return torch.full(shape, value)


SINGLE = [name for name in NAMES if name != "BertForMultipleChoice"]


@pytest.mark.parametrize("name", SINGLE)
def test_mask_of_a_wrong_shape(name):
    assert refusal(name, attention_mask=torch.ones(B, S - 1)) == (
        "attention_mask: expected shape (5, 9) (1 = token, 0 = padding) or (5, 9, 9) (1 = row may look at column), "
        "got (5, 8)"
    )


@pytest.mark.parametrize("argument", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", [(B, S - 1), (B - 1, S), (S,), (B, S, 1)])
def test_companion_of_a_wrong_shape_is_named(argument, shape):
    text = refusal("BertModel", **{argument: long(*shape)})
    assert text == f"{argument}: expected shape (5, 9), as the input, got {shape}"
    assert argument in text


@pytest.mark.parametrize("width", [1, D + 1])
def test_vectors_of_a_wrong_width(width):
    assert "inputs_embeds" in refusal("BertModel", input_ids=None, inputs_embeds=torch.zeros(B, S, width).double())


@pytest.mark.parametrize(
    ("name", "argument", "shape", "expected"),
    [
        ("BertForMaskedLM", "labels", (B, S - 1), "labels: expected shape (5, 9), got (5, 8)"),
        ("BertForMaskedLM", "labels", (B,), "labels: expected shape (5, 9), got (5,)"),
        ("BertForPreTraining", "labels", (B, S, 1), "labels: expected shape (5, 9), got (5, 9, 1)"),
        ("BertForPreTraining", "next_sentence_label", (B - 1,), "labels: expected shape (5,), got (4,)"),
        ("BertForNextSentencePrediction", "labels", (B + 1,), "labels: expected shape (5,), got (6,)"),
        ("BertForSequenceClassification", "labels", (B, S), "labels: expected shape (5,), got (45,)"),
        ("BertForTokenClassification", "labels", (B, S + 1), "labels: expected shape (5, 9), got (5, 10)"),
        ("BertForMultipleChoice", "labels", (B, CHOICES), "labels: expected shape (5,), got (5, 8)"),
    ],
)
def test_labels_of_a_wrong_shape(name, argument, shape, expected):
    assert refusal(name, **{argument: long(*shape)}) == expected


def test_float_labels_of_a_wrong_shape():
    assert refusal("BertForSequenceClassification", labels=torch.zeros(B)) == (
        "labels (float: a yes or no per class): expected shape (5, 7), got (5,)"
    )


def test_regression_labels_of_a_wrong_shape():
    ours, _ = pair("BertForSequenceClassification", num_labels=1)
    with pytest.raises(InputError, match=r"^labels \(num_labels=1: regression\): expected shape \(5,\), got \(4,\)$"):
        ours(**inputs_of("BertForSequenceClassification", "right"), labels=torch.zeros(B - 1))


def test_answer_positions_of_a_wrong_shape():
    assert refusal("BertForQuestionAnswering", start_positions=long(B - 1), end_positions=long(B)) == (
        "start_positions and end_positions: expected shape (5,), got (4,)"
    )


@pytest.mark.parametrize(("value", "named"), [(V, V), (-1, -1), (V + 100, V + 100)])
@pytest.mark.parametrize("name", NAMES)
def test_ids_out_of_range(name, value, named):
    ids = inputs_of(name, "right")["input_ids"]
    ids.view(-1, S)[1, 0] = value
    assert refusal(name, input_ids=ids) == (
        f"input_ids: {named} is out of range; the vocabulary has 67 entries, 0 to 66"
    )


@pytest.mark.parametrize(
    ("argument", "value", "what"),
    [
        ("token_type_ids", TYPES, "the token type table has 2 entries, 0 to 1"),
        ("token_type_ids", -1, "the token type table has 2 entries, 0 to 1"),
        ("position_ids", POSITIONS, "the position table has 16 entries, 0 to 15"),
        ("position_ids", -2, "the position table has 16 entries, 0 to 15"),
    ],
)
def test_companions_out_of_range(argument, value, what):
    assert refusal("BertModel", **{argument: long(B, S, value=value)}) == f"{argument}: {value} is out of range; {what}"


@pytest.mark.parametrize(
    ("name", "argument", "shape", "value", "size"),
    [
        ("BertForMaskedLM", "labels", (B, S), V, V),
        ("BertForMaskedLM", "labels", (B, S), -1, V),
        ("BertForPreTraining", "labels", (B, S), V + 2, V),
        ("BertForPreTraining", "next_sentence_label", (B,), 2, 2),
        ("BertForNextSentencePrediction", "labels", (B,), 2, 2),
        ("BertForSequenceClassification", "labels", (B,), LABELS, LABELS),
        ("BertForTokenClassification", "labels", (B, S), LABELS, LABELS),
        ("BertForMultipleChoice", "labels", (B,), CHOICES, CHOICES),
    ],
)
def test_labels_out_of_range(name, argument, shape, value, size):
    text = refusal(name, **{argument: long(*shape, value=value)})
    assert text == f"labels: {value} is out of range; the head has {size} entries, 0 to {size - 1}"


@pytest.mark.parametrize("name", NAMES)
def test_a_row_longer_than_the_position_table(name):
    ours, _ = pair(name)
    rows = (B, CHOICES) if name == "BertForMultipleChoice" else (B,)
    with pytest.raises(InputError) as error:
        ours(long(*rows, POSITIONS + 1))
    assert str(error.value) == (
        "input: 17 tokens in a row, but this model has positions for 16; shorten the text, for example with "
        "tokenizer(texts, max_length=16)"
    )
    assert ours(long(*rows, POSITIONS)) is not None


@pytest.mark.parametrize("name", SINGLE)
def test_both_and_neither_of_ids_and_vectors(name):
    expected = "give either input_ids [B, S] or inputs_embeds [B, S, D], not both and not neither"
    assert refusal(name, inputs_embeds=torch.zeros(B, S, D).double()) == expected
    assert refusal(name, input_ids=None) == expected


def test_both_and_neither_of_ids_and_vectors_for_multiple_choice():
    name = "BertForMultipleChoice"
    assert "not both" in refusal(name, inputs_embeds=torch.zeros(B, CHOICES, S, D).double())
    assert refusal(name, input_ids=None) == (
        "input: expected ids [batch, choices, length] or vectors with one more, got shape None"
    )


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("shape", [(S,), (B, S, 1)])
def test_ids_of_a_wrong_shape(name, shape):
    text = refusal(name, input_ids=long(*shape), attention_mask=None, token_type_ids=None)
    assert text == f"input: expected ids [B, S] or vectors [B, S, D], got shape {shape}"


def test_multiple_choice_ids_need_three_dimensions():
    text = refusal("BertForMultipleChoice", input_ids=long(B, S), attention_mask=None, token_type_ids=None)
    assert text == "input: expected ids [batch, choices, length] or vectors with one more, got shape (5, 9)"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_keyword_is_named(name):
    ours, _ = pair(name)
    with pytest.raises(TypeError, match=re.escape("got an unexpected keyword argument 'return_dict'")):
        ours(**inputs_of(name, "right"), return_dict=True)


@pytest.mark.parametrize("name", NAMES)
def test_labels_go_by_keyword_only(name):
    ours, _ = pair(name)
    inputs = inputs_of(name, "right")
    with pytest.raises(TypeError, match="positional argument"):
        ours(*inputs.values(), next(iter(labels_of(name).values()), None))


def test_transformers_is_the_version_this_was_checked_against():
    assert int(transformers.__version__.split(".")[0]) >= 5
    assert mask_of("right", B).sum() == 35
