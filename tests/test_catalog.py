"""The manifest: the real one against its schema, the records of pins and the models; bad ones refused."""

import copy
import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SHARED

import hubmodels
from hubmodels import store
from hubmodels.errors import CatalogError
from hubmodels.families import bert, gpt, gpt2

catalog = importlib.import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
jsonschema = pytest.importorskip("jsonschema")
MANIFEST = REPOSITORY / "weights_manifest.json"
CONTENT = json.loads(MANIFEST.read_text(encoding="utf-8"))
NAMES = list(CONTENT["weights"])
SCHEMA = json.loads((REPOSITORY / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
REMOTE = next(name for name in NAMES if CONTENT["weights"][name]["files"][0]["source"] != ".")
BASES = {"bert": bert.BertModel, "gpt": gpt.GptModel, "gpt2": gpt2.Gpt2Model}
PUBLISHED = {  # counted by the publishers, or by transformers' class of the name
    "openai-gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "distilgpt2": 81_912_576,
    "bert-base-uncased": 109_482_240,
}


# --- The real one


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_manifest_follows_its_schema():
    assert [f"{list(e.absolute_path)}: {e.message}" for e in VALIDATOR.iter_errors(CONTENT)] == []


def test_no_name_stands_twice():
    """json.loads keeps the last of two and says nothing."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), keys
        return dict(pairs)

    json.loads(MANIFEST.read_text(encoding="utf-8"), object_pairs_hook=unique)


def test_the_catalog_reads_all_of_it():
    records = catalog.manifest()
    assert list(records) == NAMES
    for name, record in records.items():
        assert record.name == name
        assert set(record.weights) | set(record.vocabulary) == set(record.files)
        assert not set(record.weights) & set(record.vocabulary)
        assert {file.revision for file in record.weights} == {record.revision}
        named = [record.tokenizer[key] for key in ("file", "merges") if key in record.tokenizer]
        assert [file.filename for file in record.vocabulary] == named
        assert len(named) == (1 if record.family == "bert" else 2)


def test_openais_own_shards_are_ten_files_in_order_and_their_shapes():
    """Read in this order they are one list of numbers."""
    record = catalog.lookup("openai-gpt")
    shards = [f"model/params_{number}.npy" for number in range(10)]
    assert [file.filename for file in record.weights] == [*shards, "model/params_shapes.json"]
    assert [file.filename for file in record.vocabulary] == ["model/encoder_bpe_40000.json", "model/vocab_40000.bpe"]
    assert {file.source for file in record.files} == {
        "https://raw.githubusercontent.com/openai/finetune-transformer-lm"
    }
    assert all(file.is_url and not file.is_embedded for file in record.files)
    assert {(file.size, file.sha256) for file in record.weights[:10]} == {(None, None)}
    assert all(file.digest == f"git blob SHA-1 {file.git_sha1}" for file in record.weights[:10])
    assert record.weights[10].digest == f"SHA-256 {record.weights[10].sha256}"


def test_megabytes_of_an_unpublished_size_are_four_bytes_a_parameter():
    record = catalog.lookup("openai-gpt")
    assert record.megabytes == record.parameters * 4 / 1e6
    known = catalog.lookup("gpt2")
    assert known.megabytes == known.weights[0].size / 1e6


GOOGLES = {"bert-large-cased": 24, "bert-base-multilingual-uncased": 12}  # and the number of layers


@pytest.mark.parametrize("name", GOOGLES)
def test_googles_own_archives_are_members_side_by_side(name):
    """The data file has to be where the index is, and the config is the one whose digest is on record."""
    record = catalog.lookup(name)
    directory = Path(record.files[0].source).stem
    names = ["bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"]
    assert [file.filename for file in record.weights] == [f"{directory}/{each}" for each in names]
    assert record.tokenizer["file"] == f"{directory}/vocab.txt"
    assert all(file.is_member and file.revision is None for file in record.files)
    assert (record.dialect, record.config["num_hidden_layers"]) == ("tensorflow", GOOGLES[name])
    assert f"bert_config.json there, {hashlib.sha256(googles_config(record).encode()).hexdigest()[:8]}" in record.notes
    if (SHARED / "weights" / "pins.json").is_file():
        pins = json.loads((SHARED / "weights" / "pins.json").read_text(encoding="utf-8"))
        (pin,) = (p for p in pins if p.get("filename") == "bert_config.json" and p.get("url") == record.files[0].source)
        assert hashlib.sha256(googles_config(record).encode()).hexdigest() == pin["sha256"]


def googles_config(record) -> str:
    """bert_config.json as Google wrote it for those two: sorted, with a blank after each comma."""
    pooler = {"pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3}
    pooler |= {"directionality": "bidi", "pooler_size_per_head": 128, "pooler_type": "first_token_transform"}
    ours = {key: value for key, value in record.config.items() if key not in ("layer_norm_eps", "pad_token_id")}
    return json.dumps({**ours, **pooler}, indent=2, sort_keys=True, separators=(", ", ": ")) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_pin_has_a_record_or_its_bytes(name):
    record = catalog.manifest()[name]
    for file in record.files:
        if file.is_embedded:
            store.verify(catalog.embedded_path(file), file)
            continue
        if not (SHARED / "weights" / "pins.json").is_file():
            pytest.skip("no records of pins beside this checkout")
        pins = json.loads((SHARED / "weights" / "pins.json").read_text(encoding="utf-8"))
        (pin,) = (pin for pin in pins if is_pin_of(pin, file))
        assert "MISSING" not in pin["confidence"]
        if file.sha256 is None:
            assert pin["confidence"].startswith("first-party content hash (git blob SHA-1)")
            assert "their git blob SHA-1 at this commit pins them" in record.notes
            continue
        reason = "computed from the first-party file"
        weaker = pin["confidence"] in record.notes or (pin["confidence"] == reason and reason + "s" in record.notes)
        assert pin["confidence"].startswith("solid") or weaker


def is_pin_of(pin: dict, file) -> bool:
    """Whether a record of pins is about this file, and has its digest and size."""
    if file.is_member:  # of Google's bucket; the record names it without its directory
        expected = {"url": file.source, "filename": Path(file.filename).name, "sha256": file.sha256}
        return all(pin.get(key) == value for key, value in expected.items()) and "size" not in pin
    prefix = "https://raw.githubusercontent.com/"
    repository = f"github:{file.source.removeprefix(prefix)}" if file.is_url else file.source
    expected = {"repo_id": repository, "revision": file.revision, "filename": file.filename, "size": file.size}
    digest = {"sha256": file.sha256} if file.sha256 else {"sha256": None, "git_blob_sha1": file.git_sha1}
    same_url = not file.is_url or pin.get("url") == store.url_of(file)
    return same_url and all(pin.get(key) == value for key, value in (expected | digest).items())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_built_model(name):
    record = catalog.manifest()[name]
    cls = BASES[record.family]
    published = cls.family.config.from_published(record.config, name).to_published()
    sizes = {"bert": {"vocab_size", "hidden_size", "num_hidden_layers"}}
    assert sizes.get(record.family, {"vocab_size", "n_embd", "n_layer"}) <= record.config.keys() <= published.keys()
    assert {key: published[key] for key in record.config} == record.config
    with torch.device("meta"):
        model = cls(cls.family.config.from_published(record.config, name))
    assert record.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert record.parameters == PUBLISHED.get(name, record.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_fits_its_model(name):
    record = catalog.manifest()[name]
    check = record.check
    config = BASES[record.family].family.config.from_published(record.config, name)
    if "none" in check:
        return
    ids = torch.tensor(check["input_ids"])  # raises for ragged rows
    assert ids.max() < config.vocab_size
    assert ids.shape[1] <= config.max_position_embeddings
    for key, most in (("attention_mask", 2), ("token_type_ids", getattr(config, "type_vocab_size", 0))):
        if key in check:
            assert torch.tensor(check[key]).shape == ids.shape
            assert torch.tensor(check[key]).max() < most
    size = config.hidden_size
    shape = {"last_hidden_state": (*ids.shape, size)}
    if record.family == "bert":
        shape["pooler_output"] = (ids.shape[0], size)
    shape = shape[check["output"]]
    assert len(check["slice"]) == len(shape)
    assert all(0 <= begin < end <= most for (begin, end), most in zip(check["slice"], shape, strict=True))
    expected = torch.tensor(check["expected"])
    assert expected.shape == tuple(end - begin for begin, end in check["slice"])
    assert expected.isfinite().all()
    assert 0 < check["atol"] <= 0.01


def test_the_catalog_entry_point_says_the_same():
    rows = hubmodels.catalog()
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        entry = CONTENT["weights"][row["name"]]
        weights = entry["files"][0]
        assert row["megabytes"] == round((weights["size"] or entry["parameters"] * 4) / 1e6, 1)
        assert row["revision"] == weights["revision"]
        assert {key: entry[key] for key in ("family", "parameters", "licence")}.items() <= row.items()


def test_manifest_md_names_every_field():
    text = (REPOSITORY / "docs" / "manifest.md").read_text(encoding="utf-8")
    entry = SCHEMA["$defs"]
    fields = {*entry["entry"]["properties"], *entry["file"]["properties"], *entry["check"]["properties"]}
    assert [field for field in sorted(fields) if f"`{field}`" not in text] == []


def test_the_example_in_manifest_md_is_valid():
    text = (REPOSITORY / "docs" / "manifest.md").read_text(encoding="utf-8")
    example = json.loads("{" + text.split("```json\n")[1].split("```")[0] + "}")
    VALIDATOR.validate({"schema": 1, "weights": example})
    real = CONTENT["weights"]["bert-tiny"]
    assert example["bert-tiny"]["files"] == real["files"]
    assert example["bert-tiny"]["check"] == real["check"]


# --- Looking up


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(CatalogError) as caught:
        catalog.lookup("bert-base-uncasd")
    text = str(caught.value)
    assert text.startswith("no weights are called 'bert-base-uncasd', and there is no such file or directory; ")
    assert "did you mean bert-base-uncased or " in text


def test_a_name_unlike_any_lists_all():
    with pytest.raises(CatalogError) as caught:
        catalog.lookup("zzz")
    assert all(name in str(caught.value) for name in NAMES)


def test_a_known_name():
    assert catalog.lookup(REMOTE).weights[0].sha256 == CONTENT["weights"][REMOTE]["files"][0]["sha256"]


# --- Bad ones


def changed(where: str, value: object) -> dict:
    """A manifest with one real entry in which one thing is changed; `where` is like files.0.sha256, ... removes it."""
    content = {"schema": 1, "weights": {REMOTE: copy.deepcopy(CONTENT["weights"][REMOTE])}}
    *path, last = where.split(".")
    spot = content["weights"][REMOTE]
    for step in path:
        spot = spot[int(step) if step.isdigit() else step]
    if value is ...:
        del spot[last]
    else:
        spot[last] = value
    return content


def refusal(content: object, tmp_path: Path) -> str:
    path = tmp_path / "weights_manifest.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(CatalogError) as caught:
        catalog.manifest(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_a_changed_copy_is_read_from_its_own_path(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(changed("notes", "hello")), encoding="utf-8")
    assert catalog.manifest(path)[REMOTE].notes == "hello"


PINS = [
    ("files.0.filename", "../../etc/model.bin"),
    ("files.0.filename", "a/../../model.bin"),
    ("files.0.filename", "/etc/model.bin"),
    ("files.0.filename", "//etc/model.bin"),
    ("files.0.filename", "a\\model.bin"),
    ("files.0.filename", "..\\..\\model.bin"),
    ("files.0.filename", "C:\\model.bin"),
    ("files.0.filename", ".."),
    ("files.0.filename", "."),
    ("files.0.filename", ""),
    ("files.0.filename", "model.bin/.."),
    ("files.0.sha256", "53aa51172d142c89"),
    ("files.0.sha256", "G" * 64),
    ("files.0.sha256", "A" * 64),
    ("files.0.sha256", ""),
    ("files.0.sha256", None),
    ("files.0.sha256", 7),
    ("files.0.revision", "main"),
    ("files.0.revision", "v1.0"),
    ("files.0.revision", "86b5e09"),
    ("files.0.revision", None),
]


@pytest.mark.parametrize(("where", "value"), PINS)
def test_a_file_that_is_not_pinned_is_refused(where, value, tmp_path):
    text = refusal(changed(where, value), tmp_path)
    assert f"the entry {REMOTE}: " in text
    assert repr(value) in text or str(value) in text
    assert "a relative path pinned by a SHA-256 of 64 hex digits and a revision of 40" in text


@pytest.mark.parametrize(("where", "value"), PINS)
def test_the_schema_refuses_it_too(where, value):
    assert not VALIDATOR.is_valid(changed(where, value))


FIELDS = ["family", "config", "tokenizer", "files", "dialect", "licence", "homepage", "citation", "parameters", "check"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_entry_without_one_of_its_fields_is_refused(field, tmp_path):
    text = refusal(changed(field, ...), tmp_path)
    assert f"the entry {REMOTE} is not valid: " in text
    assert field in text
    assert not VALIDATOR.is_valid(changed(field, ...))


@pytest.mark.parametrize("field", ["source", "revision", "filename", "size", "sha256"])
def test_a_file_without_one_of_its_fields_is_refused(field, tmp_path):
    text = refusal(changed(f"files.0.{field}", ...), tmp_path)
    assert REMOTE in text
    assert field in text
    assert not VALIDATOR.is_valid(changed(f"files.0.{field}", ...))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("licence", ""),
        ("licence", " "),
        ("check", {}),
        ("check", {"none": ""}),
        ("check", {"none": None}),
        ("check", {"input_ids": [[1]]}),
        ("files.0.size", 0),
        ("files.0.size", "9"),
        ("files.0.source", "http://example.org/x"),
        ("files.0.source", "file://localhost/etc"),
        ("files.0.source", "https://example.org/x/"),
        ("files.0.source", "https://example.org/x?y=z"),
        ("files.0.source", "../elsewhere"),
        ("files.0.size", None),
        ("files.0.git_sha1", "0" * 40),
        ("tokenizer", {"file": "vocab.json", "merges": "../merges.txt"}),
        ("files.0.source", "."),
        ("files", []),
        ("parameters", "many"),
        ("dialect", "klingon"),
        ("extra", 1),
    ],
)
def test_the_schema_refuses(where, value):
    assert not VALIDATOR.is_valid(changed(where, value))


def by_git(**changes: object) -> dict:
    """A manifest in which the first file is pinned by its git blob SHA-1, as OpenAI's shards are."""
    content = changed("files.0.size", None)
    file = content["weights"][REMOTE]["files"][0]
    del file["sha256"]
    file.update({"git_sha1": "0123456789abcdef" * 2 + "01234567", **changes})
    return content


def test_a_git_blob_sha1_stands_for_digest_and_size(tmp_path):
    VALIDATOR.validate(by_git())
    path = tmp_path / "m.json"
    path.write_text(json.dumps(by_git()), encoding="utf-8")
    file = catalog.manifest(path)[REMOTE].weights[0]
    assert (file.size, file.sha256, file.git_sha1) == (None, None, "0123456789abcdef0123456789abcdef01234567")
    assert file.digest == "git blob SHA-1 0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("value", ["", "0" * 39, "0" * 64, "A" * 40, None, 7])
def test_a_git_blob_sha1_that_is_none_is_refused(value, tmp_path):
    text = refusal(by_git(git_sha1=value), tmp_path)
    assert "only where no SHA-256 and size were published a git blob's SHA-1 of 40 digits stands for them" in text
    assert f"got git_sha1 {value!r}" in text
    assert not VALIDATOR.is_valid(by_git(git_sha1=value))


@pytest.mark.parametrize("git_sha1", [None, "0" * 40])
def test_a_sha256_without_a_size_is_refused(git_sha1, tmp_path):
    content = changed("files.0.size", None)
    if git_sha1:
        content["weights"][REMOTE]["files"][0]["git_sha1"] = git_sha1
    assert "a SHA-256 of 64 hex digits" in refusal(content, tmp_path)
    assert not VALIDATOR.is_valid(content)


@pytest.mark.parametrize(
    "source", ["https://example.org", "https://example.org/a/b", "https://raw.example.org/a-b_c/d.e"]
)
def test_an_https_address_is_a_source(source, tmp_path):
    content = changed("files.0.source", source)
    VALIDATOR.validate(content)
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    file = catalog.manifest(path)[REMOTE].weights[0]
    assert file.is_url
    assert store.url_of(file) == f"{source}/{file.revision}/{file.filename}"


@pytest.mark.parametrize(
    "source",
    [
        "http://example.org/x",
        "http://127.0.0.1.example.org/x",
        "http://127.0.0.1@example.org/x",
        "http://example.org#@127.0.0.1/x",
        "ftp://example.org/x",
        "ftp://127.0.0.1/x",
        "file:///etc",
        "file://localhost/etc",
        "https:///x",
        "https://[example/x",
        "https://example.org/x?y=z",
        "https://user:secret@example.org/x",
    ],
)
def test_an_address_that_is_not_https_is_refused(source, tmp_path):
    text = refusal(changed("files.0.source", source), tmp_path)
    assert f"the entry {REMOTE}: {source}: expected an https address" in text
    assert not VALIDATOR.is_valid(changed("files.0.source", source))


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/../../../x",
        "https://../x",
        "https://example.org/a/../b",
        "https://example.org/a/..",
        "https://example.org/./a",
        "https://example.org:../x",
        "https://example.org:..:..:..:../x",
        "https://example.org\\..\\x",
        "https://example.org/a\\..\\..\\b",
        "https://example.org/a\0b",
        "https://example.org/a/.\n./.\t./b",
        "https://.state/x",
    ],
)
@pytest.mark.parametrize("field", ["source", "mirrors"])
def test_an_address_that_leads_out_of_the_cache_is_refused(field, source, tmp_path):
    """Its parts, the port too, become directories of the cache."""
    content = changed(f"files.0.{field}", source if field == "source" else [source])
    assert f"the entry {REMOTE}: {source}: expected an https address" in refusal(content, tmp_path)
    assert not VALIDATOR.is_valid(content)


