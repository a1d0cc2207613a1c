"""Drives an installed text-generation-webui, unmodified, in a browser and by its API: `make webui-browser WEBUI=...`.

It works on a copy of webui's folder, with the small model that ships and one of random weights that takes long
enough to load to be seen doing it. What fails raises; screenshots and logs are kept to be looked at.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
PROMPT = "And it came to pass in those days"
LARGE = "8x2048x5632x32x4"  # layers, hidden, ffn, heads, kv heads: 0.4 GB

PREPARE = """
import sys, torch, peft, shutil, ropewalk
from pathlib import Path
from ropewalk.bench.model import model_cache, packed_model
from ropewalk.bench.shapes import parse_packing
from ropewalk.shipped import FOLDER
user_data = Path(sys.argv[1])
shutil.copytree(FOLDER, user_data / "models/strand")
broken = shutil.copytree(FOLDER, user_data / "models/strand-truncated")
with open(broken / "model.safetensors", "r+b") as file:
    file.truncate(file.seek(0, 2) - 1000)
large = packed_model(sys.argv[2], parse_packing("4b-g128"), model_cache(), torch.device("cpu")).folder
(user_data / "models/random-weights").symlink_to(large)
torch.manual_seed(0)
model, _ = ropewalk.load(FOLDER)
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
adapter = peft.get_peft_model(model, config)
for name, parameter in adapter.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(std=0.2)
adapter.save_pretrained(user_data / "loras/style")
shutil.copytree(user_data / "loras/style", user_data / "loras/damaged")
with open(user_data / "loras/damaged/adapter_model.safetensors", "r+b") as file:
    file.truncate(file.seek(0, 2) - 1000)
"""


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


def check(holds, what):
    if not holds:
        raise SystemExit(f"drive_webui: {what}")
    say(f"ok    {what}")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Webui:
    """A running webui, in a process group of its own."""

    def __init__(self, folder, command, log):
        self.port, self.api_port, self._log = free_port(), free_port(), log
        ports = ["--listen-port", str(self.port), "--api", "--api-port", str(self.api_port)]
        self._folder, self._command = folder, [*command, *ports]

    def __enter__(self):
        for _ in range(3):
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdout=self._log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if self._is_up():
                return self
            if "ReadTimeout" not in self.log():  # gradio gives itself 3 s to answer at first, too few on a busy machine
                break
        raise SystemExit(f"drive_webui: webui did not start; see {self._log}")

    def _is_up(self):
        """Wait for webui to answer; return whether it does."""
        ready = "http://127.0.0.1" if "--nowebui" in self._command else "Running on local URL"
        end = time.time() + 180
        while time.time() < end and self._process.poll() is None:
            if ready in self.log():
                time.sleep(8)  # in which gradio looks whether it answers
                if self._process.poll() is None:
                    self.call("/internal/model/info")
                    return True
            time.sleep(0.5)
        return False

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)

    def memory(self):
        """Return how many bytes the process holds."""
        time.sleep(1)
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def call(self, path, body=None):
        """Return the JSON of an answer of the API, or (status, text) of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.api_port}/v1{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        if text.startswith("data:"):
            return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return json.loads(text)

    def complete(self, **settings):
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, **settings}
        return self.call("/completions", body)["choices"][0]

    def chat(self, **settings):
        messages = [{"role": "user", "content": PROMPT}]
        return self.call("/chat/completions", {"messages": messages, "max_tokens": 24, "temperature": 0, **settings})

    def log(self):
        return self._log.read_text()


