"""The report, the model card and the hub: what they say is what the record says, to anybody."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch
from huggingface_hub.repocard import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.models.families import FAMILIES, count_parameters, count_parts
from sp3llm.reporting import origins, samples
from sp3llm.reporting.card import write_card
from sp3llm.reporting.measurements import measured
from sp3llm.reporting.origins import held_out_tokens
from sp3llm.reporting.page import PAGE
from sp3llm.reporting.record import Sample, Samples, add_to_record, read_record
from sp3llm.reporting.samples import with_samples
from sp3llm.runtime.folders import RECORD
from tests.conftest import TINY, save_model, tiny_model
from tests.helpers import QUIET, compress_tiny
from tests.reporting.test_record import recovery_entry

VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny Llama with a card and a licence, compressed with a report."""
    folder = tmp_path_factory.mktemp("original")
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), folder / "dense")
    (folder / "dense" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-licence\nlanguage: [en]\nmodel_name: x\n---\n# x\n"
    )
    (folder / "dense" / "LICENSE").write_text("Do as you like.")
    compress_tiny("llama", folder, report=True, samples=8)
    return folder


@pytest.fixture
def made(original, tmp_path):
    """A copy of it to spoil, the dense model where the record says it is."""
    shutil.copytree(original / "small", tmp_path / "small")
    return tmp_path / "small"