def file_of(content: dict, tmp_path: Path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    catalog.manifest.cache_clear()
    return catalog.manifest(path)[REMOTE].files[0]


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org:8443/gpt",
        "http://127.0.0.1:99/a",
        "http://127.0.0.1/a",
        "http://localhost/a",
        "http://[::1]/a",
    ],
)
def test_this_machine_and_a_port_are_for_a_manifest_of_ones_own(source, tmp_path):
    """A published one has neither."""
    file = file_of(changed("files.0.source", source), tmp_path)
    assert file.is_url
    assert store.url_of(file) == f"{source}/{file.revision}/{file.filename}"
    place = store.Place(file, tmp_path / "store").path
    assert place.resolve().is_relative_to(tmp_path / "store")
    assert not VALIDATOR.is_valid(changed("files.0.source", source))


# --- Members of archives, and mirrors


ARCHIVE = "https://storage.example.org/bert_models/2018_10_18/uncased_L-12.zip"


def member(**changes: object) -> dict:
    """A manifest in which the first file is a member of an archive. A change to ... takes the field away."""
    content = changed("files.0.source", ARCHIVE)
    file = content["weights"][REMOTE]["files"][0]
    file.update({"revision": None, "filename": "uncased_L-12/pytorch_model.bin", **changes})
    for field in [field for field, value in file.items() if value is ...]:
        del file[field]
    return content


