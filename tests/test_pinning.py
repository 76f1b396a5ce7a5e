"""`pin`: a repository on an endpoint becomes an entry of the manifest, or nothing is written and it is said why."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPOSITORY
from servers import REVISION, Asked, Exchange, FakeHub, fail, serve
from test_kit import clean_environment
from test_verification import SIZES, WORDS, catalog, small_repository, tiny_bert

import hubmodels
from hubmodels import pinning, verification
from hubmodels.cli import main
from hubmodels.errors import CatalogError, CheckpointError, ConfigError, HubModelsError, InputError, StoreError
from hubmodels.families import gpt, gpt2
from hubmodels.pinning import dump, pin
from hubmodels.tokenizers import train_byte_pair

jsonschema = pytest.importorskip("jsonschema")
MANIFEST = REPOSITORY / "weights_manifest.json"
SCHEMA = json.loads((REPOSITORY / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
REPO, VERSION = "someone/tiny-bert", "1.2.3"
TEXT = "the ship sailed across the sea and the captain looked at the stars, which were far away."


@cache
def tiny_bin() -> bytes:
    """The weights of the tiny checkpoint as they were published before safetensors."""
    from safetensors.torch import load

    with tempfile.TemporaryDirectory() as directory:
        torch.save(load(tiny_bert()["model.safetensors"]), Path(directory, "pytorch_model.bin"))
        return Path(directory, "pytorch_model.bin").read_bytes()


@cache
def tiny_gpt(family: str) -> MappingProxyType[str, bytes]:
    """Name -> bytes of the files of a tiny GPT or GPT-2 with its own vocabulary."""
    if family == "gpt2":
        inner = json.loads(train_byte_pair([TEXT] * 4, 290).inner.to_str())["model"]
        vocabulary, merges = inner["vocab"], [" ".join(pair) for pair in inner["merges"]]
    else:
        pieces = ["<unk>", *(letter + end for letter in sorted(set(TEXT) - {" "}) for end in ("", "</w>")), "sh"]
        vocabulary, merges = {piece: number for number, piece in enumerate(pieces)}, ["s h"]
    config, cls = (gpt2.Gpt2Config, gpt2.Gpt2Model) if family == "gpt2" else (gpt.GptConfig, gpt.GptModel)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = cls(config(**sizes, max_position_embeddings=80))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    with tempfile.TemporaryDirectory() as directory:
        hubmodels.export(model, directory)
        files = {name: Path(directory, name).read_bytes() for name in ("model.safetensors", "config.json")}
    files["vocab.json"] = json.dumps(vocabulary).encode()
    return MappingProxyType(files | {"merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode()})


def bert_files(**changes: bytes | None) -> dict[str, bytes]:
    """The tiny BERT's files; changes: name, with __ for the dot, = its bytes, or None if there is no such file."""
    renamed = {name.replace("__", "."): content for name, content in changes.items()}
    return {name: content for name, content in (dict(tiny_bert()) | renamed).items() if content is not None}


def config_with(**changes: Any) -> bytes:
    return json.dumps(json.loads(tiny_bert()["config.json"]) | changes).encode()


class Models(Exchange):
    """Answers what HfApi.model_info asks, too."""

    def do_GET(self) -> None:
        hub, path = self.server.hub, self.path.lstrip("/")
        if not path.startswith("api/models/") or path not in hub.files:
            return super().do_GET()
        hub.asked.append(Asked(self.command, path, {}))
        return hub.answer(self, hub.files[path])