def check_api(webui):
    """See a model answer, stream, stop, go and come again."""
    check(webui.call("/internal/model/info")["loader"] == "Ropewalk", "the loader is Ropewalk")
    whole = webui.chat()["choices"][0]["message"]["content"]
    chunks = webui.chat(stream=True)
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    check(sum(map(bool, pieces)) > 5 and "".join(pieces).strip() == whole.strip(), f"chat streams: {whole[:60]!r}")
    word = whole.split()[5]
    stopped = webui.chat(stop=[word])["choices"][0]
    check(word not in stopped["message"]["content"] and stopped["finish_reason"] == "stop", f"stops at {word!r}")
    plain = webui.complete()["text"]
    check(webui.call("/internal/model/unload", {}) == "OK", "unloads")
    check(webui.call("/internal/model/info")["model_name"] == "None", "nothing is loaded then")
    check(webui.call("/internal/model/load", {"model_name": "strand"}) == "OK", "loads again, its loader found")
    check(webui.complete()["text"] == plain, "and says the same")
    args = {"loader": "Ropewalk", "rope": "linear:4", "cpu_mode": "exact", "ctx_size": 512}
    check(webui.call("/internal/model/load", {"model_name": "strand", "args": args}) == "OK", "loads with args")
    check("rope linear" in webui.log() and "context 512" in webui.log(), "the rope and the context asked for")
    check(webui.complete()["text"] != plain, "and says something else")
    args = {"loras": ["style"]}
    check(webui.call("/internal/model/load", {"model_name": "strand", "args": args}) == "OK", "loads with a LoRA")
    styled = webui.complete()["text"]
    check(webui.call("/internal/model/info")["lora_names"] == ["style"] and styled != plain, "which changes the text")
    check(webui.call("/internal/lora/unload", {}) == "OK" and webui.complete()["text"] == plain, "and goes again")
    check(webui.call("/internal/lora/load", {"lora_names": ["style"]}) == "OK", "a LoRA by itself")
    check(webui.complete()["text"] == styled, "does the same")
    refused = webui.call("/internal/model/load", {"model_name": "strand-truncated"})
    check(refused[0] == 500 and "the file is truncated" in webui.log(), "a truncated file is refused with a sentence")


def check_memory(webui):
    """See that unloading gives the memory back."""
    webui.call("/internal/model/load", {"model_name": "strand"})  # what is imported stays
    webui.call("/internal/model/unload", {})
    before = webui.memory()
    webui.call("/internal/model/load", {"model_name": "random-weights"})
    loaded = webui.memory()
    webui.call("/internal/model/unload", {})
    after = webui.memory()
    sizes = f"{before / 1e6:.0f} MB, loaded {loaded / 1e6:.0f} MB, unloaded {after / 1e6:.0f} MB"
    check(loaded - before > 3e8 and after - before < 0.1 * (loaded - before), f"memory comes back: {sizes}")


class Page:
    """Webui's page in a browser."""

    def __init__(self, browser, webui, out):
        self._page = browser.new_page(viewport={"width": 1400, "height": 1100})
        self._out, self._count = out, len(list(out.glob("*.png")))
        self._page.goto(f"http://127.0.0.1:{webui.port}")
        expect(self._page.get_by_role("tab", name="Model", exact=True)).to_be_visible(timeout=60_000)

    def shot(self, name, full=False):
        self._count += 1
        self._page.screenshot(path=self._out / f"{self._count:02}-{name}.png", full_page=full)

    def tab(self, name):
        self._page.get_by_role("tab", name=name, exact=True).click()
        self._page.wait_for_timeout(500)

    def choose(self, label, option):
        self._page.get_by_label(re.compile(f"^{re.escape(label)}($|\\W)")).first.click()
        self._page.get_by_role("option", name=option, exact=True).first.click()

    def status(self, text):
        """Wait for what the Model tab says."""
        expect(self._page.get_by_text(text).first).to_be_visible(timeout=180_000)

    def press(self, name):
        self._page.get_by_role("button", name=name, exact=True).first.click()

    def choose_model(self, name, loader="Ropewalk"):
        self.choose("Model", name)
        expect(self._page.get_by_label("Model loader")).to_have_value(loader, timeout=120_000)
        self.status('Settings updated: Click "Load"')

    def fill(self, label, text):
        self._page.get_by_label(re.compile(f"^{label}")).first.fill(text)  # what is said of it is in the label, too
        self._page.keyboard.press("Tab")
        self._page.wait_for_timeout(300)

    def say(self, text):
        """Send a message; return how long the answer was whenever it was looked at."""
        self.tab("Chat")
        box = self._page.locator("#chat-input textarea")
        box.fill(text)
        box.press("Enter")
        lengths, shown = [], False
        answer = self._page.locator("#chat .assistant-message, #chat .message-body").last
        end = time.time() + 60
        while time.time() < end:
            with contextlib.suppress(Exception):
                lengths.append(len(answer.inner_text(timeout=300)))
            if len(set(lengths)) == 6 and not shown:
                self.shot("streaming")
                shown = True
            if len(lengths) > 60 and len(set(lengths[-30:])) == 1:
                break
            time.sleep(0.05)
        return lengths

    def say_and_stop(self, text):
        """Send a message and press Stop once some of the answer is there; return its length then and 3 s later."""
        messages = self._page.locator("#chat .message-body")
        before = messages.count()
        box = self._page.locator("#chat-input textarea")
        box.fill(text)
        box.press("Enter")
        # Stop means nothing to webui before the answer has begun.
        expect(messages).to_have_count(before + 2, timeout=30_000)
        answer = messages.last
        expect(answer).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=30_000)
        self._page.locator("button#stop:visible").first.click(timeout=30_000)  # it has several of that id
        self._page.wait_for_timeout(1500)
        length = len(answer.inner_text())
        self._page.wait_for_timeout(3000)
        return length, len(answer.inner_text())


