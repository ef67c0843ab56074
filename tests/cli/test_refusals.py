"""Bad input: one sentence on stderr, exit code 2, no traceback, and nothing left behind."""

import fcntl
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sp3llm.cli import main
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import FAMILIES
from sp3llm.models.source import resolve_model
from sp3llm.runtime.folders import RECORD
from tests.helpers import byte_tokenizer, weights

POSITIONS = 64
EMBEDDINGS = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


# --------------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny Llama in one safetensors file, with a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(dense, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """Paths of calibration and evaluation text."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calib", "eval"):
        rows = [{"text": f"{name} sentence {i}, {i * i} and {i**3}."} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "calib.jsonl"), str(folder / "eval.jsonl")


@pytest.fixture
def out(tmp_path) -> Path:
    """Where results go."""
    return tmp_path / "results" / "small"


@pytest.fixture
def arguments(texts, out) -> Callable[..., list[str]]:
    """The command line for a model; later options win."""

    def build(model: Any, *options: Any) -> list[str]:
        sizes = ["--samples", 8, "--eval-samples", 2, "--seq-len", 32, "--device", "cpu"]
        sets = ["--calib", texts[0], "--eval-text", texts[1]]
        words = ["compress", model, "--keep", 0.7, *sizes, *sets, "--out", out, *options]
        return [str(word) for word in words]

    return build


@pytest.fixture
def run(arguments) -> Callable[..., None]:
    """Compress in this process."""
    return lambda model, *options: main(arguments(model, *options))


@pytest.fixture
def refused(run, out, capsys) -> Callable[..., str]:
    """Compress, expect a refusal that leaves nothing behind, and return its sentence."""

    def refuse(model: Any, *options: Any) -> str:
        before = content(out.parent)
        with pytest.raises(SystemExit) as caught:
            run(model, *options)
        printed, message = capsys.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in printed + message
        assert content(out.parent) == before
        return sentence(message)

    return refuse