class Endpoint(NamedTuple):
    """A hub that answers HfApi.model_info, too, and a manifest to write into."""

    hub: FakeHub
    manifest: Path

    def publish(self, files: Mapping[str, bytes], repo: str = REPO, revision: str = "main", **info: Any) -> None:
        """What the hub tells of such a repository; info: of its answer. As there, weights are in LFS, text is not."""
        self.hub.server.RequestHandlerClass = Models
        siblings = []
        for name, content in files.items():
            self.hub.put(f"{repo}/resolve/{REVISION}/{name}", content)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".bin", ".safetensors")):
                sha256 = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(row)
        told = {"id": repo, "sha": REVISION, "siblings": siblings, "cardData": {"license": "mit"}, **info}
        for blobs in ("true", "True"):
            self.hub.put(f"api/models/{repo}/revision/{revision}?blobs={blobs}", json.dumps(told).encode())

    def pin(self, name: str = "tiny", repo: str = REPO, **options: Any) -> dict[str, Any]:
        return pin(repo, name, VERSION, path=self.manifest, progress=False, **options)

    def refusal(self, error: type[Exception] | tuple[type[Exception], ...], *args: str, **options: Any) -> str:
        """What is said when nothing is written."""
        before = self.manifest.read_bytes()
        with pytest.raises(error) as caught:
            self.pin(*args, **options)
        assert self.manifest.read_bytes() == before
        assert [path.name for path in self.manifest.parent.iterdir()] == [self.manifest.name]
        assert list(Path(tempfile.gettempdir()).glob("hubmodels-pin-*")) == []
        return str(caught.value)


@pytest.fixture
def endpoint(monkeypatch, tmp_path) -> Iterator[Endpoint]:
    """The real manifest, in a directory of its own, is what is written into."""
    (tmp_path / "manifests").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with FakeHub().running(monkeypatch) as hub:
        yield Endpoint(hub, Path(shutil.copy(MANIFEST, tmp_path / "manifests")))


def follows_the_schema(path: Path) -> bool:
    """Strictly: nan is no JSON."""

    def refuse(text: str) -> None:
        pytest.fail(f"{text} is no JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(content)] == []
    return True


def loads(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, name: str = "tiny") -> verification.Verification:
    """Fetch and verify by name, as anyone does with a version that has this manifest."""
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "_MANIFESTS", (endpoint.manifest,))
        catalog.manifest.cache_clear()
        entry = verification.ENTRY_POINTS[catalog.lookup(name).family]
        model, _ = entry.model(name, progress=False), entry.tokenizer(name, progress=False)
        assert model.provenance.revision == REVISION
        found = hubmodels.verify(name)
    catalog.manifest.cache_clear()
    return found


# --- Written


def test_a_bert_in_safetensors(endpoint, monkeypatch):
    endpoint.publish(tiny_bert())
    before = endpoint.manifest.read_bytes()
    entry = endpoint.pin()
    files = [
        {"source": REPO, "revision": REVISION, "filename": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()}
        for n, c in ((name, tiny_bert()[name]) for name in ("model.safetensors", "vocab.txt"))
    ]
    assert entry["files"] == files
    assert (entry["family"], entry["dialect"], entry["licence"]) == ("bert", "huggingface", "mit")
    assert entry["config"].items() >= SIZES.items()
    assert entry["tokenizer"] == {"file": "vocab.txt"}
    assert (entry["homepage"], entry["citation"]) == (f"https://huggingface.co/{REPO}",) * 2
    assert entry["check"]["source"] == f"computed in float64 by hubmodels {VERSION} from the pinned file"
    assert json.loads(endpoint.manifest.read_text())["weights"] == json.loads(before)["weights"] | {"tiny": entry}
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint).difference < 1e-5


def test_other_entries_stay_byte_for_byte(endpoint):
    endpoint.publish(tiny_bert())
    before = endpoint.manifest.read_text(encoding="utf-8")
    endpoint.pin()
    after = endpoint.manifest.read_text(encoding="utf-8")
    end = "\n    }\n  }\n}\n"
    assert before.endswith(end)
    assert after.startswith(before.removesuffix(end) + '\n    },\n    "tiny": {\n      "family": "bert",\n')
    assert after.endswith(end)


def test_dump_writes_the_manifest_as_it_is():
    text = MANIFEST.read_text(encoding="utf-8")
    assert dump(json.loads(text)) == text


def test_an_older_file_without_safetensors(endpoint, monkeypatch):
    endpoint.publish(bert_files(model__safetensors=None, pytorch_model__bin=tiny_bin()))
    entry = endpoint.pin()
    assert [file["filename"] for file in entry["files"]] == ["pytorch_model.bin", "vocab.txt"]
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint).difference < 1e-5


