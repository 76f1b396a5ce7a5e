"""The manifest: the real one against its schema, the records of pins and the models; bad ones refused."""

import copy
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SHARED

import hubmodels
from hubmodels import store
from hubmodels.errors import CatalogError
from hubmodels.families import bert

catalog = importlib.import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
jsonschema = pytest.importorskip("jsonschema")
MANIFEST = REPOSITORY / "weights_manifest.json"
CONTENT = json.loads(MANIFEST.read_text(encoding="utf-8"))
NAMES = list(CONTENT["weights"])
SCHEMA = json.loads((REPOSITORY / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
REMOTE = next(name for name in NAMES if CONTENT["weights"][name]["files"][0]["source"] != ".")


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
        assert record.weights in record.files
        assert record.vocabulary.filename == record.tokenizer["file"]


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
        where = (file.source, file.revision, file.filename, file.size, file.sha256)
        keys = ("repo_id", "revision", "filename", "size", "sha256")
        (pin,) = (pin for pin in pins if tuple(pin.get(key) for key in keys) == where)
        assert "MISSING" not in pin["confidence"]
        assert pin["confidence"].startswith("solid") or pin["confidence"] in record.notes


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_built_model(name):
    record = catalog.manifest()[name]
    config = bert.BertConfig.from_published(record.config, name)
    assert (
        {"vocab_size", "hidden_size", "num_hidden_layers"} <= record.config.keys() <= dataclasses.asdict(config).keys()
    )
    with torch.device("meta"):
        model = bert.BertModel(config)
    assert record.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_check_fits_its_model(name):
    record = catalog.manifest()[name]
    check, config = record.check, record.config
    if "none" in check:
        return
    ids = torch.tensor(check["input_ids"])  # raises for ragged rows
    assert ids.max() < config["vocab_size"]
    assert ids.shape[1] <= config["max_position_embeddings"]
    for key, most in (("attention_mask", 2), ("token_type_ids", config["type_vocab_size"])):
        if key in check:
            assert torch.tensor(check[key]).shape == ids.shape
            assert torch.tensor(check[key]).max() < most
    size = config["hidden_size"]
    shape = {"last_hidden_state": (*ids.shape, size), "pooler_output": (ids.shape[0], size)}[check["output"]]
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
        weights = next(f for f in entry["files"] if f["filename"].endswith((".safetensors", ".bin")))
        assert row["megabytes"] == round(weights["size"] / 1e6, 1)
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
    assert catalog.lookup(REMOTE).weights.sha256 == CONTENT["weights"][REMOTE]["files"][0]["sha256"]


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
        ("files.0.source", "https://example.org/x"),
        ("files.0.source", "../elsewhere"),
        ("files.0.source", "."),
        ("files", []),
        ("parameters", "many"),
        ("dialect", "klingon"),
        ("extra", 1),
    ],
)
def test_the_schema_refuses(where, value):
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


@pytest.mark.parametrize("value", [{"file": "other.txt"}, {}, {"lower_case": True}])
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
