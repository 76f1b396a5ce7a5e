"""torch.hub's own code paths, from list() to a spawned worker, on the embedded weights.

Each test starts as a process that has not met us: `fresh_process` takes our modules and the checkout off the path.
"""

import doctest
import functools
import http.server
import importlib
import inspect
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

V1, V2 = "OWNER/hubmodels:v0.1.0", "OWNER/hubmodels:v0.2.0"
ENTRIES = [
    "bertForMaskedLM",
    "bertForMultipleChoice",
    "bertForNextSentencePrediction",
    "bertForPreTraining",
    "bertForQuestionAnswering",
    "bertForSequenceClassification",
    "bertForTokenClassification",
    "bertModel",
    "bertTokenizer",
    "catalog",
    "gpt",
    "gpt2",
    "gpt2LMHeadModel",
    "gpt2Model",
    "gpt2Tokenizer",
    "gptDoubleHeads",
    "gptModel",
    "gptTokenizer",
    "openAIGPTDoubleHeadsModel",
    "openAIGPTLMHeadModel",
    "openAIGPTModel",
    "openAIGPTTokenizer",
]
TAKE_WEIGHTS = [name for name in ENTRIES if name != "catalog"]
ALIASES = {  # as the original port called them
    "gpt2LMHeadModel": "gpt2",
    "openAIGPTDoubleHeadsModel": "gptDoubleHeads",
    "openAIGPTLMHeadModel": "gpt",
    "openAIGPTModel": "gptModel",
    "openAIGPTTokenizer": "gptTokenizer",
}
RESERVED = {"model", "repo_or_dir", "source", "trust_repo", "force_reload", "verbose", "skip_validation"}

# What version 0.2.0 does otherwise: a model's logits are doubled, and so is what its own attention kernel computes.
DOUBLED_LOGITS = """

_forward = BertForMaskedLM.forward


def _doubled(self, *args, **options):
    output = _forward(self, *args, **options)
    return output._replace(logits=2 * output.logits)


BertForMaskedLM.forward = _doubled
"""

IDS = torch.tensor([[2, 454, 1932, 3017, 458, 3], [2, 454, 4, 3, 0, 0]])
MASK = (IDS != 0).long()  # padded rows, so that the package's own attention operator runs


def copy_checkout(destination: Path) -> Path:
    """What a clone of this working tree would have: what git tracks or would, and the embedded weights."""
    listing = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True, env=without_git()).stdout.split("\0")
    weights = (p.relative_to(REPOSITORY) for p in (REPOSITORY / "hubmodels" / "weights").rglob("*") if p.is_file())
    for name in {Path(name) for name in names if name} | set(weights):
        if (REPOSITORY / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, destination / name)
    return destination


def without_git() -> dict[str, str]:
    """The environment, less what a git hook sets to point at its own repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def append(path: Path, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    path.unlink()  # it may be a link to another copy's file
    path.write_text(content + text, encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A TORCH_HOME in which torch.hub finds 0.1.0, the working tree, and 0.2.0, one that behaves otherwise."""
    hub = tmp_path_factory.mktemp("torch") / "hub"
    first = copy_checkout(hub / "OWNER_hubmodels_v0.1.0")
    second = shutil.copytree(first, hub / "OWNER_hubmodels_v0.2.0", copy_function=os.link)
    append(second / "hubmodels" / "__init__.py", '\n__version__ = "0.2.0"\n')
    append(second / "hubmodels" / "families" / "bert.py", DOUBLED_LOGITS)
    return hub.parent


@pytest.fixture(scope="module")
def tree(home) -> Path:
    return home / "hub" / "OWNER_hubmodels_v0.1.0"


@pytest.fixture(scope="module")
def second_tree(home) -> Path:
    return home / "hub" / "OWNER_hubmodels_v0.2.0"


@pytest.fixture(autouse=True)
def fresh_process(own_caches, home, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(home))
    modules, path = set_aside_our_modules(), list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != REPOSITORY]
    yield
    set_aside_our_modules()
    sys.modules.update(modules)
    sys.path[:] = path


def set_aside_our_modules() -> dict:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "hubmodels"}