def test_safetensors_come_before_bin(endpoint):
    endpoint.publish(bert_files(pytorch_model__bin=b"never asked for"))
    assert endpoint.pin()["files"][0]["filename"] == "model.safetensors"
    assert not any(path.endswith(".bin") for _, path in endpoint.hub.requests)


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_a_gpt_has_two_files_of_vocabulary(endpoint, monkeypatch, family):
    """The first one's config.json calls itself openai-gpt."""
    endpoint.publish(tiny_gpt(family), "someone/tiny-gpt")
    entry = endpoint.pin("small", "someone/tiny-gpt")
    assert (entry["family"], entry["dialect"]) == (family, "huggingface")
    assert [file["filename"] for file in entry["files"]] == ["model.safetensors", "vocab.json", "merges.txt"]
    assert entry["tokenizer"] == {"file": "vocab.json", "merges": "merges.txt"}
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint, "small").difference < 1e-5


def test_the_check_is_the_models_own_output(endpoint):
    """To six digits, from the first three tokens after [CLS]: these tokens, this slice."""
    endpoint.publish(tiny_bert())
    check = endpoint.pin()["check"]
    ids = torch.tensor(check["input_ids"])
    assert ids.shape == (1, 18)
    with tempfile.TemporaryDirectory() as directory:
        for name, content in tiny_bert().items():
            Path(directory, name).write_bytes(content)
        with torch.no_grad():
            output = hubmodels.bertModel(Path(directory), dtype=torch.float64)(ids)
    assert (check["output"], check["slice"], check["atol"]) == ("last_hidden_state", [[0, 1], [1, 4], [1, 4]], 1e-4)
    expected = output.last_hidden_state[:1, 1:4, 1:4]
    torch.testing.assert_close(torch.tensor(check["expected"]).double(), expected, atol=1e-6, rtol=0)


def test_what_is_pinned_is_what_is_downloaded(endpoint):
    """The branch may move between the two: everything is fetched at the commit."""
    endpoint.publish(tiny_bert(), revision="v2")
    assert {file["revision"] for file in endpoint.pin(revision="v2")["files"]} == {REVISION}
    asked = {path for _, path in endpoint.hub.requests if not path.startswith("api/")}
    assert asked == {f"{REPO}/resolve/{REVISION}/{name}" for name in tiny_bert()}


def test_what_is_pinned_is_not_what_a_cache_had(endpoint):
    """Nobody has ever compared the bytes in the maintainer's Hugging Face cache with anything."""
    from huggingface_hub import constants

    endpoint.publish(tiny_bert())
    folder = Path(constants.HF_HUB_CACHE, f"models--{REPO.replace('/', '--')}")
    for name, content in tiny_bert().items():
        path = folder / "snapshots" / REVISION / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace(b"a\nb", b"b\na"))
    digests = {file["filename"]: file["sha256"] for file in endpoint.pin()["files"]}
    assert digests["vocab.txt"] == hashlib.sha256(tiny_bert()["vocab.txt"]).hexdigest()


def test_the_parameters_are_counted_without_heads(endpoint):
    endpoint.publish(tiny_bert())
    from safetensors.torch import load

    assert endpoint.pin()["parameters"] == sum(t.numel() for t in load(tiny_bert()["model.safetensors"]).values())


def test_what_is_said_wins_over_the_card(endpoint):
    endpoint.publish(tiny_bert())
    entry = endpoint.pin(licence="Apache-2.0", citation="Someone et al. 2020")
    assert (entry["licence"], entry["citation"]) == ("Apache-2.0", "Someone et al. 2020")


def test_only_the_architecture_of_the_config_is_kept(endpoint):
    config = config_with(_name_or_path="x", transformers_version="4.0.0", id2label={"0": "A"}, use_cache=True)
    endpoint.publish(bert_files(config__json=config))
    entry = endpoint.pin()
    silent = {"_name_or_path", "transformers_version", "id2label", "use_cache", "architectures"}
    assert not silent & set(entry["config"])
    assert entry["config"].items() >= SIZES.items()


