"""What runs as CUDA graphs on a GPU, here with a recorder that runs it on the CPU: sizes, places, what is left."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from reference import PATTERNS, B, S, distance, inputs_of, pair
from test_generation import pair as language_pair
from test_generation import prompts_of, ragged

from hubmodels import graphs
from hubmodels.errors import InputError
from hubmodels.graphs import GraphedBlocks, room_for
from hubmodels.prepack import accelerate, graphed

EXACT = 1e-10  # float64


class Recorder:
    """As on a GPU: what is recorded has run before, and runs again at the same places."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.pools = []

    def __call__(self, run, pool):
        self.recorded += 1
        self.pools.append(pool)
        run()
        run()

        def replay():
            self.replayed += 1
            run()

        return replay


def graphed_encoder(recorder):
    model, _ = pair("BertModel")
    fast = copy.copy(model)
    fast.shortcut = GraphedBlocks(model.layers, recorder)
    return model, fast


def test_there_is_room_for_all_tokens_and_an_eighth_more_at_most():
    rooms = [room_for(tokens) for tokens in range(1, 40000)]
    assert all(tokens <= room < tokens + max(16, tokens / 8 + 1) for tokens, room in enumerate(rooms, 1))
    assert rooms == sorted(rooms)
    assert all(room % 16 == 0 for room in rooms)
    assert len(set(rooms)) < 100


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_as_a_graph_equal_the_blocks(pattern):
    recorder = Recorder()
    model, fast = graphed_encoder(recorder)
    inputs = inputs_of("BertModel", pattern)
    with torch.inference_mode():
        for number in range(1, 4):
            found, expected = fast(**inputs), model(**inputs)
            assert distance(found.last_hidden_state, expected.last_hidden_state) <= EXACT
            assert distance(found.pooler_output, expected.pooler_output) <= EXACT
            assert (recorder.recorded, recorder.replayed) == (1, number)
            inputs["input_ids"] = inputs["input_ids"].roll(1, 0)


def test_batches_of_many_shapes_share_a_few_graphs_and_leave_nothing_to_each_other():
    recorder = Recorder()
    model, fast = graphed_encoder(recorder)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(40):
            rows = int(torch.randint(1, 5, (1,), generator=draw))
            lengths = torch.randint(1, S + 1, (rows,), generator=draw)
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            ids = torch.randint(5, 20, mask.shape, generator=draw)
            found, expected = (each(ids, mask).last_hidden_state for each in (fast, model))
            assert distance(found, expected) <= EXACT
    assert recorder.replayed == 40
    assert recorder.recorded < 25


def test_what_is_returned_is_not_overwritten_by_the_next_batch():
    _, fast = graphed_encoder(Recorder())
    inputs = inputs_of("BertModel", "none")
    with torch.inference_mode():
        first = fast(**inputs).last_hidden_state
        before = first.clone()
        fast(inputs["input_ids"].flip(0))
    assert torch.equal(first, before)


@pytest.mark.parametrize("case", ["hook", "pairs", "states", "attentions", "no token"])
def test_what_is_not_for_graphs_goes_through_the_blocks(case):
    recorder = Recorder()
    model, fast = graphed_encoder(recorder)
    inputs = inputs_of("BertModel", "right")
    asked = {"states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(case, {})
    if case == "hook":
        model.layers[0].attention.register_forward_hook(lambda *_: None)
    elif case == "pairs":
        inputs["attention_mask"] = torch.ones(B, S, S)
    elif case == "no token":
        inputs["attention_mask"] = torch.zeros(B, S)
    with torch.inference_mode():
        assert torch.equal(fast(**inputs, **asked).last_hidden_state, model(**inputs, **asked).last_hidden_state)
    assert recorder.recorded == 0


def test_graphs_are_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 2)
    recorder = Recorder()
    _, fast = graphed_encoder(recorder)
    with torch.inference_mode():
        for rows in (1, 2, 1, 4, 1, 2):
            fast(torch.full((rows, S), 7))
    assert recorder.recorded == 4  # 1, 2, 4, and 2 again
    assert len(fast.shortcut.graphs) == 2


def test_graphs_end_with_the_weights_they_were_of():
    recorder = Recorder()
    model, fast = graphed_encoder(recorder)
    inputs = inputs_of("BertModel", "none")
    with torch.inference_mode():
        fast(**inputs)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.5  # as `to` does it
        assert distance(fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state) <= EXACT
    assert recorder.recorded == 2
    assert recorder.pools[0] is not recorder.pools[1]  # the first ones' memory goes with them