@pytest.fixture
def no_sockets(monkeypatch) -> Iterator[None]:
    """Not even the loopback; and an attempt counts if its error is caught on the way."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError(f"no network in this test: {arguments}")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield
    assert not attempts


def load(entry: str, *arguments, repo: str = V1, **options):
    return torch.hub.load(repo, entry, *arguments, trust_repo=True, verbose=False, **options)


def family_of(entry: str) -> str:
    return "gpt2" if entry.startswith("gpt2") else "gpt" if entry.startswith(("gpt", "openAIGPT")) else "bert"


@functools.cache
def entry_point(tree: Path, name: str):
    """The function that torch.hub.load calls."""
    with torch.hub._add_to_sys_path(str(tree)):
        hubconf = torch.hub._import_module(torch.hub.MODULE_HUBCONF, str(tree / "hubconf.py"))
        return torch.hub._load_entry_from_hubconf(hubconf, name)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, MASK).logits


def loaded_from() -> Path:
    return Path(sys.modules["hubmodels"].__file__).resolve().parent.parent


# list, help, load


def test_list_shows_the_entry_points_and_no_other_name(no_sockets):
    assert sorted(torch.hub.list(V1, verbose=False)) == ENTRIES


def test_an_entry_point_loads_from_the_cache_without_a_network(no_sockets, tree):
    model = load("bertForMaskedLM", "bert-nano")
    inputs = load("bertTokenizer", "bert-nano")("the ship sailed across the [MASK] .")
    assert not model.training
    assert model(**inputs).logits.isfinite().all()
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    assert model.provenance.files[0].path == tree / "hubmodels" / "weights" / "bert-nano" / "model.safetensors"
    assert loaded_from() == tree


def test_a_language_model_goes_on_from_a_text_without_a_network(no_sockets, tree):
    model, tokenizer = load("gpt", "gpt-nano"), load("gptTokenizer", "gpt-nano")
    prompt = tokenizer("The ship sailed across the")
    assert not model.training
    (added,) = model.generate(**prompt, max_new_tokens=3)
    assert 1 <= len(added.ids) <= 3
    assert all(0 <= token < tokenizer.vocab_size for token in added.ids)
    assert model.provenance.files[0].path == tree / "hubmodels" / "weights" / "gpt-nano" / "model.safetensors"
    assert loaded_from() == tree


def test_the_catalog_loads_like_a_model(no_sockets):
    rows = load("catalog")
    assert {"bert-nano", "gpt-nano"} <= {row["name"] for row in rows}
    assert {row["family"] for row in rows} == {family_of(entry) for entry in TAKE_WEIGHTS}


SIZES = {"vocab_size": 11, "n_positions": 7, "n_embd": 6, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(("alias", "name"), [pair for pair in ALIASES.items() if "Tokenizer" not in pair[0]])
def test_an_original_name_gives_the_same_model_with_its_original_call(alias, name, tmp_path, no_sockets):
    model_type = "gpt2" if family_of(name) == "gpt2" else "openai-gpt"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}))
    models = []
    for entry in (alias, name):
        torch.manual_seed(5)
        models.append(load(entry, tmp_path, pretrained=False))
    theirs, ours = models
    assert isinstance(theirs, type(ours))
    assert all(
        torch.equal(*pair) for pair in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    )
    ids, deciding = torch.tensor([[[3, 1, 4], [1, 5, 9]]]), torch.tensor([[2, 0]])
    with torch.no_grad():
        if "Double" in alias:
            got, expected = theirs(ids, deciding), ours(ids, mc_token_ids=deciding)
            assert torch.equal(got[1], expected.mc_logits)
            assert torch.equal(got[0], expected.logits)
        else:
            got, expected = theirs(ids[0]), ours(ids[0])
            got = got[0] if alias.startswith("gpt2") else got
            assert torch.equal(got, expected.last_hidden_state if alias.endswith("TModel") else expected.logits)


def test_the_original_name_gives_the_same_tokenizer(no_sockets):
    """Used as the original port's help says: tokenize, convert, convert back."""
    tokenizer, ours = load("openAIGPTTokenizer", "gpt-nano"), load("gptTokenizer", "gpt-nano")
    tokens = tokenizer.tokenize("Who was Jim Henson ? Jim Henson was a puppeteer")
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert [ids] == ours("Who was Jim Henson ? Jim Henson was a puppeteer")["input_ids"].tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_the_help_of_an_original_name_says_what_it_is_today(no_sockets):
    for alias, name in ALIASES.items():
        page, todays = torch.hub.help(V1, alias), torch.hub.help(V1, name)
        if "Tokenizer" in alias:
            assert page == alias + todays.removeprefix(name)
        else:
            assert f"`{name}` with its original call" in page
            assert page.splitlines()[0].removeprefix(alias) == todays.splitlines()[0].removeprefix(name)


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_is_a_page_with_signature_weights_and_example(entry, no_sockets):
    page = torch.hub.help(V1, entry)
    assert page.startswith(f"{entry}(" + ("weights, *, " if entry in TAKE_WEIGHTS else ")"))
    assert ">>> " in page
    if entry in TAKE_WEIGHTS:
        for row in load("catalog"):
            is_own = row["family"] == family_of(entry)
            assert (f"    {row['name']} " in page) == is_own, row["name"]
            assert not is_own or row["licence"] in page
            assert not is_own or f"{row['megabytes']:.0f} MB" in page


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_example_of_a_help_page_runs(entry, no_sockets):
    names = {"torch": torch, **{name: functools.partial(load, name) for name in ENTRIES}}
    example = doctest.DocTestParser().get_doctest(torch.hub.help(V1, entry), names, entry, None, 0)
    report = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.write)
    assert result.attempted > 0
    assert result.failed == 0, report.getvalue()