def sentence(message: str) -> str:
    """Check that stderr holds one sentence, and return it."""
    assert message.startswith("sp3llm: ")
    assert message.endswith(".\n")
    assert len(message.splitlines()) == 1
    assert not re.search(r"[.!?] [A-Z]", message), "more than one sentence"
    return message


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors; names with `/` for `.`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name.replace("/", "."): value for name, value in changes.items()}
    kept = {name: value.clone() for name, value in tensors.items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def replace_tensor(folder: Path, name: str, value: Tensor | None) -> None:
    edit_tensors(folder, **{name.replace(".", "/"): value})


def shard(folder: Path, suffix: str = ".safetensors", **options: Any) -> list[Path]:
    """Lay the weights out in two shards with an index."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = sorted(tensors)
    weight_map, paths = {}, []
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        path = folder / f"{stem}-{number + 1:05d}-of-00002{suffix}"
        held = {name: tensors[name] for name in part}
        if suffix == ".safetensors":
            save_file(held, path, metadata={"format": "pt"})
        else:
            torch.save(held, path, **options)
        weight_map |= dict.fromkeys(part, path.name)
        paths.append(path)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return paths


def to_bin(folder: Path, **options: Any) -> Path:
    """Turn the weights into one legacy file."""
    path = folder / "pytorch_model.bin"
    torch.save(weights(folder), path, **options)
    (folder / "model.safetensors").unlink()
    return path


# --------------------------------------------------------------------------- it works otherwise


def test_undamaged_model_is_compressed_and_loads(dense, run, out):
    run(dense)
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size < 32
    assert json.loads((out / RECORD).read_text())["plan"]["keep_params"] <= 0.7
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert not (out / ".lock").exists()


# --------------------------------------------------------------------------- families and folders


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "deepseek_v3", "t5", "unheard-of", None])
def test_unsupported_family_is_refused_by_name_with_what_is_supported(model_type, model, refused):
    edit_json(model / "config.json", model_type=model_type, architectures=None)
    message = refused(model)
    assert f"'{model_type}'" in message
    for family in FAMILIES:
        assert family in message


def test_other_head_than_the_language_model_is_refused(model, refused):
    edit_json(model / "config.json", architectures=["LlamaForSequenceClassification"])
    message = refused(model)
    assert "LlamaForSequenceClassification" in message
    assert "LlamaForCausalLM" in message


def test_folder_without_config_is_refused(model, refused):
    (model / "config.json").unlink()
    message = refused(model)
    assert "config.json" in message
    assert str(model) in message


@pytest.mark.parametrize("text", ["{", "", "[]", '"llama"', "\x00\xff"])
def test_config_that_is_no_object_is_refused(text, model, refused):
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert str(model / "config.json") in refused(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "banana"},
        {"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}},
    ],
)
def test_config_that_the_stock_class_refuses_is_refused(changes, model, refused):
    edit_json(model / "config.json", **changes)
    assert "banana" in refused(model)


def test_folder_without_weights_is_refused(model, refused):
    (model / "model.safetensors").unlink()
    message = refused(model)
    assert "model.safetensors" in message
    assert str(model) in message


def test_folder_in_the_format_of_meta_is_refused_as_such(tmp_path, refused):
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.00.pth").write_bytes(b"weights")
    message = refused(folder)
    assert "Meta's own format" in message
    assert "-hf" in message


@pytest.mark.parametrize("name", ["./no/such/model", "/no/such/model", "model", "a/b/c", "~/model"])
def test_path_that_does_not_exist_is_refused(name, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"'{name}'" in refused(name)


def test_file_in_place_of_a_model_folder_is_refused(model, refused):
    path = model / "model.safetensors"
    assert f"the file '{path}'" in refused(path)


# --------------------------------------------------------------------------- damaged weights


def test_missing_shard_is_named(model, refused):
    _, second = shard(model)
    second.unlink()
    message = refused(model)
    assert second.name in message
    assert "missing" in message


@pytest.mark.parametrize("length", [0, 4, 100, -1, -1000])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_shard_is_named(length, suffix, model, refused):
    _, second = shard(model, suffix)
    second.write_bytes(second.read_bytes()[:length])
    message = refused(model)
    assert second.name in message
    assert "truncated or corrupt" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shard_with_a_corrupt_header_is_named(suffix, model, refused):
    first, _ = shard(model, suffix)
    whole = first.read_bytes()
    first.write_bytes(bytes(byte ^ 0x5A for byte in whole[:64]) + whole[64:])
    message = refused(model)
    assert first.name in message
    assert "truncated or corrupt" in message


@pytest.mark.parametrize("junk", [b"", b"this is no archive", b"\x80\x02."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_file_that_holds_no_weights_is_named(name, junk, model, refused):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(junk)
    message = refused(model)
    assert name in message
    assert "truncated or corrupt" in message


@pytest.mark.parametrize(
    "value", [[torch.zeros(2)], torch.zeros(2), {"model": {"weight": torch.zeros(2)}}, {3: "x"}, {}]
)
def test_bin_file_that_holds_something_else_than_tensors_is_refused(value, model, refused):
    (model / "model.safetensors").unlink()
    torch.save(value, model / "pytorch_model.bin")
    refused(model)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index_is_named(text, model, refused):
    shard(model)
    (model / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(model)


def test_stream_too_large_for_its_raw_moments_is_refused(model, refused):
    replace_tensor(model, EMBEDDINGS, weights(model)[EMBEDDINGS] * 1e25)
    raw = ("--moments", "raw", "--basis", "pca", "--allocate", "width")
    assert "second moments" in refused(model, *raw)


def test_raw_moments_choose_no_shape(model, refused):
    said = refused(model, "--moments", "raw", "--basis", "pca", "--allocate", "search")
    assert "Expected a single shape with --moments raw" in said
    assert "--allocate width" in said


def test_raw_moments_with_a_basis_of_the_normalised_stream_are_refused(model, refused):
    assert "--basis pca" in refused(model, "--moments", "raw")


def test_weights_that_do_not_fit_the_dtype_asked_for_are_refused(model, refused):
    replace_tensor(model, DOWN, weights(model)[DOWN] * 1e8)
    message = refused(model, "--dtype", "float16")
    assert DOWN in message
    assert "float16" in message


# --------------------------------------------------------------------------- quantized


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantized_checkpoint_is_refused_with_what_to_load_instead(method, model, refused):
    edit_json(model / "config.json", quantization_config={"quant_method": method})
    message = refused(model)  # the weights are floats: an adapter was merged, and the key stayed
    assert method in message
    assert "take quantization_config out" in message
    replace_tensor(model, DOWN, torch.ones(32, 48, dtype=torch.int8))
    message = refused(model)
    assert method in message
    assert "unquantized" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_integer_and_float8_weights_are_refused_as_quantized(dtype, suffix, model, refused):
    replace_tensor(model, DOWN, torch.ones(32, 48).to(dtype))
    if suffix == ".bin":
        to_bin(model)
    message = refused(model)
    assert DOWN in message
    assert "unquantized" in message


def test_packed_weights_are_refused_as_quantized_rather_than_misshapen(model, refused):
    replace_tensor(model, DOWN, torch.zeros(768, 1, dtype=torch.uint8))
    assert "unquantized" in refused(model)


@pytest.mark.parametrize("suffix", ["SCB", "weight.absmax", "qweight", "weight_scale_inv"])
def test_tensors_of_quantization_tools_are_recognised(suffix, model, refused):
    name = DOWN.replace("weight", suffix)
    replace_tensor(model, name, torch.ones(32))
    message = refused(model)
    assert name in message
    assert "unquantized" in message


# --------------------------------------------------------------------------- options


@pytest.mark.parametrize("keep", ["0", "1", "1.5", "-0.5", "75", "nan", "inf", "1e-400"])
def test_keep_outside_zero_and_one_is_refused(keep, dense, refused):
    message = refused(dense, "--keep", keep)
    assert "--keep" in message
    assert "0.75" in message


@pytest.mark.parametrize("keep", ["banana", "", "75%", "0,75", "1/2"])
def test_keep_that_is_no_number_is_refused(keep, dense, refused):
    message = refused(dense, "--keep", keep)
    assert "--keep" in message
    assert f"'{keep}'" in message


@pytest.mark.parametrize("keep", ["0.01", "1e-9"])
def test_keep_so_small_that_no_shape_fits_says_what_would(keep, dense, refused):
    message = refused(dense, "--keep", keep)
    assert "No shape" in message
    assert "--keep" in message


def test_smallest_keep_that_the_refusal_names_is_accepted(dense, refused, run, out):
    message = refused(dense, "--keep", "0.01")
    smallest = re.search(r"keeps (0\.\d+);", message).group(1)
    run(dense, "--keep", smallest)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("seq_len", [POSITIONS + 1, 10**6])
def test_seq_len_beyond_the_positions_is_refused(seq_len, dense, refused):
    message = refused(dense, "--seq-len", seq_len)
    assert "--seq-len" in message
    assert str(POSITIONS) in message
    assert str(seq_len) in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seq-len", "1"),
        ("--seq-len", "0"),
        ("--seq-len", "-8"),
        ("--seq-len", "many"),
        ("--samples", "0"),
        ("--samples", "1.5"),
        ("--eval-samples", "0"),
        ("--multiple-of", "0"),
        ("--multiple-of", "6"),
        ("--seed", "x"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),
        ("--out", "/"),
        ("--moments", "banana"),
        ("--dtype", "banana"),
        ("--dtype", "int8"),
        ("--device", "banana"),
        ("--device", "cuda:99"),
        ("--device", "meta"),
        ("--device", ""),
        ("--no-such-option", "1"),
    ],
)
def test_impossible_option_is_refused_by_name(option, value, dense, refused):
    assert option in refused(dense, option, value)


def test_word_too_many_is_refused(dense, refused):
    assert "banana" in refused(dense, "banana")


def test_command_line_refuses_in_a_sentence_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "sp3llm.compress", "--keep", "banana"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "banana" in sentence(done.stderr)
    assert not done.stdout
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- text and tokenizer


def test_missing_calibration_is_refused(dense, refused, tmp_path):
    message = refused(dense, "--calib", tmp_path / "gone.jsonl")
    assert "gone.jsonl" in message
    assert "does not exist" in message


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.jsonl.gz"])
def test_empty_calibration_is_refused(name, dense, refused, tmp_path):
    (tmp_path / name).write_bytes(b"")
    message = refused(dense, "--calib", tmp_path / name)
    assert name in message
    assert "0 windows" in message


def test_calibration_that_is_too_small_says_what_there_is(dense, refused):
    message = refused(dense, "--samples", 5000)
    assert re.search(r"holds \d+ windows of 32 tokens, 5000 were", message)


def test_evaluation_on_the_calibration_text_alone_is_refused(dense, refused, texts):
    # More samples than the text has would be refused before; so all of it is taken.
    message = refused(dense, "--eval-text", texts[0], "--seq-len", POSITIONS, "--samples", 32)
    assert "--eval-text" in message


def test_folder_without_tokenizer_is_refused(model, refused):
    for file in model.glob("tokenizer*"):
        file.unlink()
    message = refused(model)
    assert "tokenizer" in message
    assert str(model) in message


def test_tokenizer_that_is_a_pointer_of_git_lfs_is_told_as_such(model, refused):
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    message = refused(model)
    assert "tokenizer.json" in message
    assert "git lfs pull" in message


def test_auto_map_of_a_tokenizer_may_be_null(model, refused):
    edit_json(model / "tokenizer_config.json", auto_map=None)
    assert "tokenizer" in refused(model)


def test_tokenizer_of_another_model_is_refused(model, refused):
    edit_json(model / "config.json", vocab_size=100)
    for name in (EMBEDDINGS, "lm_head.weight"):
        replace_tensor(model, name, weights(model)[name][:100].clone())
    message = refused(model)
    assert "tokenizer" in message
    assert "100" in message


# --------------------------------------------------------------------------- output


def test_output_folder_that_is_not_ours_stays_as_it_is(dense, refused, out):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    message = refused(dense)
    assert str(out) in message
    assert (out / "thesis.txt").read_text() == "years of work"


def test_output_that_is_a_file_stays_as_it_is(dense, refused, out):
    out.parent.mkdir()
    out.write_text("years of work")
    assert str(out) in refused(dense)
    assert out.read_text() == "years of work"


def test_output_below_a_file_is_refused(dense, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    message = refused(dense, "--out", tmp_path / "file" / "small")
    assert "--out" in message


def test_dense_model_is_not_overwritten_by_its_compressed_self(model, refused):
    before = content(model)
    refused(model, "--out", model)
    assert content(model) == before


def test_empty_output_folder_is_taken(dense, run, out):
    out.mkdir(parents=True)
    run(dense)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("name", [".", "new/../small", "small/", "./small"])
def test_output_may_be_named_in_any_way(name, dense, run, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    run(dense, "--out", name)
    assert (folder / name / "config.json").is_file() or (folder / "small/config.json").is_file()
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("*.replaced"))


def test_names_with_brackets_are_shown_as_they_are(dense, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "tiny[red]")
    run("tiny[red]", "--out", "small[/bold]")
    printed = capsys.readouterr().out
    assert "tiny[red]" in printed
    assert "small[/bold]" in printed


def test_second_run_on_the_same_output_is_refused_and_the_first_left_alone(dense, refused, out):
    partial = out.with_name("small.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half written")
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused(dense)
    assert "Another sp3llm run" in message
    assert str(out) in message


def test_earlier_result_is_replaced(dense, run, out):
    run(dense, "--keep", "0.8")
    first = json.loads((out / RECORD).read_text())
    (out / "left-over.txt").write_text("x")
    run(dense, "--keep", "0.4")
    second = json.loads((out / RECORD).read_text())
    assert second["plan"]["parameters"] < first["plan"]["parameters"]
    assert not (out / "left-over.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_earlier_result_survives_a_refusal(dense, run, refused, out):
    run(dense)
    before = content(out)
    refused(dense, "--samples", 5000)
    assert content(out) == before


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_folder_of_the_user_beside_the_output_is_not_deleted(suffix, dense, refused, out):
    beside = out.with_name(f"small.{suffix}")
    beside.mkdir(parents=True)
    (beside / "thesis.txt").write_text("years of work")
    assert str(beside) in refused(dense)


def test_disk_without_room_is_refused_before_work_starts(dense, refused, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))

    def too_late(*_: Any) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr("sp3llm.text.windows.calibration_windows", too_late)
    message = refused(dense)
    assert "free disk" in message
    assert "--out" in message


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_run_that_fails_midway_leaves_nothing_that_loads_and_goes_on(
    error, dense, run, out, monkeypatch, capsys
):
    def fail(*_: Any, **__: Any) -> None:
        model = out.with_name("small.partial") / "model"
        assert (model / "model.safetensors").is_file()
        assert not (model / "config.json").exists()
        raise error(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sp3llm.models.companions.copy_companions", fail)
        with pytest.raises(RuntimeError if error is RuntimeError else SystemExit) as caught:
            run(dense)
    if error is not RuntimeError:
        assert caught.value.code == (130 if error is KeyboardInterrupt else 2)
        assert "same command" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["small.partial"]
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out.with_name("small.partial") / "model")
    run(dense)
    assert "Continuing" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size < 32
    assert [path.name for path in out.parent.iterdir()] == ["small"]


# --------------------------------------------------------------------------- legacy shards


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_bin_shards_read_like_safetensors(zipped, sharded, dense, model):
    options = {"_use_new_zipfile_serialization": zipped}
    shard(model, ".bin", **options) if sharded else to_bin(model, **options)
    expected = open_checkpoint(dense)
    found = open_checkpoint(model)
    assert set(found.files) == set(expected.files)
    assert found.dtype() == expected.dtype()
    tensors = found.read(found.files)
    for name, tensor in expected.read(expected.files).items():
        assert torch.equal(tensors[name], tensor)


def test_bin_checkpoint_compresses_to_the_same_weights(dense, model, run, out):
    to_bin(model)
    run(dense)
    expected = weights(out)
    run(model)
    found = weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Intruder:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_bin_shard_that_carries_code_is_refused_and_not_run(form, model, refused, tmp_path):
    marker = tmp_path / "was-here"
    value = {**weights(model), "more": Intruder(marker)}
    path = to_bin(model)
    if form == "pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(model)
    assert path.name in message
    assert "weights_only" not in message
    assert "safetensors" in message
    assert not marker.exists()


# --------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, model: str, source: Path) -> Path:
    """Lay a folder out as the hub cache holds a downloaded repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(source, snapshot)
    return snapshot


def test_unknown_hub_model_without_network_is_refused(hub, refused):
    message = refused("owner/no-such-model")
    assert "'owner/no-such-model'" in message
    assert "network" in message


def test_cached_hub_model_is_taken_without_network(hub, dense, run, out):
    snapshot = put_in_cache(hub, "owner/tiny", dense)
    assert resolve_model("owner/tiny") == (snapshot, "owner/tiny", None)
    run("owner/tiny")
    assert json.loads((out / RECORD).read_text())["model"] == "owner/tiny"
    assert "base_model: owner/tiny\n" in (out / "README.md").read_text()


@pytest.mark.parametrize("size", ["7b", "13b-chat"])
def test_llama_2_of_meta_resolves_to_its_twin_and_says_so(size, hub, dense, run, capsys):
    snapshot = put_in_cache(hub, f"meta-llama/Llama-2-{size}-hf", dense)
    folder, name, note = resolve_model(f"meta-llama/Llama-2-{size}")
    assert folder == snapshot
    assert name == f"meta-llama/Llama-2-{size}-hf"
    assert f"meta-llama/Llama-2-{size}-hf" in note
    assert len(note.splitlines()) == 1
    run(f"meta-llama/Llama-2-{size}")
    assert f"meta-llama/Llama-2-{size}-hf" in capsys.readouterr().out.replace("\n", "")


def test_other_hub_model_in_the_format_of_meta_is_refused(hub, tmp_path, refused):
    source = tmp_path / "meta"
    source.mkdir()
    (source / "params.json").write_text("{}")
    put_in_cache(hub, "owner/llama", source)
    assert "Meta's own format" in refused("owner/llama")


def test_cached_hub_model_without_weights_is_refused(hub, model, refused):
    (model / "model.safetensors").unlink()
    put_in_cache(hub, "owner/tiny", model)
    assert "weights" in refused("owner/tiny")


def test_record_is_json_even_where_one_window_leaves_the_error_unknown(run, dense, tmp_path):
    run(str(dense), "--out", str(tmp_path / "one"), "--eval-samples", "1")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "one" / RECORD).read_text()
    record = json.loads(text, parse_constant=refuse)
    assert record["excess_log_perplexity"]["paired_standard_error"] is None