@pytest.mark.parametrize("size", [440_449_768, None])
def test_a_member_of_an_archive_is_pinned_by_its_digest_alone(size, tmp_path):
    VALIDATOR.validate(member(size=size))
    file = file_of(member(size=size), tmp_path)
    assert (file.is_member, file.is_url, file.revision, file.size) == (True, True, None, size)
    assert store.url_of(file) == ARCHIVE
    assert str(store.relative_path(file)) == f"{ARCHIVE.removeprefix('https://')}/uncased_L-12/pytorch_model.bin"


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "0" * 40},
        {"revision": "main"},
        {"sha256": ...},
        {"sha256": None},
        {"sha256": "0" * 63},
        {"sha256": ..., "git_sha1": "0" * 40},
        {"sha256": ..., "git_sha1": "0" * 40, "size": None},
        {"filename": "../pytorch_model.bin"},
        {"filename": "/pytorch_model.bin"},
        {"filename": "uncased\\pytorch_model.bin"},
        {"filename": "a/../../pytorch_model.bin"},
        {"source": ARCHIVE.replace("https", "http")},
        {"source": f"{ARCHIVE}?alt=media"},
        {"source": f"{ARCHIVE}#pytorch_model.bin"},
        {"source": "owner/name.zip"},
        {"source": "archives/../name.zip"},
        {"source": "."},
    ],
    ids=str,
)
def test_a_member_that_is_not_pinned_is_refused(changes, tmp_path):
    """Git has no name for a part of a file; a repository that is called like an archive is none."""
    if changes == {"source": "."}:  # it is a file of this repository, then, and lacks nothing
        changes = {**changes, "size": None}
    assert f"the entry {REMOTE}" in refusal(member(**changes), tmp_path)
    assert not VALIDATOR.is_valid(member(**changes))