OPTIONS = [
    ({"do_lower_case": False}, {"lower_case": False}),
    ({"do_lower_case": True, "strip_accents": None}, {"lower_case": True, "strip_accents": None}),
    (
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        {"lower_case": True, "strip_accents": False, "split_chinese": False},
    ),
    ({"model_max_length": 512, "tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}, {}),
    ({"do_lower_case": True, "add_prefix_space": True}, {"lower_case": True}),
]


@pytest.mark.parametrize(("settings", "options"), OPTIONS, ids=str)
def test_how_the_vocabulary_is_used_is_a_part_of_the_entry(endpoint, monkeypatch, settings, options):
    endpoint.publish(bert_files(tokenizer_config__json=json.dumps(settings).encode()))
    assert endpoint.pin()["tokenizer"] == {"file": "vocab.txt", **options}
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint).difference < 1e-5


@pytest.mark.parametrize("settings", [{"add_prefix_space": False}, {"add_prefix_space": False, "do_lower_case": False}])
def test_gpt2s_usual_settings_say_nothing(endpoint, monkeypatch, settings):
    """Its published tokenizer_config.json has add_prefix_space: false, which is what is done anyway."""
    endpoint.publish({**tiny_gpt("gpt2"), "tokenizer_config.json": json.dumps(settings).encode()})
    assert endpoint.pin()["tokenizer"] == {"file": "vocab.json", "merges": "merges.txt"}
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint).difference < 1e-5


def test_a_gpt2_that_reads_texts_otherwise_says_so(endpoint, monkeypatch):
    """add_prefix_space: true changes the ids; an entry without it would be of another tokenizer."""
    endpoint.publish({**tiny_gpt("gpt2"), "tokenizer_config.json": b'{"add_prefix_space": true}'})
    entry = endpoint.pin()
    assert entry["tokenizer"] == {"file": "vocab.json", "merges": "merges.txt", "add_prefix_space": True}
    assert follows_the_schema(endpoint.manifest)
    assert loads(monkeypatch, endpoint).difference < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "_MANIFESTS", (endpoint.manifest,))
        catalog.manifest.cache_clear()
        tokenizer = hubmodels.gpt2Tokenizer("tiny", progress=False)
    catalog.manifest.cache_clear()
    assert tokenizer.tokens(tokenizer("the")["input_ids"][0])[0].startswith("Ġ")


@pytest.mark.parametrize("progress", [False, True])
def test_bars_are_shown_if_they_are_wanted(endpoint, monkeypatch, progress):
    """The library's switch for them is global, and is put back."""
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def watched(*args: Any, **options: Any) -> str:
        disabled.append(are_progress_bars_disabled())
        return download(*args, **options)

    disabled: list[bool] = []
    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", watched)
    endpoint.publish(tiny_bert())
    before = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        pin(REPO, "tiny", VERSION, path=endpoint.manifest, progress=progress)
        assert set(disabled) == {not progress}
        assert not are_progress_bars_disabled()
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def test_a_second_pin_in_the_same_process(endpoint, monkeypatch):
    """And what the first wrote is known to the process that wrote it."""
    endpoint.publish(tiny_bert())
    endpoint.publish(tiny_bert(1), "someone/second")
    first = endpoint.pin()
    endpoint.pin("second", "someone/second")
    assert json.loads(endpoint.manifest.read_text())["weights"]["tiny"] == first
    assert list(catalog.manifest(endpoint.manifest))[-2:] == ["tiny", "second"]
    assert loads(monkeypatch, endpoint, "second").difference < 1e-5


def test_it_is_known_at_once_in_our_own_manifest(monkeypatch, tmp_path):
    """path: none given is this version's; `fetch`, say, finds the name without a new process."""
    with small_repository(monkeypatch, tmp_path / "repository") as small:
        assert "some-bert" in catalog.manifest()
        Endpoint(small.hub, small.root / "weights_manifest.json").publish(tiny_bert())
        pin(REPO, "new", VERSION, progress=False)
        assert "new" in small.content["weights"]
        assert catalog.lookup("new").files[0].source == REPO


# --- Refused, and nothing written


def test_a_name_that_is_taken(endpoint):
    """An entry never changes: it is what a tag has fixed."""
    endpoint.publish(tiny_bert())
    text = endpoint.refusal(InputError, "bert-nano")
    assert text == f"{endpoint.manifest}: bert-nano is there already, and an entry never changes; take another name"
    assert endpoint.hub.requests == []


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "-a", ".a", "é", "a\n", "a\0"])
def test_a_name_that_is_none(endpoint, name):
    endpoint.publish(tiny_bert())
    assert "expected letters, digits" in endpoint.refusal(InputError, name)
    assert endpoint.hub.requests == []