def test_an_encoders_graphs_share_their_memory_and_no_one_elses():
    recorder = Recorder()
    for _ in range(2):
        _, fast = graphed_encoder(recorder)
        with torch.inference_mode():
            for rows in (1, 4):
                fast(torch.full((rows, S), 7))
    first, second, other, last = recorder.pools
    assert first is second
    assert other is last
    assert first is not other


def test_what_is_recorded_on_a_gpu_is_told_which_memory_to_take(monkeypatch):
    """torch.cuda, in its own words: three runs on a stream of their own, then the capture."""
    told, handles = [], iter(["a handle", "another"])

    @contextmanager
    def graph(recorded, pool):
        told.append(("capture", pool))
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: told.append("replay")),
        "graph": graph,
        "graph_pool_handle": lambda: next(handles),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    pool, other = graphs.Pool(), graphs.Pool()
    replays = [graphs.record_on_cuda(lambda: told.append("run"), each) for each in (pool, pool, other)]
    replays[0]()
    captures = [("capture", handle) for handle in ("a handle", "a handle", "another")]
    assert [each for each in told if each not in ("run", "replay")] == captures
    assert told[:5] == ["run", "run", "run", captures[0], "run"]
    assert told[-1] == "replay"


def test_a_copy_records_graphs_of_its_own():
    _, fast = graphed_encoder(graphs.record_on_cuda)
    fast.shortcut.graphs[1, 1, 1] = "a graph, which nobody can copy"
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.shortcut.graphs == {}
        assert other.shortcut.blocks is other.layers


# A step of decoding


def generated(model, *inputs, **options):
    return [row.ids for row in model.generate(*inputs, **options)]


@pytest.mark.parametrize("padding", ["none", "left", "interleaved"])
@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_steps_as_a_graph_give_the_same_words(name, padding, monkeypatch):
    monkeypatch.setattr(graphs.GraphedSteps, "least", 4)
    model, _ = language_pair(name)
    recorder = Recorder()
    fast = graphed(model, recorder)
    inputs = (prompts_of(),) if padding == "none" else ragged(padding)[1:]
    expected = generated(model, *inputs, max_new_tokens=8)
    assert generated(fast, *inputs, max_new_tokens=8) == expected
    assert (recorder.recorded, recorder.replayed) == (1, 7)


def test_rows_that_end_and_samples_and_beams_are_as_without(monkeypatch):
    monkeypatch.setattr(graphs.GraphedSteps, "least", 4)
    model, _ = language_pair("gpt2")
    _, *inputs = ragged("left")
    stop = generated(model, *inputs, max_new_tokens=8)[0][3]
    for options in (
        {"stop_ids": [stop]},
        {"temperature": 1.0, "seed": 3, "num_return_sequences": 2},
        {"num_beams": 3},
        {"repetition_penalty": 1.5},
    ):
        recorder = Recorder()
        fast = graphed(model, recorder)
        assert generated(fast, *inputs, max_new_tokens=8, **options) == generated(
            model, *inputs, max_new_tokens=8, **options
        )
        assert recorder.recorded == (0 if "num_beams" in options else 1)


def test_a_step_as_a_graph_allocates_no_cache(monkeypatch):
    monkeypatch.setattr(graphs.GraphedSteps, "least", 4)
    model, _ = language_pair("gpt2")
    fast = graphed(model, Recorder())
    tokens = model.stream(prompts_of(), max_new_tokens=9)
    places = set()
    real = graphs.GraphedStep.__call__
    monkeypatch.setattr(
        graphs.GraphedStep,
        "__call__",
        lambda self, *given: (
            places.add((self.cache.layers[0].kept.data_ptr(), self.scores.data_ptr())) or real(self, *given)
        ),
    )
    assert list(fast.stream(prompts_of(), max_new_tokens=9)) == list(tokens)
    assert len(places) == 1


def test_accelerate_says_what_it_does_elsewhere():
    model, _ = pair("BertModel")
    with pytest.raises(InputError) as error:
        accelerate(model.to("meta"))
    assert str(error.value) == "accelerate: expected a model on a CPU or a GPU, got one on meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    model = pair("BertModel")[0].to("cuda", dtype)
    fast = accelerate(model)
    assert "CUDA graphs" in fast.acceleration
    inputs = {name: tensor.cuda() for name, tensor in inputs_of("BertModel", "right").items()}
    with torch.inference_mode():
        for _ in range(2):
            assert distance(fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state) <= 0.05
    writer = language_pair("gpt2")[0].to("cuda", torch.float32)
    prompts = prompts_of().cuda()
    assert generated(accelerate(writer), prompts, max_new_tokens=40) == generated(writer, prompts, max_new_tokens=40)