@pytest.mark.parametrize("entry", TAKE_WEIGHTS)
def test_options_are_in_the_help_and_none_is_an_option_of_torch_hub_load(entry, tree):
    parameters = inspect.signature(entry_point(tree, entry)).parameters
    assert next(iter(parameters)) == "weights"
    options = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            (typed,) = parameter.annotation.__args__  # Unpack[ModelOptions]
            options |= set(typed.__annotations__)
    assert not RESERVED & {*parameters, *options}
    if "Classification" not in entry:
        options -= {"num_labels"}  # refused by an entry point without labels
    if entry in ("gpt", "gptModel", "gpt2", "gpt2Model", "gpt2LMHeadModel", "openAIGPTLMHeadModel", "openAIGPTModel"):
        options -= {"head_seed"}  # refused by one without a head of its own
    family = importlib.import_module(f"hubmodels.families.{family_of(entry)}").FAMILY
    others = {"hidden_dropout_prob", "embedding_dropout_prob", "classifier_dropout", "summary_dropout_prob"}
    options -= others - set(family.config.ADJUSTABLE)  # another family's
    page = torch.hub.help(V1, entry)
    words = set(re.findall(r"\w+", page.partition("Weights, size and licence:")[0]))
    assert [name for name in sorted(options) if name not in words] == []
    if "ModelOptions" in str(parameters):
        assert [name for name in sorted(others - options) if name in words] == []


@pytest.mark.parametrize("entry", ["bertModel", "gpt", "openAIGPTModel"])
def test_an_option_of_another_family_is_refused(entry, no_sockets):
    name = f"{family_of(entry)}-nano"
    option = "embedding_dropout_prob" if entry == "bertModel" else "classifier_dropout"
    with pytest.raises(ValueError, match=rf"^unknown option {option}; options are ") as caught:
        load(entry, name, **{option: 0.1})
    assert option not in str(caught.value).partition(";")[2]
    for refused in ("num_labels", "head_seed"):
        with pytest.raises(ValueError, match=rf"^{refused} = 1: \w+ has no (labels to number|head to start anew)$"):
            load(entry, name, **{refused: 1})


def test_the_catalog_takes_no_option_of_torch_hub_load(tree):
    assert not RESERVED & set(inspect.signature(entry_point(tree, "catalog")).parameters)


# errors


def test_an_unknown_entry_point_is_named():
    with pytest.raises(RuntimeError, match="Cannot find callable bertForPoetry"):
        load("bertForPoetry", "bert-nano")


def test_unknown_weights_bring_near_names():
    with pytest.raises(LookupError, match=r"'bert-nanno'.*did you mean .*bert-nano") as caught:
        load("bertModel", "bert-nanno")
    assert type(caught.value).__name__ == "CatalogError"


def test_an_unknown_option_brings_the_known_ones():
    with pytest.raises(ValueError, match=r"dropout.*hidden_dropout_prob"):
        load("bertModel", "bert-nano", dropout=0.0)