@pytest.mark.parametrize("repository", ["gpt2", "a/b/c", "", "../x", "a/b c", "https://huggingface.co/a/b", "./local"])
def test_a_repository_that_is_none(endpoint, repository):
    """The manifest takes owner/name only, though the endpoint may know a bare name."""
    endpoint.publish(tiny_bert(), repository)
    text = endpoint.refusal(HubModelsError, "tiny", repository)
    assert repository in text
    assert "owner/name" in text or "Repo id" in text


def test_each_manifest_is_checked_before_it_takes_the_old_ones_place(endpoint):
    """Every time, not only the first time that this process writes one."""
    endpoint.publish(tiny_bert())
    endpoint.pin()
    endpoint.publish(tiny_bert(1), "solo")
    assert "solo" in endpoint.refusal(HubModelsError, "second", "solo")


def test_what_the_reader_of_manifests_does_not_take_is_not_written(endpoint):
    """The endpoint says that the branch is at a commit that is none."""
    endpoint.publish(tiny_bert(), sha="main")
    for name, content in tiny_bert().items():
        endpoint.hub.put(f"{REPO}/resolve/main/{name}", content)
    text = endpoint.refusal(HubModelsError)
    assert "main" in text
    assert ".partial" not in text


@pytest.mark.parametrize("card", [None, {}, {"license": None}, {"license": ""}, {"language": "en"}])
def test_without_a_licence(endpoint, card):
    endpoint.publish(tiny_bert(), cardData=card)
    assert endpoint.refusal(InputError) == f"{REPO}: its card names no licence; give it with --licence"
    assert endpoint.pin(licence="MIT")["licence"] == "MIT"


@pytest.mark.parametrize("licence", [["mit", "apache-2.0"], " ", {"name": "mit"}, 7], ids=str)
def test_a_licence_that_is_no_text(endpoint, licence):
    """A card is written by hand, and may say anything; of several licences a person has to choose."""
    endpoint.publish(tiny_bert(), cardData={"license": licence})
    assert "--licence" in endpoint.refusal(InputError)
    endpoint.pin(licence="MIT")
    assert follows_the_schema(endpoint.manifest)


@pytest.mark.parametrize("citation", [" ", "\n"])
def test_a_citation_that_says_nothing(endpoint, citation):
    endpoint.publish(tiny_bert())
    before = endpoint.manifest.read_bytes()
    try:
        endpoint.pin(citation=citation)
    except InputError:
        assert endpoint.manifest.read_bytes() == before
    assert follows_the_schema(endpoint.manifest)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_repository_that_lacks_a_file(endpoint, gone):
    files = bert_files()
    del files[gone]
    endpoint.publish(files | {"README.md": b"# tiny", "tf_model.h5": b"x", "tokenizer.json": b"{}"})
    text = endpoint.refusal(CheckpointError)
    weights, vocabulary = "model.safetensors or pytorch_model.bin", "vocab.txt or vocab.json with merges.txt"
    assert f"{REPO} at {REVISION}: expected config.json, {weights}, and {vocabulary}; it has " in text
    assert all(name in text for name in (*files, "README.md", "tf_model.h5"))


def test_a_repository_without_files(endpoint):
    endpoint.publish({})
    assert "it has no files" in endpoint.refusal(CheckpointError)
    endpoint.publish({}, siblings=None)
    assert "it has no files" in endpoint.refusal(CheckpointError)


def test_half_a_vocabulary_is_none(endpoint):
    endpoint.publish({name: content for name, content in tiny_gpt("gpt2").items() if name != "merges.txt"})
    assert "vocab.json with merges.txt; it has" in endpoint.refusal(CheckpointError)


@pytest.mark.parametrize("kind", ["t5", "roberta", "llama"])
def test_a_family_that_is_not_ours(endpoint, kind):
    endpoint.publish(bert_files(config__json=config_with(model_type=kind)))
    assert f"its config.json says {kind}; families are bert, gpt, gpt2" in endpoint.refusal(CheckpointError)


