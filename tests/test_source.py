"""Finding a model by what a user calls it: folders, files, and a Hub that this process plays on the loopback."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import ropewalk
from ropewalk.cli import main
from ropewalk.errors import CheckpointError, HubError, MissingFileError, UsageError
from ropewalk.loader.repository_files import choose_adapter_files, choose_model_files
from ropewalk.loader.source import find_adapter, find_source, split_branch

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """The part of the Hub's API that huggingface_hub needs to list and download a repository."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}  # user/name -> branch -> {file name: bytes}
        self.private, self.gated = set(), set()
        self.requests = []  # (method, path)
        self.status = None  # answer everything with this error
        self.break_off = None  # a file whose second half never comes: "stall" or "close"
        self.how = "close"
        self.page = None  # answer everything with this page

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, files, branch="main"):
        self.repos.setdefault(repo, {})[branch] = files

    def stop(self):
        """Answer no more, not on connections that are open either."""
        from huggingface_hub.utils import close_session

        self.shutdown()
        self.server_close()
        close_session()

    def downloads(self):
        """Return the names of the files that were sent, or begun."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path]


def commit(repo, branch):
    return hashlib.sha1(f"{repo}@{branch}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = urlsplit(self.path).path
        hub.requests.append((self.command, path))
        if hub.status is not None:
            return self.answer(hub.status, b"no")
        if hub.page is not None:
            return self.answer(200, hub.page)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        authorization = self.headers.get("authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            return self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo not in hub.repos or (repo in hub.private and not authorization):
            return self.answer(404 if authorization else 401, b"", {"X-Error-Code": "RepoNotFound"})
        if repo in hub.gated and not authorization:
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        rest = parts[4:] if api else parts[2:]
        branches = {name: name for name in hub.repos[repo]}
        branches |= {commit(repo, name): name for name in hub.repos[repo]}
        if rest == ["refs"]:
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": commit(repo, b)} for b in hub.repos[repo]]
            return self.json({"branches": refs, "converts": [], "tags": []})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in branches:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        branch = branches[revision]
        files = hub.repos[repo][branch]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self.json({"id": repo, "sha": commit(repo, branch), "siblings": siblings})
        if rest[0] == "tree":
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        name = "/".join(rest[2:])
        if rest[0] != "resolve" or name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(repo, branch)})
        content = files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit(repo, branch)}
        if self.command == "GET" and name == hub.break_off:
            return self.half(content, headers)
        return self.answer(200, content, headers)

    def half(self, content, headers):
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if self.server.how == "stall":
            time.sleep(60)
        self.close_connection = True

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop()
        thread.join(5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one repository, and huggingface_hub pointed at it and at an empty cache."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    with serving() as served:
        # Read from HF_ENDPOINT and HF_HOME when huggingface_hub is imported, which may have been long ago.
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # The waits between tries are for a Hub that is far away.
        hurried = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", hurried)
        _http.close_session()
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        served.add("user/name", dict(FILES))
        yield served


FILES = {
    ".gitattributes": b"x",
    "README.md": b"# card",
    "config.json": b'{"model_type": "llama"}',
    "quantize_config.json": b'{"bits": 4}',
    "generation_config.json": b'{"file": "generation_config.json"}',
    "tokenizer.json": b'{"file": "tokenizer.json"}',
    "tokenizer_config.json": b'{"file": "tokenizer_config.json"}',
    "tokenizer.model": b"sp",
    "special_tokens_map.json": b'{"file": "special_tokens_map.json"}',
    "chat_template.jinja": b"chat",
    "modeling_evil.py": b"raise SystemExit",
    "tokenizer_evil.py": b"raise SystemExit",
    "gptq_model-4bit-128g.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "flax_model.msgpack": b"x",
    "tf_model.h5": b"x",
    "model.onnx": b"x",
    "original/consolidated.00.pth": b"x",
    "original/config.json": b"x",
}
NEEDED = {
    "config.json",
    "quantize_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "gptq_model-4bit-128g.safetensors",
}


def refuses(error, call, *arguments, **options):
    """Return the message of the error, which is one sentence that says what was expected and found."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, UsageError) or (": expected " in text and ", found " in text)
    return text


# Folders and files