class Page(HTMLParser):
    """Everything in a page that could be wrong: tags left open, ids, what is referred to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refers, self.words, self.tags = [], [], [], [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
                self.refers.append(value)
            self.refers += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def opened(folder):
    return Page((folder / PAGE).read_text())


def test_the_page_is_whole_and_asks_for_nothing(made):
    page = opened(made)
    assert not {"script", "img", "iframe", "object"} & page.tags
    assert len(page.ids) == len(set(page.ids))
    inside = {f"#{identifier}" for identifier in page.ids}
    assert all(what in inside or what == "data:," for what in page.refers)
    assert "@import" not in (made / PAGE).read_text()
    assert (made / PAGE).read_text().count("<svg") == 4


def test_the_page_says_what_the_record_says(made):
    record, text = read_record(made), opened(made).text
    for expected in (
        f"{record.plan.parameters:,}",
        f"{record.plan.dense_parameters:,}",
        f"{record.perplexity:.3f}",
        record.command,
        record.versions["transformers"],
        record.calibration.sha256[:16],
        *[sample.prompt.split()[0] for sample in record.samples.texts],
        *[f"{trial.trial_loss:.4f}" for trial in record.trials],
    ):
        assert expected in text


def test_parts_and_energy_add_up(made):
    record = read_record(made)
    plan, parameters = record.plan, record.parameters
    assert sum(parameters.dense.values()) == plan.dense_parameters
    assert sum(parameters.small.values()) == plan.parameters
    most = sum(record.eigenvalues[: plan.shape.hidden_size]) / sum(record.eigenvalues)
    assert 0 < record.energy_kept <= most + 1e-9


@pytest.mark.parametrize("variant", TINY)
def test_parts_of_every_family_make_the_whole(variant):
    config = tiny_model(variant).config.to_dict()
    family = FAMILIES[config["model_type"]]
    parts = count_parts(family, config)
    assert sum(parts.values()) == count_parameters(family, config)
    assert (parts["head"] == 0) == bool(config["tie_word_embeddings"])
    assert min(parts[name] for name in ("embeddings", "attention", "FFN", "norms")) > 0


def test_samples_are_what_plain_transformers_continues(original, made):
    recorded = read_record(made).samples
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokens = held_out_tokens(read_record(made), made)
    first = tokens[:1, : tokens.shape[1] // 2]
    for side, folder in (("dense", original / "dense"), ("small", made)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = model.generate(
            first, do_sample=False, max_new_tokens=recorded.new_tokens, pad_token_id=2
        )
        text = tokenizer.decode(ids[0, first.shape[1] :], skip_special_tokens=True)
        assert text == getattr(recorded.texts[0], side)


def test_text_in_samples_is_text_and_nothing_else(made):
    evil = {"prompt": "<script>alert(1)</script>", "text": "&amp;", "dense": "<b>", "small": "{{"}
    add_to_record(made, samples=Samples(4, (Sample(**evil),)))
    main(["report", str(made)])
    page = opened(made)
    assert "script" not in page.tags
    for text in evil.values():
        assert text in page.text


def test_scores_and_speed_appear_once_they_are_measured(made, tmp_path):
    assert "No tasks were scored" in opened(made).text
    score = {
        "task": "cloze", "metric": "acc,none", "samples": 400, "dense": 0.61, "small": 0.58,
        "difference": -0.03, "paired_standard_error": 0.0123,
    }  # fmt: skip
    lone = {
        "task": "text", "metric": "token_perplexity", "samples": 9, "dense": None, "small": 22.0,
        "difference": None, "paired_standard_error": None,
    }  # fmt: skip
    comparison = tmp_path / "comparison.json"
    comparison.write_text(json.dumps({"model": "runs/small", "rows": [score, lone]}))
    main(["report", str(made), "--add", str(comparison)])
    add_to_record(made, speed=({"model": "x", "tokens/s": 1234.5}, {"model": "y", "note": "a|b"}))
    main(["report", str(made)])
    text, readme = opened(made).text, (made / "README.md").read_text()
    for shown in ("cloze", "acc", "0.6100", "-0.0300", "0.0123", "22.0000", "1,234"):
        assert shown in text
        assert shown in readme
    assert "No tasks were scored" not in text
    assert "a&#124;b" in readme


def test_a_report_without_the_dense_model_keeps_the_samples_there_are(made, monkeypatch, capsys):
    before = (made / PAGE).read_text()
    (made / PAGE).unlink()
    monkeypatch.setattr(samples, "find_dense", lambda *_: pytest.fail("samples are there already"))
    monkeypatch.setattr(origins, "dense_folder", lambda *_: None)
    main(["report", str(made)])
    assert (made / PAGE).read_text() == before
    assert metadata_load(made / "README.md")["license_name"] == "tiny-licence"
    assert "report.html" in capsys.readouterr().out


def test_a_report_without_samples_says_why(made, capsys):
    record = json.loads((made / RECORD).read_text())
    del record["samples"]
    record["settings"]["model"] = "gone/away"
    record["base_model"] = "gone/away"
    (made / RECORD).write_text(json.dumps(record))
    main(["report", str(made)])
    out = " ".join(capsys.readouterr().out.split())
    assert "No samples: The dense model 'gone/away' is not at hand" in out
    assert "--dense" in opened(made).text


def test_too_little_memory_is_a_reason(original, made, monkeypatch):
    record = replace(read_record(made), samples=None)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
        _, why = with_samples(made, record, QUIET, "cpu")
    assert "does not fit into memory" in why
    record, why = with_samples(made, record, QUIET, "cpu")
    assert why is None
    assert record.samples == read_record(original / "small").samples


def test_text_that_changed_is_not_passed_off_as_held_out(made):
    record = read_record(made)
    record = replace(record, evaluation=replace(record.evaluation, sha256="0" * 64))
    with pytest.raises(UserError, match="not what it was"):
        held_out_tokens(record, made)


def test_a_recovery_shows_in_page_and_card(made):
    add_to_record(made, recoveries=(recovery_entry(),))
    main(["report", str(made)])
    for text in (opened(made).text, (made / "README.md").read_text()):
        for shown in ("20.111", "24.222", "21.333", "0.1818", "0.0606", "recover small --steps 7"):
            assert shown in text
    assert "21.33 dense 20.11" in opened(made).text  # what the weights are, at the top


def test_what_bench_found_becomes_a_table(made, tmp_path):
    """Medians of both models, and ratios beside what the shapes promise."""

    def side(scale):
        spread = {"median": 100.0 * scale, "low": 1.0, "high": 2.0}
        return {
            "prefill_tokens_per_second": spread, "decode_tokens_per_second": spread,
            "first_token_seconds": {**spread, "median": 0.5 / scale}, "peak_memory_bytes": None,
        }  # fmt: skip

    ratio = {"measured": {"median": 1.25}, "promised": 1.3, "realised": 0.9615}
    cell = {"batch_size": 4, "prompt_length": 96, "dense": side(1), "small": side(1.25),
            "prefill": ratio, "decode": ratio}  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"model": "small", "cells": [cell]}))
    main(["report", str(made), "--add", str(path)])
    text = opened(made).text
    assert "4 96 prefill, tokens/s 100 125 1.25 1.3 0.9615" in text
    assert "4 96 first token, ms 500 400 0.8" in text
    for wrong in ({"model": "another", "cells": []}, {"model": "small"}, []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError):
            measured(path, made)


def test_measurements_that_are_no_numbers_are_refused(made, tmp_path):
    row = {"task": "t", "metric": "acc,none", "samples": 1, "small": math.nan, "dense": 1.0}
    side = {"peak_memory_bytes": 0, "first_token_seconds": {"median": 0}}
    side |= {f"{name}_tokens_per_second": {"median": 1} for name in ("prefill", "decode")}
    ratio = {"measured": {"median": 1}, "promised": None, "realised": None}
    cell = {"batch_size": 1, "prompt_length": 1, "dense": side, "small": side}
    cell |= {"prefill": ratio, "decode": ratio}
    worded = {**cell, "decode": {**ratio, "measured": {"median": "fast"}}}
    path = tmp_path / "measured.json"
    for wrong in ({"rows": [row]}, {"cells": [cell]}, {"cells": [worded]}):
        path.write_text(json.dumps({"model": "small", **wrong}))
        with pytest.raises(UserError, match="found something else"):
            measured(path, made)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="found something else"):
        measured(path, made)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--add", "nowhere.json"], "Cannot read"),
        (["--dense", "eval/models/opt-4m"], "made from"),
        (["--dense", "nowhere/at/all"], "model folder"),
        (["--private"], "--push-to-hub"),
    ],
)
def test_what_is_named_must_be_right(made, words, expected, refused):
    assert expected in refused("report", made, *words)


def test_a_folder_that_is_not_ours_is_refused(tmp_path, refused):
    for text in (None, "not json", "[]", "{}"):
        if text is not None:
            (tmp_path / RECORD).write_text(text)
        refused("report", tmp_path)


@pytest.mark.parametrize(
    ("variant", "settings", "expected"),
    [
        ("gpt-neox", {}, "FFN"),  # blocks fitted together
        ("opt", {"tie": "keep", "word_embed_proj_dim": 40, "keep": 0.8, "head_dim": 8}, "tied"),
        ("mixtral", {"refit": False}, "No layer was refitted"),
    ],
)
def test_every_kind_of_model_has_a_page(variant, settings, expected, tmp_path):
    compress_tiny(variant, tmp_path, report=True, **settings)
    assert expected in opened(tmp_path / "small").text


def test_the_card_carries_licence_and_names_what_it_was_made_from(original, made):
    metadata = metadata_load(made / "README.md")
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "tiny-licence"
    assert metadata["language"] == ["en"]
    assert metadata["library_name"] == "transformers"
    assert "model_name" not in metadata
    assert "base_model" not in metadata  # a folder is no hub id
    assert (made / "LICENSE").read_text() == "Do as you like."
    record = read_record(made)
    sources = ("wikitext2", "owner/set:config", "stdlib", "my/own.jsonl")
    calibration = replace(record.calibration, sources=sources)
    record = replace(record, base_model="owner/name", calibration=calibration)
    write_card(made, record, original / "dense")
    metadata = metadata_load(made / "README.md")
    assert metadata["base_model"] == "owner/name"
    assert metadata["datasets"] == ["Salesforce/wikitext", "owner/set"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs."""

    private = True

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/small", "private": self.private, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append((self.path, body, self.headers.get("Authorization")))
        here = f"http://{self.headers['Host']}/me/small"
        if self.path.endswith("/repos/create"):
            self.answer({"url": here, "name": "me/small"})
        elif "/preupload/" in self.path:
            self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        else:
            self.answer({"commitUrl": f"{here}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A hub on the loopback interface that notes what it is sent."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {}))
    hub.calls = []
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