def test_a_file_has_mirrors_or_none(tmp_path):
    mirrors = ["https://example.org/a/model.safetensors", "https://mirror.example.org/%7Ewe/model+1.bin"]
    VALIDATOR.validate(changed("files.0.mirrors", mirrors))
    assert file_of(changed("files.0.mirrors", mirrors), tmp_path).mirrors == tuple(mirrors)
    assert file_of(changed("notes", "no mirrors"), tmp_path).mirrors == ()
    assert file_of(member(mirrors=mirrors), tmp_path).mirrors == tuple(mirrors)
    VALIDATOR.validate(member(mirrors=mirrors))


@pytest.mark.parametrize(
    "mirrors",
    [
        ["http://example.org/model.bin"],
        ["https://example.org/model.bin", "http://example.org/model.bin"],
        ["http://127.0.0.1.example.org/model.bin"],
        ["ftp://127.0.0.1/model.bin"],
        ["file:///etc/passwd"],
        ["https://example.org/model.bin?key=1"],
        ["https://example.org/../model.bin"],
        ["google-bert/bert-base-uncased"],
        ["/srv/mirror/model.bin"],
        ["//example.org/model.bin"],
        [""],
        [7],
        [None],
        [["https://example.org/model.bin"]],
        7,
        None,
        "https://example.org/model.bin",
    ],
    ids=str,
)
def test_a_mirror_that_is_not_an_https_address_is_refused(mirrors, tmp_path):
    assert f"the entry {REMOTE}" in refusal(changed("files.0.mirrors", mirrors), tmp_path)
    assert not VALIDATOR.is_valid(changed("files.0.mirrors", mirrors))