def test_a_config_that_does_not_say_its_family(endpoint):
    """As the first BERTs were published. It is no GPT for that."""
    config = json.loads(tiny_bert()["config.json"])
    del config["model_type"]
    endpoint.publish(bert_files(config__json=json.dumps(config).encode()))
    text = endpoint.refusal((CheckpointError, ConfigError))
    assert "model_type" in text
    assert "not implemented for openai-gpt" not in text


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (b"not JSON", ConfigError),
        (b"[]", ConfigError),
        (b"[" * 100_000, ConfigError),
        (config_with(position_embedding_type="relative_key"), ConfigError),
        (config_with(hidden_size="12"), ConfigError),
        (config_with(intermediate_size=24), CheckpointError),
        (config_with(num_hidden_layers=3), CheckpointError),
        (config_with(max_position_embeddings=10), HubModelsError),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, bytes) else None,
)
def test_a_config_that_does_not_fit(endpoint, config, error):
    endpoint.publish(bert_files(config__json=config))
    assert endpoint.refusal(error)


@pytest.mark.parametrize(
    "files",
    [
        {"model__safetensors": b"nothing of the kind"},
        {"model__safetensors": None, "pytorch_model__bin": b"nothing of the kind"},
        {"vocab__txt": b"one\ntwo\n"},
        {"vocab__txt": b"\xff\xfe"},
        {"vocab__txt": "\n".join([*WORDS[:5], *(f"word{i}" for i in range(99)), "the", "ship"]).encode()},
        {"tokenizer_config__json": b"not JSON"},
        {"tokenizer_config__json": b'{"do_lower_case": "yes"}'},
        {"tokenizer_config__json": b'{"do_lower_case": null}'},
        {"tokenizer_config__json": b'{"strip_accents": "yes"}'},
    ],
    ids=lambda files: repr(files)[:60],
)
def test_files_that_do_not_fit(endpoint, files):
    endpoint.publish(bert_files(**files))
    assert endpoint.refusal(HubModelsError)


@pytest.mark.parametrize(
    ("name", "place"),
    [("embeddings.word_embeddings.weight", slice(None)), ("encoder.layer.1.output.LayerNorm.bias", slice(2, 3))],
    ids=["all", "one of many numbers"],
)
def test_a_model_that_gives_nan(endpoint, name, place):
    """Its check could never be replayed, and nan is no JSON."""
    from safetensors.torch import load, save

    tensors = load(tiny_bert()["model.safetensors"])
    tensors[name][place] = float("nan")
    endpoint.publish(bert_files(model__safetensors=save(tensors, {"format": "pt"})))
    assert "nan" in endpoint.refusal(CheckpointError)


def test_an_endpoint_that_says_another_digest(endpoint):
    """Either it serves other bytes than were uploaded, or someone stands between."""
    content = tiny_bert()["model.safetensors"]
    said, got = "0" * 64, hashlib.sha256(content).hexdigest()
    endpoint.publish(tiny_bert())
    told = json.loads(endpoint.hub.files[f"api/models/{REPO}/revision/main?blobs=true"])
    told["siblings"][0]["lfs"]["sha256"] = said
    endpoint.publish(tiny_bert(), siblings=told["siblings"])
    text = endpoint.refusal(StoreError)
    assert text == f"{REPO} model.safetensors: expected SHA-256 {said}, as the endpoint says, got {got}"


def test_an_endpoint_that_says_another_digest_of_a_small_file(endpoint):
    """Of what is not in LFS it says the git blob's SHA-1."""
    endpoint.publish(tiny_bert())
    endpoint.hub.put(f"{REPO}/resolve/{REVISION}/vocab.txt", tiny_bert()["vocab.txt"].replace(b"a\nb", b"b\na"))
    assert "vocab.txt" in endpoint.refusal(StoreError)


def test_an_endpoint_that_serves_less_than_it_says(endpoint):
    endpoint.publish(tiny_bert())
    endpoint.hub.answer = lambda exchange, data: serve(exchange, data[:-1] if data.startswith(b"[PAD]") else data)
    assert "vocab.txt" in endpoint.refusal(StoreError)