def pushed(folder, server, *words, token="hf_mine"):
    """`sp3llm report` in a process of its own, whose hub is the server."""
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder.parent / "hf-home"),
        **({"HF_TOKEN": token} if token else {}),
    }
    code = "import sys; from sp3llm.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, "report", str(folder), "--push-to-hub", "me/small", *words],
        capture_output=True,
        text=True,
        env=variables,
    )


def test_a_push_uploads_the_folder_and_says_where(made, server):
    (made / "leftover.partial").mkdir()
    (made / "leftover.partial" / "x").write_text("x")
    run = pushed(made, server)
    assert run.returncode == 0, run.stderr
    assert "/me/small" in run.stdout
    (created,) = [json.loads(body) for path, body, _ in server.calls if "create" in path]
    assert created["name"] == "small"
    assert created["organization"] == "me"
    (commit,) = [body for path, body, _ in server.calls if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] != "header"}
    assert sent == {path.name for path in made.iterdir() if path.is_file()}
    assert {"report.html", "README.md", "sp3llm.json", "model.safetensors"} <= sent
    assert {token for _, _, token in server.calls} == {"Bearer hf_mine"}


def test_what_is_to_be_private_is_not_pushed_into_public(made, server):
    server.RequestHandlerClass.private = False
    run = pushed(made, server, "--private")
    assert run.returncode == 2
    assert "exists and is public" in run.stderr
    assert not [path for path, *_ in server.calls if "/commit/" in path]


def test_a_push_without_a_login_says_how_to_log_in(made, server):
    before = (made / PAGE).stat().st_mtime_ns
    run = pushed(made, server, token=None)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "hf auth login" in run.stderr
    assert not server.calls
    assert (made / PAGE).stat().st_mtime_ns == before


def test_a_hub_that_is_not_there_is_one_sentence(made, server):
    server.server_close()
    run = pushed(made, server)
    assert run.returncode == 2
    assert run.stderr.startswith("sp3llm: Cannot push to 'me/small'")
    assert run.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_page_opens_in_chromium_without_complaint(made, tmp_path):
    from eval.checks.check_report import BROWSERS, check

    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no chromium here")
    assert check(made / PAGE, tmp_path / "shots") == []


@pytest.mark.parametrize("name", ["README.md", "report.html"])
def test_a_folder_where_a_page_is_to_be_is_told_of(name, made, refused):
    (made / name).unlink(missing_ok=True)
    (made / name).mkdir()
    said = refused("report", made)
    assert f"Cannot write to '{made}' ({name}: Is a directory)" in said