def drive(page, webui):
    """Choose, load, chat, fail, put a LoRA on, unload."""
    page.tab("Model")
    page.choose_model("strand")
    page.shot("chosen")
    page.press("Load")
    page.status("Successfully loaded strand")
    page.status("partial-ntk")
    page.shot("loaded")
    say("ok    chosen and loaded in the page")
    lengths = page.say(PROMPT)
    check(len(set(lengths)) > 5, f"the answer grows as it comes: {len(set(lengths))} lengths up to {max(lengths)}")
    page.shot("answered")
    stopped, later = page.say_and_stop("In the beginning")
    check(stopped == later < max(lengths) / 2, f"Stop stops it, at {stopped} characters")
    page.tab("Parameters")
    length = page._page.get_by_label("Truncate the prompt up to this length")
    expect(length).to_have_value("1024")
    say("ok    prompts are truncated to 1024 tokens")

    page.tab("Model")
    page.choose_model("random-weights")
    page.press("Load")
    expect(page._page.get_by_text(re.compile(r"Loading [\d.]+ [MG]B of"))).to_be_visible(timeout=60_000)
    page.shot("loading")
    page.status("Successfully loaded random-weights")
    say("ok    the page shows how far loading is")

    page.choose_model("strand-truncated")
    page.press("Load")
    page.status("the file is truncated")
    expect(page._page.get_by_text("Traceback")).to_have_count(0)
    page.shot("refused")
    page.choose_model("strand")
    page.fill("rope", "linear:0")
    page.press("Load")
    page.status("factor: expected a number above 0, found 0")
    page.shot("refused-rope")
    page.fill("rope", "linear:2")
    page.press("Load")
    page.status("rope linear")
    page.fill("rope", "auto")
    page.press("Load")
    page.status("rope partial-ntk")
    say("ok    errors are sentences, and loading goes on after them")

    page._page.get_by_text("See more options").click()
    page.choose("LoRA(s)", "style")
    page._page.keyboard.press("Escape")
    page.press("Apply LoRAs")
    page.status("Successfully applied the LoRAs: style")
    page.shot("lora", full=True)
    check(webui.call("/internal/model/info")["lora_names"] == ["style"], "a LoRA is put on in the page")
    page.choose("LoRA(s)", "damaged")
    page._page.keyboard.press("Escape")
    page.press("Apply LoRAs")
    page.status("Failed to apply the LoRAs")
    expect(page._page.get_by_text("Traceback")).to_have_count(0)
    page.shot("lora-refused", full=True)
    page.press("Unload")
    page.status("Model unloaded")
    page.shot("unloaded")
    check(webui.call("/internal/model/info")["model_name"] == "None", "unloaded in the page")