@pytest.mark.parametrize("answer", [fail(401), fail(403), fail(404), fail(500)], ids=["401", "403", "404", "500"])
def test_an_endpoint_that_refuses(endpoint, answer):
    endpoint.publish(tiny_bert())
    endpoint.hub.answer = answer
    assert f"{REPO} at main: " in endpoint.refusal(StoreError)


def test_an_endpoint_that_breaks_off(endpoint):
    """The answer about the repository came, a file does not."""
    endpoint.publish(tiny_bert())
    del endpoint.hub.files[f"{REPO}/resolve/{REVISION}/vocab.txt"]
    assert f"{REPO} at main: " in endpoint.refusal(StoreError)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"null", b"{}", b'{"id": 1, "siblings": [{}]}'])
def test_an_endpoint_that_talks_nonsense(endpoint, content):
    endpoint.publish(tiny_bert())
    for blobs in ("true", "True"):
        endpoint.hub.put(f"api/models/{REPO}/revision/main?blobs={blobs}", content)
    assert REPO in endpoint.refusal((StoreError, CheckpointError))


def test_an_endpoint_that_is_down(endpoint):
    endpoint.hub.stop()
    assert f"{REPO} at main: " in endpoint.refusal(StoreError)


def test_no_endpoint_is_asked_offline(endpoint, monkeypatch):
    from huggingface_hub import constants

    endpoint.publish(tiny_bert())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in endpoint.refusal(StoreError)
    assert endpoint.hub.requests == []


def test_an_endpoint_without_encryption_is_for_this_machine_only(endpoint, monkeypatch):
    """Whoever stands between would choose what this version pins for ever."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://example.org")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("it was asked"))
    assert "https" in endpoint.refusal((StoreError, InputError))


NO_MANIFESTS = [None, b"", b"not JSON", b"\xff", b"[]", b"{}", b'{"schema": 2, "weights": {}}', b"[" * 100_000]


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=lambda content: repr(content)[:30])
def test_a_manifest_that_is_none(endpoint, content):
    """Nothing is downloaded for it."""
    endpoint.publish(tiny_bert())
    endpoint.manifest.unlink()
    if content is not None:
        endpoint.manifest.write_bytes(content)
    with pytest.raises(CatalogError) as caught:
        endpoint.pin()
    assert str(endpoint.manifest) in str(caught.value)
    assert endpoint.hub.requests == []
    assert (endpoint.manifest.read_bytes() if endpoint.manifest.exists() else None) == content


def test_a_manifest_that_cannot_be_written(endpoint, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    endpoint.publish(tiny_bert())
    monkeypatch.setattr(pinning.os, "replace", denied)
    assert str(endpoint.manifest) in endpoint.refusal(HubModelsError)


# --- The command


def test_the_command_prints_the_entry(endpoint, capsys):
    endpoint.publish(tiny_bert(), revision="v2")
    arguments = ["--revision", "v2", "--licence", "MIT", "--citation", "c", "--manifest", str(endpoint.manifest)]
    assert main(["pin", REPO, "tiny", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"tiny": json.loads(endpoint.manifest.read_text())["weights"]["tiny"]}
    assert (told["tiny"]["licence"], told["tiny"]["citation"]) == ("MIT", "c")


def test_the_command_tells_what_is_wrong(endpoint, capsys):
    before = endpoint.manifest.read_bytes()
    assert main(["pin", REPO, "bert-nano", "--manifest", str(endpoint.manifest)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"hubmodels: error: {endpoint.manifest}: bert-nano is there already")
    assert endpoint.manifest.read_bytes() == before


def test_as_a_process_at_another_endpoint(endpoint, tmp_path):
    """The endpoint is named as for every program that speaks with a hub."""
    endpoint.publish(tiny_bert())
    command = [sys.executable, "-m", "hubmodels", "pin", REPO, "tiny", "--manifest", str(endpoint.manifest)]
    environment = clean_environment(tmp_path / "home", HF_ENDPOINT=endpoint.hub.url)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tiny"]["files"][0]["revision"] == REVISION
    assert follows_the_schema(endpoint.manifest)
