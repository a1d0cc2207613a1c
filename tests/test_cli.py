"""The command: what it prints, what its JSON holds, and how it fails."""

import json
import subprocess
import sys

import pytest
import torch

import ropewalk
from ropewalk.cli import COMMANDS, main
from ropewalk.shipped import held_out_text

PROMPT = "And the LORD said unto Moses,"


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    lines = out.splitlines()
    assert len(lines) == 1  # one object and nothing else
    return json.loads(lines[0])


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--debug" in text


def test_bad_usage_is_one_line_and_exit_2(capsys):
    for arguments in ([], ["nothing"], ["generate", "demo"], ["inspect"], ["perplexity", "demo", "--context", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert "--help" in captured.err


def test_inspect(capsys, shipped):
    found = run_json(capsys, "inspect", "demo")
    assert found == ropewalk.inspect(shipped)
    assert set(found) >= {
        "format",
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "architecture",
        "rope",
        "bytes",
        "kernels",
        "warnings",
    }
    status, out, _ = run(capsys, "inspect", "demo")
    assert status == 0
    assert "4 bits, groups of 32, act-order, symmetric" in out
    assert "partial-ntk" in out
    assert run_json(capsys, "inspect", "demo", "--rope", "linear:2")["rope"]["type"] == "linear"


def test_generate_gives_what_transformers_gives(capsys, shipped):
    found = run_json(capsys, "generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "20")
    model, tokenizer = ropewalk.load(shipped)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert found["text"] == tokenizer.decode(expected[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["new_tokens"] == 20
    assert found["stopped"] == "length"
    assert found["rope"]["type"] == "partial-ntk"
    assert found["tokens_per_second"] > 0
    status, out, err = run(capsys, "generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "20")
    assert status == 0
    assert out == PROMPT + found["text"] + "\n"  # the text and nothing else on stdout
    assert "tokens/s" in err


def test_generate_streams(shipped):
    from ropewalk.generation import generate

    model, tokenizer = ropewalk.load(shipped)
    pieces = []
    made = generate(model, tokenizer, PROMPT, max_new_tokens=25, on_text=pieces.append)
    assert len(pieces) > 5
    assert "".join(pieces) == made.text


def test_keys_and_values_in_8_bits(shipped, capsys, monkeypatch):
    pytest.importorskip("hqq")
    arguments = ["generate", "demo", "--prompt", PROMPT * 12, "--max-new-tokens", "20"]
    found = run_json(capsys, *arguments, "--kv-bits", "8")
    assert found["text"] == run_json(capsys, *arguments)["text"]
    assert run_json(capsys, *arguments, "--kv-bits", "2")["text"] != found["text"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    status, _, err = run(capsys, *arguments, "--kv-bits", "8")
    assert status == 1
    assert "expected the package hqq" in err


def test_long_prompts_are_read_in_chunks(shipped, monkeypatch):
    """So that a long context needs no more room for what is between the layers than a short one."""
    from ropewalk import generation

    model, tokenizer = ropewalk.load(shipped)
    prompt = " ".join([PROMPT] * 20)
    whole = generation.generate(model, tokenizer, prompt, max_new_tokens=12)
    lengths = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(generation, "CHUNK", 32)
    assert generation.generate(model, tokenizer, prompt, max_new_tokens=12).text == whole.text
    assert max(lengths) == 32
    assert sum(lengths) == whole.prompt_tokens + 11


def test_generate_stops_at_a_string_and_never_shows_it(shipped):
    from ropewalk.generation import generate

    model, tokenizer = ropewalk.load(shipped)
    free = generate(model, tokenizer, PROMPT, max_new_tokens=40).text
    stop = free[20:26]
    pieces = []
    made = generate(model, tokenizer, PROMPT, max_new_tokens=40, stop=[stop], on_text=pieces.append)
    assert made.stopped == "stop string"
    assert made.text == free[: free.index(stop)]
    assert "".join(pieces) == made.text


def test_generate_samples_by_its_seed(capsys):
    arguments = ["generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "1.2"]
    a, b, c = (run_json(capsys, *arguments, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_generate_with_a_template_a_file_and_a_lora(capsys, tmp_path, shipped):
    file = tmp_path / "prompt.txt"
    file.write_text("Who art thou?")
    found = run_json(
        capsys, "generate", "demo", "--prompt-file", file, "--template", "airoboros-2.1", "--max-new-tokens", "5"
    )
    tokenizer = ropewalk.load(shipped)[1]
    assert found["prompt_tokens"] == len(tokenizer("A chat.\nUSER: Who art thou?\nASSISTANT:")["input_ids"])

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.gptq import GPTQLoraLinear

    base, _ = ropewalk.load(shipped)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({ropewalk.QuantLinear: GPTQLoraLinear})
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "lora")
    arguments = ["generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "20"]
    plain, adapted = run_json(capsys, *arguments), run_json(capsys, *arguments, "--lora", tmp_path / "lora")
    assert plain["text"] != adapted["text"]


def test_a_prompt_longer_than_the_context(capsys, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(held_out_text()[:20_000])
    status, out, err = run(capsys, "generate", "demo", "--prompt-file", file)
    assert status == 1
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("ropewalk generate: prompt: expected fewer tokens than the context of 1024, found ")


def test_generation_ends_where_the_context_ends(capsys, tmp_path, shipped):
    tokenizer = ropewalk.load(shipped)[1]
    file = tmp_path / "near.txt"
    file.write_text(tokenizer.decode(tokenizer(held_out_text())["input_ids"][1:1010]))
    found = run_json(capsys, "generate", "demo", "--prompt-file", file, "--max-new-tokens", "500")
    assert found["prompt_tokens"] + found["new_tokens"] == 1024


def test_perplexity(capsys, tmp_path):
    plot = tmp_path / "plot.png"
    arguments = ["perplexity", "demo", "--context", "64", "256", "--tokens", "2048"]
    found = run_json(capsys, *arguments, "--plot", plot)
    assert set(found["perplexity"]) == {"64", "256"}
    assert 10 < found["perplexity"]["256"] < found["perplexity"]["64"] < 60
    assert plot.read_bytes().startswith(b"\x89PNG")
    worse = run_json(capsys, *arguments, "--rope", "linear:4")
    assert worse["rope"]["type"] == "linear"
    assert worse["perplexity"]["256"] > 1.5 * found["perplexity"]["256"]
    sliding = run_json(capsys, *arguments, "--stride", "32")
    assert sliding["perplexity"]["64"] < found["perplexity"]["64"]  # more to go by, on average
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 40)
    easy = run_json(capsys, "perplexity", "demo", "--text", text, "--context", "128")["perplexity"]["128"]
    assert easy < 0.8 * found["perplexity"]["256"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert f"{found['perplexity']['256']:.3f}" in out


def test_demo_shows_what_the_method_is_for(capsys, tmp_path):
    plot = tmp_path / "demo.png"
    found = run_json(capsys, "demo", "--plot", plot)
    assert found["rope"]["type"] == "partial-ntk"
    assert "original_max_position_embeddings 256" in found["rope"]["why"]
    assert len(found["text"]) > 100
    assert found["tokens_per_second"] > 0
    table = found["perplexity"]
    assert set(table) == {"none", "linear", "yarn", "partial-ntk"}
    contexts = ["128", "256", "512", "1024"]
    assert all(list(row) == contexts for row in table.values())
    ours = [table["partial-ntk"][n] for n in contexts]
    assert ours == sorted(ours, reverse=True)  # goes on falling beyond the original 256
    assert table["none"]["1024"] > 1.3 * table["none"]["256"]  # blows up
    assert all(table["partial-ntk"]["1024"] < table[rope]["1024"] for rope in ("none", "linear", "yarn"))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_quantize_by_rounding(capsys, tmp_path, make_plain):
    make_plain(tmp_path)
    found = run_json(
        capsys,
        "quantize",
        tmp_path,
        tmp_path / "out",
        "--method",
        "rtn",
        "--bits",
        "3",
        "--group-size",
        "32",
        "--no-sym",
    )
    assert found["quantize_config"]["bits"] == 3
    inspected = ropewalk.inspect(tmp_path / "out")
    assert (inspected["bits"], inspected["format"], inspected["sym"]) == (3, "gptq_v2", False)
    model, _ = ropewalk.load(tmp_path / "out")
    assert model(torch.arange(3, 40)[None]).logits.isfinite().all()


def test_quantize_refuses(capsys, tmp_path, make_plain, shipped):
    make_plain(tmp_path)
    status, _, err = run(capsys, "quantize", tmp_path, tmp_path / "out")
    assert (status, err) == (2, "ropewalk quantize: --text: expected a file with calibration text, found none\n")
    status, _, err = run(capsys, "quantize", tmp_path, tmp_path, "--method", "rtn")
    assert status == 1
    assert "expected a new or empty folder to write to, found files in it" in err
    status, _, err = run(capsys, "quantize", shipped, tmp_path / "out", "--method", "rtn")
    assert status == 1
    assert "expected float weights, found 4-bit ones" in err
    status, _, err = run(capsys, "quantize", tmp_path, tmp_path / "out", "--method", "rtn", "--group-size", "0")
    assert status == 2
    assert "group_size: expected -1 or a positive number, found 0" in err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_quantize_without_gptqmodel_says_how_to_get_it(capsys, tmp_path, make_plain, monkeypatch):
    import importlib.util

    make_plain(tmp_path)
    (tmp_path / "text.txt").write_text("words")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gptqmodel" else real(name, *a))
    status, _, err = run(capsys, "quantize", tmp_path, tmp_path / "out", "--text", tmp_path / "text.txt")
    assert status == 1
    assert "expected the package gptqmodel (pip install 'ropewalk[gptqmodel]'), found none" in err


def test_doctor(capsys):
    found = run_json(capsys, "doctor")
    assert found["ropewalk"] == ropewalk.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["problems"] == []
    assert found["patches"][0]["package"] == "transformers"
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert torch.__version__ in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect", "/no/such"], 1, "/no/such: expected a folder with a model"),
        (["generate", "/no/such", "--prompt", "x"], 1, "/no/such: expected a folder with a model"),
        (["generate", "demo", "--prompt", "x", "--rope", "foo"], 2, "--rope: rope: expected auto, none or one of"),
        (["generate", "demo", "--prompt", "x", "--rope", "linear:0"], 1, "factor: expected a number above 0, found 0"),
        (["generate", "demo", "--prompt", "x", "--template", "foo"], 2, "--template: expected auto or one of"),
        (
            ["generate", "demo", "--prompt", "x", "--template", "auto"],
            2,
            "a chat template in the tokenizer, found none",
        ),
        (["generate", "demo", "--prompt", "x", "--temperature", "-1"], 2, "temperature: expected 0 or more, found -1"),
        (["generate", "demo", "--prompt", "x", "--top-p", "0"], 2, "--top-p: expected above 0 and at most 1, found 0"),
        (["generate", "demo", "--prompt", "x", "--device", "tpu9"], 2, "--device: expected cpu, cuda or cuda:N"),
        (["generate", "demo", "--prompt-file", "/no/such"], 1, "/no/such: expected a text file for --prompt-file"),
        (["generate", "demo", "--prompt", "x", "--lora", "/no/such"], 1, "/no/such: expected a PEFT adapter"),
        (["perplexity", "/no/such", "--context", "64"], 2, "--text: expected a file, found none"),
        (["perplexity", "demo", "--context", "64", "--stride", "64"], 1, "stride: expected 1 to 63 tokens"),
        (
            ["perplexity", "demo", "--context", "64", "--tokens", "10"],
            1,
            "--text: expected at least 64 tokens, found 10",
        ),
    ],
)
def test_failures_are_one_line_that_names_what_was_expected_and_found(capsys, arguments, status, message):
    found, out, err = run(capsys, *arguments)
    assert found == status
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith(f"ropewalk {arguments[0]}:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_a_truncated_file(capsys, tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    status, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert (status, out) == (1, "")
    assert "the file is truncated" in err


def test_debug_shows_where(capsys):
    with pytest.raises(ropewalk.errors.MissingFileError):
        main(["inspect", "/no/such", "--debug"])


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("ropewalk.loader.inspect.describe", lambda *a, **k: 1 / 0)
    status, out, err = run(capsys, "inspect", "demo")
    assert (status, out) == (1, "")
    assert err == "ropewalk inspect: unexpected ZeroDivisionError: division by zero (--debug shows where)\n"


def test_as_a_module_and_into_a_closed_pipe():
    done = subprocess.run([sys.executable, "-m", "ropewalk", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ropewalk {ropewalk.__version__}\n"
    command = f"{sys.executable} -m ropewalk inspect demo | true"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in piped.stderr