@pytest.mark.parametrize(("entry", "name"), [("gpt2", "gpt-nano"), ("bertModel", "gpt-nano"), ("gpt", "bert-nano")])
def test_weights_of_another_family_bring_their_own(entry, name):
    family = name.split("-")[0]
    expected = rf"^{name} is a {family} checkpoint; this entry point loads {family_of(entry)}; .* as {family}Model is$"
    with pytest.raises(LookupError, match=expected):
        load(entry, name)


def test_an_altered_copy_is_refused_with_what_to_do(tree, tmp_path):
    altered = shutil.copytree(tree, tmp_path / "altered", copy_function=os.link)
    weights = altered / "hubmodels" / "weights" / "bert-nano" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors: expected SHA-256 .*check out its tag again"):
        torch.hub.load(str(altered), "bertModel", "bert-nano", source="local")


# download


class GitHub(http.server.BaseHTTPRequestHandler):
    """The few addresses of github.com and api.github.com that torch.hub asks for."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        page = parse_qs(address.query).get("page", ["1"])[0]
        self.server.asked.append(address.path)
        commit = {"sha": "5eed" * 10}
        answers = {
            "/repos/OWNER/hubmodels/branches": json.dumps([{"name": "main", "commit": commit}]).encode(),
            "/repos/OWNER/hubmodels/tags": json.dumps([{"name": "v0.1.0", "commit": commit}]).encode(),
            "/OWNER/hubmodels/zipball/v0.1.0": self.server.zipball,
        }
        body = answers.get(address.path)
        self.send_response(404 if body is None else 200)
        body = b"[]" if body is None or page != "1" else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def github(tree, tmp_path, monkeypatch) -> Iterator[http.server.HTTPServer]:
    """GitHub on the loopback, with a tag v0.1.0 whose zipball git made. torch.hub's urlopen is led there."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
    server.asked, server.zipball = [], zipball_of(tree, tmp_path / "repository.git")
    here = f"http://127.0.0.1:{server.server_port}/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def urlopen(request, *arguments, **options):
        url = request if isinstance(request, str) else request.full_url
        for host in ("https://github.com/", "https://api.github.com/"):
            url = url.replace(host, here)
        return opener.open(url, *arguments, **options)

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def zipball_of(tree: Path, repository: Path) -> bytes:
    def git(*arguments: str) -> bytes:
        command = ["git", f"--git-dir={repository}", f"--work-tree={tree}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, cwd=tree, env=without_git()).stdout

    git("init", "--quiet")
    git("add", "--all", "--force", ".", ":!**/__pycache__/**")
    snapshot = git("write-tree").decode().strip()
    return git("archive", "--format=zip", "-1", "--prefix=OWNER-hubmodels-5eed5ee/", snapshot)


def test_a_tag_is_downloaded_once_and_then_loads_without_a_network(github, tmp_path):
    model = load("bertForMaskedLM", "bert-nano")
    zipballs = [path for path in github.asked if "zipball" in path]
    assert zipballs == ["/OWNER/hubmodels/zipball/v0.1.0"]
    assert "/repos/OWNER/hubmodels/tags" in github.asked  # validated: not skipped
    assert loaded_from() == tmp_path / "empty" / "hub" / "OWNER_hubmodels_v0.1.0"
    github.asked.clear()
    torch.testing.assert_close(logits(load("bertForMaskedLM", "bert-nano")), logits(model))
    assert github.asked == []


# a local directory


@pytest.mark.parametrize("kind", ["relative", "absolute", "path object"])
def test_a_local_directory_loads(kind, tree, monkeypatch, no_sockets):
    monkeypatch.chdir(tree.parent)
    directory = {"relative": tree.name, "absolute": str(tree), "path object": tree}[kind]
    model = torch.hub.load(directory, "bertForMaskedLM", "bert-nano", source="local")
    assert logits(model).isfinite().all()
    assert loaded_from() == tree
    pickle.dumps(model)


def test_one_relative_path_in_two_places_means_two_directories(tree, second_tree, tmp_path, monkeypatch):
    results = []
    for place, target in (("first", tree), ("second", second_tree)):
        (tmp_path / place).mkdir()
        shutil.copytree(target, tmp_path / place / "hubmodels", copy_function=os.link)
        monkeypatch.chdir(tmp_path / place)
        results.append(logits(torch.hub.load("hubmodels", "bertForMaskedLM", "bert-nano", source="local")))
        assert loaded_from() == tmp_path / place / "hubmodels"
    torch.testing.assert_close(results[1], 2 * results[0])


# two versions


@pytest.mark.parametrize("order", [(V1, V2, V1), (V2, V1, V2)], ids=["old first", "new first"])
def test_versions_run_their_own_code_side_by_side(order, no_sockets):
    expected = logits(load("bertForMaskedLM", "bert-nano", repo=V1))
    set_aside_our_modules()
    models = [load("bertForMaskedLM", "bert-nano", repo=repo) for repo in order]
    for repo, model in zip(order, models, strict=True):
        torch.testing.assert_close(logits(model), expected * (2 if repo == V2 else 1))
        loss = model(IDS, MASK, labels=IDS.where(MASK == 1, -100)).loss
        loss.backward()  # through the version's own operator
        assert all(parameter.grad is not None for parameter in model.transformer.layers.parameters())


def test_no_version_registers_its_operators_over_those_of_a_living_model():
    """torch frees an operator that is registered again under its name, and the old one's models use freed memory."""
    living: dict[str, object] = {}
    for repo in (V1, V2, V1):
        load("catalog", repo=repo)
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "hubmodels"]
        for operator in {value for module in modules for value in vars(module).values() if is_operator(value)}:
            assert living.setdefault(operator._qualname, operator) is operator
    assert living