def test_the_schema_refuses_mirrors_of_this_repository():
    embedded = next(entry for entry in CONTENT["weights"].values() if entry["files"][0]["source"] == ".")
    content = {"schema": 1, "weights": {"x": copy.deepcopy(embedded)}}
    VALIDATOR.validate(content)
    content["weights"]["x"]["files"][0]["mirrors"] = ["https://example.org/a"]
    assert not VALIDATOR.is_valid(content)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "bert-base-uncased",
        "google-bert/bert/base",
        "google-bert/",
        "/bert-base-uncased",
        "../bert-base-uncased",
        "google-bert/..",
        ".google-bert/bert",
        "google-bert\\bert",
        "google-bert/bert\\..\\..",
        "google bert/bert",
        "/etc/passwd",
        "C:\\weights",
        "..",
        "./",
        "datasets/google-bert/bert",
        "https:/example.org/a",
        "git@github.com:a/b",
    ],
)
def test_a_source_that_is_neither_a_repository_nor_an_address_is_refused(source, tmp_path):
    text = refusal(changed("files.0.source", source), tmp_path)
    assert f"the entry {REMOTE}: {source}: expected " in text
    assert not VALIDATOR.is_valid(changed("files.0.source", source))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("tokenizer", "vocab.txt"),
        ("tokenizer", None),
        ("tokenizer.file", ["vocab.txt"]),
        ("files.0.filename", 7),
        ("files.0.source", None),
        ("files.0.source", 7),
        ("files.0.revision", 7),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(where, value, tmp_path):
    assert f"the entry {REMOTE}" in refusal(changed(where, value), tmp_path)
    assert not VALIDATOR.is_valid(changed(where, value))