def test_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    source = find_source(tmp_path / "model")
    assert (source.folder, source.file, source.name) == (tmp_path / "model", None, str(tmp_path / "model"))
    assert find_source(str(tmp_path / "model")).folder == tmp_path / "model"
    assert "expected none for what is on this machine" in refuses(
        UsageError, find_source, tmp_path / "model", revision="main"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_a_file_with_its_config_beside_it(tmp_path, suffix):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / f"any{suffix}"
    file.write_bytes(b"x")
    source = find_source(file)
    assert (source.folder, source.file) == (tmp_path, file)


@pytest.mark.parametrize(
    "name",
    ["a-7b-4bit-128g.safetensors", "a-7b-4bit.pt", "a-7b-3bit--1g.pt", "a-7b-4bit-128g.no-act-order.pt", "a-7b.pt"],
)
def test_a_file_beside_the_folder_as_the_webui_had_it(tmp_path, name):
    folder = tmp_path / "models" / "a-7b"
    folder.mkdir(parents=True)
    file = tmp_path / "models" / name
    file.write_bytes(b"x")
    text = refuses(MissingFileError, find_source, file)
    assert "the model's config.json beside it, or in " in text
    assert str(folder) in text
    (folder / "config.json").write_text("{}")
    source = find_source(file)
    assert (source.folder, source.file) == (folder, file)
    # The folder finds the file, too, by the names that were usual.
    assert find_source(folder).file == (file if "bit" in name else None)
    (folder / "model.safetensors").write_bytes(b"x")
    assert find_source(folder).file is None


def test_of_two_files_beside_the_folder_none_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a-4bit.pt", "a-4bit-128g.pt", "a-b-4bit.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert find_source(tmp_path / "a").file is None
    (tmp_path / "a-4bit.safetensors").write_bytes(b"x")
    assert find_source(tmp_path / "a").file == tmp_path / "a-4bit.safetensors"


@pytest.mark.parametrize("name", ["model.gguf", "model.ggml", "config.json", "notes"])
def test_a_file_of_another_kind(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"{}")
    text = refuses(MissingFileError, find_source, tmp_path / name)
    assert "a file of the kinds .safetensors, .pt, .pth, .bin, found a file" in text


def test_the_folders_of_download_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    branch = "gptq-4bit-32g-actorder_True"
    for shelf in ("user_data/models", "models", "."):
        plain, other = Path(shelf, "TheBloke_Name"), Path(shelf, f"TheBloke_Name_{branch}")
        for folder in (plain, other):
            folder.mkdir(parents=True)
        for name in ("TheBloke/Name", "models/TheBloke/Name", "TheBloke/Name:main", "user_data/models/TheBloke/Name"):
            assert find_source(name).folder == plain
        for name in (f"TheBloke/Name:{branch}", f"models/TheBloke/Name:{branch}", f"TheBloke_Name:{branch}"):
            assert find_source(name).folder == other
        assert find_source("TheBloke/Name", revision=branch).folder == other
        assert find_source(tmp_path / "models/TheBloke/Name").folder.resolve() if shelf == "models" else True
    assert find_source("TheBloke_Name").folder == Path("TheBloke_Name")
    Path("loras/user_lora").mkdir(parents=True)
    Path("loras/user_lora/adapter_config.json").write_text("{}")
    assert find_adapter("user/lora") == Path("loras/user_lora")


def test_what_must_not_be_asked_of_the_hub(hub):
    for name in (
        "/user/name",
        "./user/name",
        "../user/name",
        "user/../name",
        "~user/name",
        "user/name:../../etc",
        "user/name:/etc/passwd",
        "user/name/file",
        "name",
        "C:\\models\\name",
        "C:/models/name",
        "C:\\models\\user\\name:branch",
        "user\\name",
        "models/name",
        "models/user/name:branch",
        "user/name.safetensors",
        "user/name.gguf",
        "https://host/user/name",
        "user/ name",
        "user/" + "n" * 300 + "/x",
        "user/na\0me",
        Path("user/name"),
    ):
        text = refuses(MissingFileError, find_source, name)
        assert "expected a folder with a model" in text
        assert "found nothing of this name" in text
        refuses(MissingFileError, find_adapter, name)
    assert "nor a folder" in refuses(MissingFileError, find_source, "models/user/name:branch")
    assert str(Path("user_data/models/user_name_branch")) in refuses(
        MissingFileError, find_source, "models/user/name:branch"
    )
    for name in ("user/na--me", "user/name.git"):
        assert "neither -- nor .. in it" in refuses(HubError, find_source, name)
    for bad in ("..", "a/../b", "/etc", "", "a b", "C:\\x"):
        assert "revision: expected a branch" in refuses(UsageError, find_source, "user/name", revision=bad)
    refuses(UsageError, find_source, "")
    assert hub.requests == []


def test_the_colon_of_a_drive_is_no_branch():
    assert split_branch("C:\\models\\name") == ("C:\\models\\name", None)
    assert split_branch("C:/models/name") == ("C:/models/name", None)
    assert split_branch("C:\\models\\user\\name:branch") == ("C:\\models\\user\\name", "branch")
    assert split_branch("user/name:refs/pr/1") == ("user/name", "refs/pr/1")


# Which files


def test_which_files_of_a_model():
    assert set(choose_model_files(FILES)) == NEEDED
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    assert set(choose_model_files(["config.json", index, *shards, "consolidated.safetensors"])) == {
        "config.json",
        index,
        *shards,
    }
    assert choose_model_files(["model.safetensors", "consolidated.safetensors"]) == ["model.safetensors"]
    assert choose_model_files(["consolidated.safetensors"]) == ["consolidated.safetensors"]
    assert choose_model_files(["a.safetensors", "a.bin", "a.pt", "adapter_model.safetensors"]) == ["a.safetensors"]
    old = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert set(choose_model_files([*old, "training_args.bin", "optimizer.pt", "rng_state_0.pth"])) == set(old)
    assert choose_model_files(["a-4bit.pt", "config.json"]) == ["config.json", "a-4bit.pt"]
    adapter = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "config.json"]
    assert choose_adapter_files(adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    assert choose_adapter_files(adapter[:2]) == adapter[:2]


# The Hub


def test_a_repository(hub, tmp_path):
    source = find_source("user/name")
    assert {path.name for path in source.folder.iterdir()} == NEEDED
    assert (source.file, source.name) == (None, "user/name")
    assert source.folder.is_relative_to(tmp_path / "hub")
    weights = source.folder / "gptq_model-4bit-128g.safetensors"
    assert weights.read_bytes() == FILES[weights.name]
    assert sorted(hub.downloads()) == sorted(NEEDED)
    hub.requests.clear()
    assert find_source("user/name") == source
    assert hub.downloads() == []


def test_links_into_the_cache_are_kept(hub):
    folder = find_source("user/name").folder
    file = folder / "gptq_model-4bit-128g.safetensors"
    assert file.is_symlink()  # or this test shows nothing
    source = find_source(file)
    assert (source.folder, source.file) == (folder, file)


def test_a_packed_model_from_the_hub_is_read_through_the_links(hub, tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "made", file="gptq_model-4bit-32g.safetensors")
    hub.add("user/packed", {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}, "gptq-4bit")
    folder = find_source("user/packed:gptq-4bit").folder
    expected = {**ropewalk.inspect(tmp_path / "made"), "model": str(folder)}
    assert ropewalk.inspect(folder) == expected
    model, _ = ropewalk.load(folder)
    assert model.config.model_type == "llama"


def test_transformers_from_pretrained_takes_names_and_branches(hub, tmp_path, make_checkpoint):
    """With the patch, and though config.json says nothing of packing."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    for branch, bits in (("main", 4), ("3bit", 3)):
        folder = tmp_path / branch
        make_checkpoint(folder, bits=bits, file=f"gptq_model-{bits}bit-32g.safetensors")
        hub.add("user/packed", {path.name: path.read_bytes() for path in folder.iterdir()}, branch)
    ropewalk.patch()
    try:
        for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
            for branch, bits in (("main", 4), ("3bit", 3)):
                model = model_class.from_pretrained("user/packed", revision=branch, device_map="auto")
                assert model.model.layers[0].mlp.up_proj.bits == bits
        assert model.config.rope_parameters["rope_type"] == "partial-ntk"
    finally:
        ropewalk.unpatch()


@pytest.mark.parametrize(
    ("files", "packed"),
    [
        ({"config.json": b'{"quantization_config": {"quant_method": "gptq"}}', "model.safetensors": b""}, True),
        ({"config.json": b'{"quantization_config": {"quant_method": "awq"}}', "quantize_config.json": b""}, False),
        ({"config.json": b"{}", "quantize_config.json": b"{}", "model.safetensors": b""}, True),
        ({"config.json": b"{}", "quant_config.json": b"{}", "gptq_model-4bit-128g.safetensors": b""}, True),
        ({"config.json": b"{}", "llama-13b-4bit-128g.pt": b""}, True),
        ({"config.json": b"{}", "llama-13b-4bit-128g.pt": b"", "pytorch_model.bin": b""}, False),
        ({"config.json": b"{}", "model.safetensors": b"", "other-4bit.safetensors": b""}, False),
        ({"config.json": b"{}", "model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}, False),
        ({"config.json": b"not json", "quantize_config.json": b""}, False),
        ({"README.md": b""}, False),
    ],
)
def test_which_repositories_are_packed(hub, files, packed):
    from ropewalk.loader.packed_name import is_packed

    hub.add("user/model", files)
    assert is_packed("user/model", {}) is packed
    assert is_packed("user/model", {"revision": "main", "token": TOKEN}) is packed
    assert not is_packed("user/model", {"revision": "nope"})
    assert not is_packed("user/nothing", {})
    assert not hub.downloads() or set(hub.downloads()) == {"config.json"}


def test_a_branch(hub):
    hub.add("user/name", {**FILES, "config.json": b'{"model_type": "mistral"}'}, "gptq-3bit")
    for source in (find_source("user/name:gptq-3bit"), find_source("user/name", revision="gptq-3bit")):
        assert source.name == "user/name:gptq-3bit"
        assert b"mistral" in (source.folder / "config.json").read_bytes()
    assert find_source("user/name:main", revision="main").folder == find_source("user/name").folder
    assert b"llama" in (find_source("user/name").folder / "config.json").read_bytes()
    sha = commit("user/name", "gptq-3bit")
    assert find_source(f"user/name:{sha}").folder == source.folder
    text = refuses(UsageError, find_source, "user/name:main", revision="gptq-3bit")
    assert text == "revision: expected one, found 'main' in user/name:main and 'gptq-3bit'"


def test_no_such_branch_names_those_that_there_are(hub):
    hub.add("user/name", FILES, "gptq-3bit")
    text = refuses(HubError, find_source, "user/name:gptq-8bit")
    assert "(main, gptq-3bit), found no 'gptq-8bit'" in text
    assert text.startswith("user/name:gptq-8bit: ")


def test_no_such_repository(hub):
    text = refuses(HubError, find_source, "user/nothing")
    assert "a folder of this name or the repository" in text
    assert "hf auth login" in text
    assert "nothing of it in the cache" in text
    assert isinstance(HubError("a", "b", "c"), CheckpointError)


def test_a_private_repository_with_and_without_a_token(hub, tmp_path, monkeypatch):
    hub.private.add("user/name")
    assert "if it is private, log in with" in refuses(HubError, find_source, "user/name")
    assert "check the token" in refuses(HubError, find_source, "user/name", token="hf_wrong")
    assert "a token (log in" in refuses(HubError, find_source, "user/name", token=True)
    text = refuses(UsageError, find_source, "user/name", token="hf_secret\n")
    assert "hf_secret" not in text
    with_token = find_source("user/name", token=TOKEN, cache_dir=tmp_path / "other")
    assert with_token.folder.is_relative_to(tmp_path / "other")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    find_source("user/name")
    assert "nothing of it" in refuses(HubError, find_source, "user/name", token=False, cache_dir=tmp_path / "third")


def test_a_gated_repository(hub):
    hub.gated.add("user/name")
    assert "accept its terms there" in refuses(HubError, find_source, "user/name")
    assert find_source("user/name", token=TOKEN).folder.is_dir()


def test_a_repository_without_a_model(hub):
    hub.add("user/gguf", {"config.json": b"{}", "model.gguf": b"x"})
    text = refuses(HubError, find_source, "user/gguf")
    assert "expected weights in .safetensors, .bin or .pt files, found config.json, model.gguf" in text
    hub.add("user/empty", {".gitattributes": b""})
    assert "expected a repository with config.json, found an empty one" in refuses(HubError, find_source, "user/empty")
    hub.add("user/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "README.md": b""})
    assert "found a PEFT adapter" in refuses(HubError, find_source, "user/lora")
    folder = find_adapter("user/lora")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert find_adapter("user/lora", local_files_only=True) == folder
    assert find_adapter(folder / "adapter_model.safetensors") == folder
    assert "a repository with adapter_config.json" in refuses(HubError, find_adapter, "user/name")
    assert "expected a PEFT adapter" in refuses(MissingFileError, find_adapter, folder.parent)


def test_the_second_call_needs_no_network(hub, caplog):
    source = find_source("user/name")
    hub.stop()
    assert find_source("user/name") == source
    assert "the files in the cache are used" in caplog.text
    text = refuses(HubError, find_source, "user/name:other")
    assert "expected an answer of the Hub at http://127.0.0.1" in text
    assert "nothing of it in the cache" in text


def test_offline(hub, monkeypatch):
    from huggingface_hub import constants

    text = refuses(HubError, find_source, "user/name", local_files_only=True)
    assert "since only local files are allowed, found nothing of it in the cache" in text
    assert hub.requests == []
    source = find_source("user/name")
    hub.requests.clear()
    assert find_source("user/name", local_files_only=True) == source
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_source("user/name") == source
    text = refuses(HubError, find_source, "user/other:branch")
    assert text.startswith("user/other:branch: expected it in the Hub's cache ")
    assert "since offline mode is on (HF_HUB_OFFLINE), found nothing of it in the cache" in text
    assert hub.requests == []


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_errors_of_the_hub(hub, status):
    hub.status = status
    text = refuses(HubError, find_source, "user/name")
    assert str(status) in text
    assert ("try again later" in text) == (status != 403)
    hub.status = None
    source = find_source("user/name")
    hub.status = status
    assert find_source("user/name") == source


def test_a_page_that_is_not_the_hubs(hub):
    hub.page = b"<html>Please log in to this network"
    assert "check the connection" in refuses(HubError, find_source, "user/name")


def test_a_disk_that_is_too_small(hub, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0.0 GB free for it in" in refuses(HubError, find_source, "user/name")
    assert hub.downloads() == []


def test_a_connection_that_breaks(hub):
    hub.break_off, hub.how = "gptq_model-4bit-128g.safetensors", "close"
    assert "before all of it was here" in refuses(HubError, find_source, "user/name")
    text = refuses(HubError, find_source, "user/name", local_files_only=True)
    assert "found only a part of it in the cache (no gptq_model-4bit-128g.safetensors)" in text
    hub.break_off = None
    source = find_source("user/name")
    assert (source.folder / "gptq_model-4bit-128g.safetensors").stat().st_size == 102400
    assert find_source("user/name", local_files_only=True) == source


def environment(hub, tmp_path, **more):
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    return {**own, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), **more}


def test_a_download_that_is_killed(hub, tmp_path):
    hub.break_off, hub.how = "gptq_model-4bit-128g.safetensors", "stall"
    code = "from ropewalk.loader.source import find_source; find_source('user/name')"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    cache = tmp_path / "home" / "hub"
    try:
        for _ in range(600):  # until the weights have begun and all else is there
            others = list(cache.glob("*/snapshots/*/*"))
            if list(cache.glob("*/blobs/*.incomplete")) and len(others) == len(NEEDED) - 1:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(cache.glob("*/blobs/*.incomplete"))
    text = refuses(HubError, find_source, "user/name", cache_dir=cache, local_files_only=True)
    assert "found only a part of it in the cache (no gptq_model-4bit-128g.safetensors)" in text
    hub.break_off = None
    folder = find_source("user/name", cache_dir=cache).folder
    assert {path.name for path in folder.iterdir()} == NEEDED


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_part_of_a_model_in_the_cache_of_an_older_huggingface_hub(hub, tmp_path, lost):
    """It remembers no listing: the index of the weights has to do."""
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1]}}
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("user/sharded", {**files, **{name: name.encode() for name in shards}})
    folder = find_source("user/sharded").folder
    listing = tmp_path / "hub/models--user--sharded/trees"
    for remembered in (True, False):
        if not remembered:
            from huggingface_hub import _tree_cache

            for path in listing.iterdir():
                path.unlink()
            _tree_cache._IN_MEMORY_TREE_CACHE.clear()
            assert find_source("user/sharded", local_files_only=True).folder == folder
        (folder / lost).rename(tmp_path / "lost")
        if remembered or lost.startswith("model"):
            text = refuses(HubError, find_source, "user/sharded", local_files_only=True)
            assert f"only a part of it in the cache (no {lost})" in text
        (tmp_path / "lost").rename(folder / lost)


def test_without_bars(hub, capsys):
    find_source("user/name", progress=False)
    assert capsys.readouterr().err == ""


# The command


def command(hub, tmp_path, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "ropewalk", *map(str, arguments)],
        env=environment(hub, tmp_path, **more),
        capture_output=True,
        text=True,
    )


def test_the_command_takes_names_of_the_hub(hub, tmp_path, shipped):
    files = {path.name: path.read_bytes() for path in shipped.iterdir() if path.is_file()}
    hub.add("user/strand", files, "gptq-4bit")
    hub.add("user/strand", {"README.md": b""})
    asked = ["generate", "user/strand:gptq-4bit", "--prompt", "In the", "--max-new-tokens", "3", "--json"]
    done = command(hub, tmp_path, *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 3
    assert {name.rsplit(".")[-1] for name in hub.downloads()} <= {"json", "safetensors", "model", "jinja"}
    hub.requests.clear()
    done = command(hub, tmp_path, "inspect", "user/strand", "--revision", "gptq-4bit", "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits"] == 4
    assert hub.requests == []
    done = command(hub, tmp_path, "inspect", "user/strand", "--revision", "gptq-8bit")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ropewalk inspect: user/strand:gptq-8bit: expected a revision of http://127.0.0.1:")
    assert "found no 'gptq-8bit'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def asked(monkeypatch):
    """Catch what the command hands to `load`."""
    seen = {}

    def load(model, **options):
        seen.update(options, model=model)
        raise UsageError("seen: expected, found")

    monkeypatch.setattr("ropewalk.loader.load.load", load)

    def ask(*arguments):
        seen.clear()
        main(["generate", *arguments, "--prompt", "x"])
        return dict(seen)

    return ask


def test_options_reach_load_only_when_they_are_given(asked, shipped):
    plain = {"rope": "auto", "device_map": None}
    assert asked("demo") == {**plain, "model": shipped}
    assert asked("user/name:branch") == {**plain, "model": "user/name:branch"}
    assert asked("user/name", "--revision", "b")["revision"] == "b"
    found = asked("x", "--bits", "3", "--group-size", "-1", "--load-in-4bit", "--cache-packed", "--dtype", "float16")
    assert found == {
        **plain,
        **{"model": "x", "bits": 3, "group_size": -1, "load_in_4bit": True, "cache_packed": True, "dtype": "float16"},
    }
    assert asked("x", "--device-map", "auto", "--max-memory", "0=10GiB, cpu=2.5 GB") == {
        **plain,
        **{"model": "x", "device_map": "auto", "max_memory": {0: "10GiB", "cpu": "2.5GB"}},
    }
    assert asked("x", "--device-map", '{"model.layers.0": 0, "": "cpu"}')["device_map"] == {
        "model.layers.0": 0,
        "": "cpu",
    }
    assert str(asked("x", "--device", "cpu")["device_map"]) == "cpu"


def test_adapters_by_name(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert asked("x", "--lora", "one")["lora"] == "one"
    assert asked("x", "--lora", "one", "--lora", "user/two:b")["lora"] == ["one", "user/two:b"]
    assert asked("x", "--lora", "a=one", "--lora", "b=user/two")["lora"] == {"a": "one", "b": "user/two"}
    assert asked("x", "--lora", "./a=one")["lora"] == "./a=one"
    Path("a=one").mkdir()
    assert asked("x", "--lora", "a=one")["lora"] == "a=one"
    capsys.readouterr()
    for given in (["a=1", "a=2"], ["b="], ["b=1", "two"]):
        assert main(["generate", "x", "--prompt", "x", *(part for one in given for part in ("--lora", one))]) == 2
        assert "--lora: expected NAME=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "invalid choice: 5"),
        (["--group-size", "0"], "expected -1 or a whole number from 1 on, found '0'"),
        (["--group-size", "x"], "expected -1 or a whole number from 1 on, found 'x'"),
        (["--device-map", "tpu"], "or a JSON object from modules to devices, found 'tpu'"),
        (["--device-map", "[1]"], "or a JSON object"),
        (["--device-map", '{"a": true}'], "or a JSON object"),
        (["--device-map", "cpu", "--device", "cpu"], "not allowed with argument"),
        (["--max-memory", "10GiB"], "expected sizes such as 0=10GiB,cpu=20GiB"),
        (["--max-memory", "0=1GiB,0=2GiB"], "each once"),
        (["--max-memory", "gpu=1GiB"], "expected sizes"),
    ],
)
def test_options_that_cannot_be(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "demo", "--prompt", "x", *options])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_options_that_do_not_go_together(capsys):
    assert main(["inspect", "demo", "--revision", "main"]) == 2
    assert "revision: expected none for what is on this machine" in capsys.readouterr().err