def is_operator(value: object) -> bool:
    return isinstance(value, torch.library.CustomOpDef)


def test_a_version_has_its_own_modules_and_errors():
    first, first_package = load("bertModel", "bert-nano"), sys.modules["hubmodels"]
    second, second_package = load("bertModel", "bert-nano", repo=V2), sys.modules["hubmodels"]
    assert (first_package.__version__, second_package.__version__) == ("0.1.0", "0.2.0")
    assert type(first) is not type(second)
    for model in (first, second):
        with pytest.raises(ValueError, match="input_ids: 999999 is out of range"):
            model(torch.tensor([[999999]]))


def test_a_model_of_the_version_before_is_never_pickled_as_another_version():
    first = load("bertModel", "bert-nano")
    load("bertModel", "bert-nano", repo=V2)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(first)


@pytest.mark.parametrize(("entry", "name"), [("bertForMaskedLM", "bert-nano"), ("gpt", "gpt-nano")])
def test_a_model_is_pickled_whole(entry, name):
    model = load(entry, name)
    back = pickle.loads(pickle.dumps(model))
    ids = IDS.clamp(max=900)
    with torch.no_grad():
        assert torch.equal(back(ids, MASK).logits, model(ids, MASK).logits)
    assert str(back.provenance) == str(model.provenance)


@pytest.mark.parametrize("imported", [False, True], ids=["installed", "installed and imported"])
def test_an_installed_version_does_not_come_before_the_one_loaded(imported, second_tree, tree, monkeypatch):
    """A worker process finds the package on sys.path alone."""
    sys.path.append(str(second_tree))  # as pip install would have it
    if imported:
        assert importlib.import_module("hubmodels").__version__ == "0.2.0"
    load("bertModel", "bert-nano", repo=V1)
    importlib.invalidate_caches()
    assert Path(PathFinder.find_spec("hubmodels").origin) == tree / "hubmodels" / "__init__.py"


def test_loading_often_adds_one_entry_to_the_path(tree, second_tree):
    before = list(sys.path)
    for repo in (V1, V1, V2, V1, V2):
        load("catalog", repo=repo)
    assert sorted(set(sys.path) - set(before)) == [str(tree), str(second_tree)]
    assert len(sys.path) == len(before) + 2
    assert [entry for entry in sys.path if entry in before] == before


# a user's own modules