def look_at_start(page, webui):
    """See the page of a webui that has loaded a model with a LoRA before there was a page."""
    check(webui.call("/internal/model/info")["lora_names"] == ["style"], "the LoRA of --lora is on")
    page.tab("Model")
    expect(page._page.get_by_label("Model loader")).to_have_value("Ropewalk")
    expect(page._page.get_by_label(re.compile("^rope"))).to_have_value("partial-ntk:factor=4,original=256")
    page.shot("started")
    say("ok    the page shows what was given on the command line")


def ropewalk(python, *arguments):
    done = subprocess.run([python, "-m", "ropewalk", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"drive_webui: {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    return done.stdout


def copy_of(webui, folder):
    """Copy a webui, without what is the user's own and large."""
    heavy = shutil.ignore_patterns(".git", "installer_files", "venv", ".venv", "__pycache__", "logs", "cache", "*.lock")
    own = {"models", "loras", "image_models", "extensions"}

    def ignored(path, names):
        inside = set(names) & own if Path(path).name == "user_data" else set()
        return inside | set(heavy(path, names)) | {name for name in names if name == "ropewalk"}

    shutil.copytree(webui, folder, ignore=ignored)
    for name in own:
        (folder / "user_data" / name).mkdir(parents=True, exist_ok=True)
    (folder / "user_data/settings.yaml").unlink(missing_ok=True)


def traces(folder, python):
    """Return what in a webui's folder or its Python goes by our name; its own logs and settings do not count."""
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    ).stdout.strip()
    return [*folder.rglob("*opewalk*"), *Path(site).glob("ropewalk_webui*")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("webui", type=Path, help="its folder")
    parser.add_argument("--python", required=True, help="webui's Python, in which ropewalk and peft are installed")
    parser.add_argument("--out", type=Path, required=True, help="where screenshots and logs go")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    python = shutil.which(args.python) or sys.exit(f"drive_webui: --python: expected a Python, found {args.python!r}")
    python = os.path.abspath(python)
    with tempfile.TemporaryDirectory(prefix="ropewalk-webui-") as temporary:
        folder = Path(temporary, "webui")
        copy_of(args.webui.resolve(), folder)
        subprocess.run([python, "-c", PREPARE, folder / "user_data", LARGE], check=True)
        say("1  the extension alone: python server.py --extensions ropewalk")
        ropewalk(python, "webui", "install", folder)
        command = [python, "server.py", "--extensions", "ropewalk"]
        with Webui(folder, command, out / "extension.log") as webui, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
            drive(Page(browser, webui, out), webui)
            browser.close()
            check_memory(webui)
        say("2  the launcher: ropewalk webui run server.py --loader Ropewalk --model strand")
        command = [python, "-m", "ropewalk", "webui", "run", "server.py", "--loader", "Ropewalk", "--model", "strand"]
        command += ["--lora", "style", "--rope", "partial-ntk:factor=4,original=256"]
        with Webui(folder, command, out / "launcher.log") as webui, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
            look_at_start(Page(browser, webui, out), webui)
            browser.close()
            webui.call("/internal/lora/unload", {})
            check_api(webui)
        say("3  at start: python server.py --loader Ropewalk --model strand --extensions ropewalk")
        ropewalk(python, "webui", "install", folder, "--at-start")
        command = [python, "server.py", "--loader", "Ropewalk", "--model", "strand", "--extensions", "ropewalk"]
        with Webui(folder, [*command, "--nowebui"], out / "at-start.log") as webui:
            check_api(webui)
        ropewalk(python, "webui", "uninstall", folder)
        check(traces(folder, python) == [], "uninstalling leaves no trace")
    say(f"all of it; look at {out}")


if __name__ == "__main__":
    main()