def test_the_schema_refuses_a_check_and_a_reason_for_having_none():
    check = dict(next(e["check"] for e in CONTENT["weights"].values() if "none" not in e["check"]))
    assert VALIDATOR.is_valid(changed("check", check))
    assert not VALIDATOR.is_valid(changed("check", check | {"none": "because there is none, but there is"}))


def test_an_unknown_field_is_refused(tmp_path):
    text = refusal(changed("license", "MIT"), tmp_path)
    assert REMOTE in text
    assert "license" in text


def test_an_entry_without_weights_is_refused(tmp_path):
    vocabulary = CONTENT["weights"][REMOTE]["files"][1]
    text = refusal(changed("files", [vocabulary]), tmp_path)
    assert f"the entry {REMOTE} lacks a weights file or its tokenizer's file" in text


@pytest.mark.parametrize(
    "value",
    [
        {"file": "other.txt"},
        {},
        {"lower_case": True},
        {"file": "vocab.txt", "merges": "m.txt"},
        {"merges": "vocab.txt"},
    ],
)
def test_an_entry_without_its_vocabulary_is_refused(value, tmp_path):
    assert f"the entry {REMOTE}" in refusal(changed("tokenizer", value), tmp_path)


@pytest.mark.parametrize("schema", [2, "1", None])
def test_another_schema_is_refused(schema, tmp_path):
    assert f"expected schema 1, got {schema!r}" in refusal({"schema": schema, "weights": {}}, tmp_path)


def test_no_schema_is_refused(tmp_path):
    assert "expected schema 1, got None" in refusal({"weights": {}}, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"schema": 1,}'])
def test_what_is_not_json_is_refused(text, tmp_path):
    refused = refusal(text, tmp_path)
    assert "cannot be read" in refused
    assert "install or check out this version again" in refused


@pytest.mark.parametrize("content", [[], "text", 3, {"schema": 1}, {"schema": 1, "weights": []}])
def test_json_that_is_no_manifest_is_refused(content, tmp_path):
    refusal(json.dumps(content), tmp_path)


@pytest.mark.parametrize("entry", [None, 3, [], "text", {}, {"files": 3}, {"files": [3]}])
def test_an_entry_of_the_wrong_kind_is_refused(entry, tmp_path):
    assert "the entry x is not valid" in refusal({"schema": 1, "weights": {"x": entry}}, tmp_path)


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(CatalogError, match=r"nowhere\.json: cannot be read: .*No such file"):
        catalog.manifest(tmp_path / "nowhere.json")