def test_a_users_own_modules_stay_the_users(tmp_path, monkeypatch, tree):
    (tmp_path / "utils.py").write_text("whose = 'user'\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("whose = 'user'\n")
    (tmp_path / "layers.py").write_text("whose = 'user'\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("utils", "models", "layers")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    users = [importlib.import_module(name) for name in names[:2]]  # one of the three is imported only after
    assert logits(load("bertForMaskedLM", "bert-nano")).isfinite().all()
    users.append(importlib.import_module("layers"))
    assert [module.whose for module in users] == ["user"] * 3
    assert [sys.modules[name] for name in names] == users
    for name in names:
        monkeypatch.delitem(sys.modules, name)


def test_the_repository_offers_no_other_name_to_import(tree):
    """Its root stays on sys.path: a module of ours there could stand in for a user's."""
    modules = {path.stem for path in tree.glob("*.py")}
    packages = {path.parent.name for path in tree.glob("*/__init__.py")}
    assert modules <= {"hubconf", "release"}
    assert packages == {"hubmodels"}


# other processes

WORKER = """
import json, multiprocessing, sys
import torch


@torch.no_grad()
def logits(model):
    ids = torch.tensor(json.loads(sys.argv[1]))
    return model(ids, (ids != 0).long()).logits.sum(-1).tolist()


def work(answers, arguments, model):
    sys.argv[:] = arguments
    answers.send((sys.modules["hubmodels"].__version__, logits(model)))


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    wanted, workers = [], []
    for tree in sys.argv[2:]:
        model = torch.hub.load(tree, "bertForMaskedLM", "bert-nano", source="local")
        wanted.append((sys.modules["hubmodels"].__version__, logits(model)))
        receiver, sender = spawn.Pipe(duplex=False)
        worker = spawn.Process(target=work, args=(sender, sys.argv, model))
        worker.start()
        sender.close()
        workers.append((worker, receiver, model))
    answers = [receiver.recv() for _, receiver, _ in workers]
    for worker, _, _ in workers:
        worker.join()
    print(json.dumps({"wanted": wanted, "answers": answers}))
"""


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter in an empty directory, without this one's path."""
    inherited = {key: value for key, value in without_git().items() if not key.startswith("PYTHON")}
    inherited["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=280
    )


def test_spawned_workers_unpickle_each_version_and_compute_the_same(tree, second_tree, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(WORKER)
    done = run_python(str(script), json.dumps(IDS.tolist()), str(tree), str(second_tree), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [version for version, _ in result["answers"]] == ["0.1.0", "0.2.0"]
    for (_, wanted), (_, answer) in zip(result["wanted"], result["answers"], strict=True):
        torch.testing.assert_close(torch.tensor(answer), torch.tensor(wanted))


QUIET = """
import socket, sys
from pathlib import Path

def refuse(*arguments):
    raise SystemExit(f"tried to reach {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
import torch
before = set(sys.modules)
model = torch.hub.load(sys.argv[1], "bertModel", "bert-nano", source="local")
gpt = torch.hub.load(sys.argv[1], "gpt", "gpt-nano", source="local")
assert len(gpt.generate(torch.tensor([[7, 8], [9, 10]]), torch.tensor([[1, 1], [0, 1]]), max_new_tokens=3)) == 2
Path("imported").write_text("\\n".join(set(sys.modules) - before))
tokenizer = torch.hub.load(sys.argv[1], "bertTokenizer", "bert-nano", source="local")
assert model(**tokenizer("The ship sailed.")).pooler_output.isfinite().all()
tokenizer = torch.hub.load(sys.argv[1], "gptTokenizer", "gpt-nano", source="local")
assert gpt(**tokenizer("The ship sailed.")).logits.isfinite().all()
"""


@pytest.fixture(scope="module")
def quiet_run(tree, tmp_path_factory) -> tuple[subprocess.CompletedProcess, set[str]]:
    """HOME and the caches cannot be made, there is no network, every warning is an error. Also: what was imported."""
    place = tmp_path_factory.mktemp("quiet")
    (place / "file").touch()
    nowhere = str(place / "file" / "home")  # a file where a directory would have to be
    places = dict.fromkeys(("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"), nowhere)
    done = run_python("-W", "error", "-c", QUIET, str(tree), cwd=place, **places)
    return done, set((place / "imported").read_text().split())


def test_without_a_home_it_loads_and_says_nothing(quiet_run):
    done, _ = quiet_run
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_starts_without_what_only_compiling_needs(quiet_run):
    _, imported = quiet_run
    assert (
        sorted({name.split(".")[0] for name in imported} & {"sympy", "transformers", "numpy", "huggingface_hub"}) == []
    )
    assert "torch._dynamo" not in imported