def test_weights_of_another_name_are_written_under_the_usual_one(dense, model, run, tmp_path):
    (model / "model.safetensors").rename(model / "other.safetensors")
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    for folder, name in ((dense, "usual"), (model, "other")):
        run(folder, "--out", tmp_path / name)
    usual, other = tmp_path / "usual", tmp_path / "other"
    assert (usual / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert "transformers_weights" not in json.loads((other / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(other).config.hidden_size < 32


def test_text_inside_the_result_that_is_replaced_is_not_lost(dense, texts, run, refused, out):
    run(dense)
    shutil.copy(texts[0], out / "mine.jsonl")
    for option in ("--calib", "--eval-text"):
        message = refused(dense, option, out / "mine.jsonl")
        assert "mine.jsonl" in message
        assert "which would be replaced" in message
    assert (out / "mine.jsonl").read_bytes() == Path(texts[0]).read_bytes()


@pytest.mark.parametrize("named", ["{}", "{}:text", "tokenizer"])
def test_run_is_not_continued_with_other_text(named, model, texts, run, out, tmp_path, monkeypatch):
    """Of another file, or that another tokenizer makes other tokens of."""
    dense, text = model, tmp_path / "mine.jsonl"
    shutil.copy(texts[0], text)
    options = ("--calib", named.format(text) if named != "tokenizer" else texts[0])

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sp3llm.models.companions.copy_companions", stop)
        with pytest.raises(SystemExit):
            run(dense, *options)
    if named == "tokenizer":
        edit_json(model / "tokenizer.json", post_processor=None)
    else:
        text.write_text(text.read_text().replace("calib", "other"))
    with pytest.raises(SystemExit) as caught:
        run(dense, *options)
    assert caught.value.code == 2
    run(dense, *options, "--fresh")
    assert (out / RECORD).is_file()


@pytest.mark.parametrize(
    ("name", "factor", "word"),
    [
        ("lm_head.weight", 1e6, "nats a token"),
        ("model.norm.weight", 1e30, "nats a token"),
        (EMBEDDINGS, 0.0, "residual stream"),
        (EMBEDDINGS, 1e30, "gradients of the loss"),
    ],
)
def test_weights_out_of_all_bounds_are_refused(name, factor, word, model, refused):
    """What stock computes of them is finite, and no number that a result could be told by."""
    replace_tensor(model, name, weights(model)[name] * factor)
    message = refused(model)
    assert word in message
    assert "undamaged copy" in message


def test_model_of_a_name_longer_than_any_folders_is_refused(refused):
    assert "no folder here" in refused("x" * 5000)


def test_mount_point_is_refused_before_any_work(dense, refused, tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: "mounted" in str(p) or real(p))
    message = refused(str(dense), "--out", str(tmp_path / "mounted"))
    assert "mount point" in message
