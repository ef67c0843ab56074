"""The record as dataclasses: what is read is written again, and what is wrong is refused."""

import json
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from rich.console import Console

from sp3llm.errors import UserError
from sp3llm.models.families import family_of
from sp3llm.models.shapes import resized_config
from sp3llm.models.source import bundled_model
from sp3llm.planning.limits import Plan
from sp3llm.reporting import compression, quantization, recovery
from sp3llm.reporting.card import model_card, write_card
from sp3llm.reporting.page import PAGE, write_page
from sp3llm.reporting.record import (
    SCHEMA_VERSION,
    Excess,
    Record,
    RecoveryEntry,
    TextSet,
    TunedRecord,
    add_to_record,
    read_any_record,
    read_record,
    without_measurements,
    write_record,
)
from sp3llm.reporting.tables import part_rows, rows
from sp3llm.reporting.typed_json import MismatchError, from_json, to_json
from sp3llm.runtime import files
from sp3llm.runtime.folders import RECORD

DATA = Path(__file__).parent / "data"
# Written by sp3llm before records had a version: compressed; that and recovered; and quantized.
VERSION_1 = ["record_v1", "record_v1_recovered", "record_v1_quantized"]


def raw(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def folder_with(content: object, folder: Path) -> Path:
    """A folder whose record is this JSON, with the config of the compressed model it is about."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / RECORD).write_text(text)
    return folder


def with_config(folder: Path) -> Path:
    dense = json.loads((bundled_model() / "config.json").read_text())
    shape = read_record(folder).plan.shape
    config = resized_config(family_of(dense), dense, shape)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recovery_entry(**changes) -> RecoveryEntry:
    text = TextSet(("stdlib",), 4, 32, True, 3, 0, "0" * 64)
    values = {
        "command": "sp3llm recover small --steps 7", "settings": {"teacher": "the-teacher"},
        "trained_parameters": 1234, "steps": 7, "best_step": 7, "stopped_early": False,
        "held_out_losses": ((0, 0.2), (7, 0.1)), "training_losses": ((7, 0.1),),
        "training": text, "stopping": text, "evaluation": text,
        "dense_perplexity": 20.111, "perplexity_before": 24.222, "perplexity": 21.333,
        "excess_log_perplexity_before": Excess(0.1818, 0.001),
        "excess_log_perplexity": Excess(0.0606, 0.001),
        "processes": 1, "training_seconds": 1.5, "seconds": 2.5, "peak_memory_bytes": 10**8,
        "device_memory_bytes": 0, "versions": {"sp3llm": "0.1.0"}, "machine": {"device": "cpu"},
    }  # fmt: skip
    return RecoveryEntry(**{**values, **changes})


def printed(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("name", VERSION_1)
def test_a_record_of_version_1_makes_card_page_and_tables(name, tmp_path):
    content = raw(name)
    assert "schema_version" not in content
    folder = with_config(folder_with(content, tmp_path))
    record = read_record(folder)
    write_card(folder, record, None)
    card = (folder / "README.md").read_text()
    page = write_page(folder, record, "none were made").read_text()
    assert (folder / PAGE).is_file()
    shown = [f"{record.perplexity:.3f}", f"{record.plan.parameters:,}"]
    for text in (card, page, printed(compression.closing_table(record))):
        assert all(figure in text for figure in shown)
    assert record.command in card
    assert record.command in page
    assert str(folder) in compression.next_steps(folder, record, has_page=True)
    assert sum(part.small for part in part_rows(record)) == record.plan.parameters
    assert ("hidden_size", "256", str(content["plan"]["shape"]["hidden_size"])) in rows(record)


def test_a_recovery_of_version_1_is_shown(tmp_path):
    record = read_record(folder_with(raw("record_v1_recovered"), tmp_path))
    (entry,) = record.recoveries
    table = printed(recovery.closing_table(record.model, entry))
    for text in (model_card(record, {}), table):
        assert f"{entry.perplexity:.3f}" in text
        assert str(entry.excess_log_perplexity) in text
        assert "5 steps, stopped early, best after 0, 5,924,576 parameters trained" in text
    assert model_card(record, {}).count("## Recovered") == 1
    assert "No step was better" in recovery.next_steps(tmp_path, record.architecture, (), entry)


def test_a_quantization_of_version_1_is_shown(tmp_path):
    record = read_record(folder_with(raw("record_v1_quantized"), tmp_path))
    entry = record.quantization
    table = printed(quantization.closing_table(record.model, record.evaluation, entry))
    for text in (model_card(record, {}), table):
        assert f"{entry.models.small_quantized.perplexity:.3f}" in text
        assert str(entry.cost.small) in text
    assert "dense int8" in table


@pytest.mark.parametrize("name", VERSION_1)
def test_what_is_read_is_written_again_with_keys_nobody_knows(name, tmp_path):
    content = raw(name)
    content["foreign"] = {"a": [1, {"b": None}]}
    content["plan"]["shape"]["layers"] = 3
    content["evaluation"]["language"] = "en"
    content["fits"][1]["rank"] = 7
    for entry in content.get("recoveries", []):
        entry["mood"] = "good"
        entry["training"]["language"] = "en"
    if "quantization" in content:
        content["quantization"]["models"]["small"]["tokens"] = 12
    record = read_record(folder_with(content, tmp_path))
    write_record(tmp_path, record)
    written = json.loads((tmp_path / RECORD).read_text())
    assert written == {"schema_version": SCHEMA_VERSION, **content}
    assert read_record(tmp_path) == record


def test_later_entries_are_left_out_until_there_are_any(tmp_path):
    record = read_record(folder_with(raw("record_v1_recovered"), tmp_path))
    record = replace(record, speed=({"batch": 1},), mask=None)
    add_to_record(tmp_path, speed=record.speed)
    assert json.loads((tmp_path / RECORD).read_text())["speed"] == [{"batch": 1}]
    write_record(tmp_path, without_measurements(read_record(tmp_path)))
    written = json.loads((tmp_path / RECORD).read_text())
    assert not {"speed", "samples", "scores", "mask", "quantization"} & set(written)
    assert len(written["recoveries"]) == 1


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_record(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_newer_schema_is_refused(tmp_path):
    content = {"schema_version": SCHEMA_VERSION + 1, **raw("record_v1")}
    message = refused(folder_with(content, tmp_path))
    assert f"schema version {SCHEMA_VERSION} at most" in message
    assert f"found {SCHEMA_VERSION + 1}" in message
    assert "newer sp3llm" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": "2"}, "a whole number as 'schema_version'"),
        ({"schema_version": 0}, "a whole number as 'schema_version'"),
        ({"perplexity": "low"}, "a number as 'perplexity'"),
        ({"seconds": True}, "a number as 'seconds'"),
        ({"plan": []}, "an object as 'plan'"),
        ({"plan": {"keep_asked": 0.5}}, "'plan.of'"),
        ({"trials": {}}, "a list as 'trials'"),
        ({"fits": [{"name": 3}]}, "text as 'fits[0].name'"),
        ({"eigenvalues": [1.0, None]}, "a number as 'eigenvalues[1]'"),
        ({"settings": {}}, "'settings.model'"),
        ({"parameters": {"dense": {"head": 0.5}, "small": {}}}, "an integer as 'parameters.dense"),
        ({"scores": {"rows": [{"task": "x"}]}}, "'scores.rows[0].metric'"),
    ],
)
@pytest.mark.parametrize("version", [{}, {"schema_version": SCHEMA_VERSION}])
def test_what_is_damaged_is_refused(change, expected, version, tmp_path):
    message = refused(folder_with({**raw("record_v1"), **version, **change}, tmp_path))
    assert expected in message
    assert RECORD in message
    assert "compress the model again" in message or "undamaged" in message


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"model": "x"}', "\x00"])
def test_what_is_no_record_is_refused(text, tmp_path):
    refused(folder_with(text, tmp_path))
    if text[0] != "{":
        with pytest.raises(UserError):
            read_any_record(tmp_path)


def test_a_model_that_was_only_tuned_has_a_record_too(tmp_path):
    assert read_any_record(tmp_path) is None
    write_record(tmp_path, TunedRecord(recoveries=(recovery_entry(),), other={"mine": 1}))
    record = read_any_record(tmp_path)
    assert record == TunedRecord(recoveries=(recovery_entry(),), other={"mine": 1})
    assert "'model'" in refused(tmp_path)
    assert isinstance(read_any_record(folder_with(raw("record_v1"), tmp_path)), Record)


def test_a_write_that_fails_leaves_the_record_as_it_was(tmp_path, monkeypatch):
    record = read_record(folder_with(raw("record_v1"), tmp_path))
    before = (tmp_path / RECORD).read_bytes()

    def full(path, value):
        path.write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        with pytest.raises(UserError, match="No space left"):
            add_to_record(tmp_path, perplexity=1.0)
    assert (tmp_path / RECORD).read_bytes() == before
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        write_record(tmp_path, record)


def test_whole_numbers_stay_whole_and_errors_unknown_stay_so():
    entry = recovery_entry(excess_log_perplexity=Excess(0.0606, None))
    content = json.loads(json.dumps(to_json(entry)))
    assert content["held_out_losses"] == [[0, 0.2], [7, 0.1]]
    assert isinstance(content["held_out_losses"][0][0], int)
    assert from_json(RecoveryEntry, content) == entry
    assert str(entry.excess_log_perplexity) == "0.0606"
    assert str(Excess(0.0606, 0.001)) == "0.0606 ± 0.0010"


def test_mismatches_name_the_entry():
    with pytest.raises(MismatchError, match=r"expected an entry for 'sources', found none"):
        from_json(TextSet, {})
    with pytest.raises(MismatchError, match=r"expected text for 'sources\[0\]', found 1"):
        from_json(TextSet, {"sources": [1]})


def test_what_stands_in_lists_keeps_its_unknown_keys():
    """Without a field for them, a list would lose them in silence."""
    seen = set()

    def walk(kind, in_list):
        if (kind, in_list) in seen or not is_dataclass(kind):
            return
        seen.add((kind, in_list))
        names = {f.name for f in fields(kind)}
        assert not in_list or "other" in names, kind
        for hint in get_type_hints(kind).values():
            for option in get_args(hint) or (hint,):
                walk(option, get_origin(hint) is tuple)

    walk(Record, False)
    assert (Plan, False) in seen
