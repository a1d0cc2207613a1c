"""What several tests share: small models of real architectures, packed into folders as the Hub has them."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ropewalk.gptq.format import dequantize, is_sequential, zeros_v1_to_v2
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.rotary import register_rope_types
from ropewalk.shipped import FOLDER

# The bounds of the tests are those of exact arithmetic; what int8 activations cost has tests of its own.
os.environ.setdefault("ROPEWALK_CPU_MODE", "exact")

WEBUI = Path(__file__).parent / "webui_stand_in"

# Whether Triton's interpreter runs the kernels of this process; that is settled when triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests of Triton kernels out where there is neither a GPU nor the interpreter: test_interpreted.py
    runs them in processes of their own.
    """
    if collection_path.match("test_*_triton*.py") and not INTERPRETED and not torch.cuda.is_available():
        return True
    return None


if INTERPRETED:
    from triton.runtime import interpreter

    seen: set[str] = set()
    call = interpreter.InterpretedFunction.__call__

    def call_within_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function of a kernel. Before each call Triton puts its interpreted language where the function's
        module looks for it, which takes a third of the time of all that is interpreted; but it is there already, by
        the kernel or by the first call, which never takes it back.
        """
        if self.fn.__module__ not in seen:
            seen.add(self.fn.__module__)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_within_a_kernel


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Give each of the processes of `pytest -n` its share of the processors, and so what it starts.

    Without it the threads of one wait, spinning, for others that the threads of the next keep from their core.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // len(specs))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch have two threads or more, however many processes share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device() -> str:
    """Return where Triton kernels are tested: a GPU, or the CPU through Triton's interpreter."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1")
    return "cuda"


# The configs of the models that this project is about, made small: the same ratios of heads, the same rope.
CONFIGS: dict[str, dict[str, Any]] = {
    # airophin-13b-pntk-16k: multi-head, partial NTK that the config does not name
    "airophin": {
        "model_type": "llama",
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 128,
        "rope_scaling": None,
    },
    # Airoboros-c34B: grouped-query attention, theta 1e6, no scaling
    "codellama": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    # llama2-13b-orca-8k-3319
    "orca": {
        "model_type": "llama",
        "max_position_embeddings": 128,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    # biases on q, k and v
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "max_position_embeddings": 128},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, "max_position_embeddings": 128},
    # airoboros-mpt-30b-gpt4-1p4: ALiBi, q, k and v in one layer, tied embeddings, the config of MPT's own code of 2023
    "mpt": {
        "model_type": "mpt",
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "auto_map": {
            "AutoConfig": "configuration_mpt.MPTConfig",
            "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
        },
        "d_model": 96,
        "emb_pdrop": 0,
        "embedding_fraction": 1.0,
        "expansion_ratio": 4,
        "init_config": {"fan_mode": "fan_in", "init_div_is_residual": True, "name": "kaiming_normal_", "verbose": 0},
        "init_device": "cpu",
        "learned_pos_emb": True,
        "logit_scale": None,
        "loss_fn": "fused_crossentropy",
        "max_seq_len": 128,
        "n_heads": 2,
        "n_layers": 2,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0,
        "tokenizer_name": "mosaicml/mpt-30b",
        "torch_dtype": "float16",
        "transformers_version": "4.30.2",
        "use_cache": False,
        "verbose": 0,
        "vocab_size": 96,
    },
    # bagel-8x7b-v0.2: two of eight experts, grouped queries, theta 1e6
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    },
    # Qwen1.5-MoE-A2.7B: experts that all tokens share beside those that are chosen
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "num_experts": 6,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 128,
        "rope_theta": 1000000.0,
    },
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}


# How the Hub calls the MLP of a layer and gate, up and down of its experts, which transformers 5 keeps stacked.
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def config_of(arch: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return config.json of one of CONFIGS, with some of it changed."""
    # MPT has names of its own for its sizes.
    return {**({} if arch == "mpt" else SIZES), **CONFIGS[arch], **(sizes or {})}


def to_hub(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a state dict of transformers 5 as checkpoints have it: experts one by one, tied tensors once."""
    mlp, (gate, up, down) = EXPERT_NAMES.get(config["model_type"], ("mlp", ("", "", "")))
    found = {}
    for name, tensor in weights.items():
        name = name.replace(".mlp.", f".{mlp}.")
        experts = name.rpartition(".")[0]
        if name.endswith(".gate_up_proj"):
            for i, (first, second) in enumerate(t.chunk(2) for t in tensor):
                found |= {f"{experts}.{i}.{gate}.weight": first, f"{experts}.{i}.{up}.weight": second}
        elif name.endswith(".experts.down_proj"):
            found |= {f"{experts}.{i}.{down}.weight": t for i, t in enumerate(tensor)}
        elif not (name == "lm_head.weight" and config["model_type"] == "mpt"):
            found[name] = tensor
    return found


def from_hub(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what `to_hub` was given."""
    mlp, (gate, up, down) = EXPERT_NAMES.get(config["model_type"], ("mlp", ("", "", "")))
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in weights.items():
        name = name.replace(f".{mlp}.", ".mlp.")
        experts, is_expert, rest = name.partition(".experts.")
        if is_expert:
            number, part, _ = rest.split(".")
            stacks.setdefault(f"{experts}.experts", {}).setdefault(int(number), {})[part] = tensor
        else:
            found[name] = tensor
    for experts, stack in stacks.items():
        each = [stack[i] for i in range(len(stack))]
        found[f"{experts}.gate_up_proj"] = torch.stack([torch.cat([e[gate], e[up]]) for e in each])
        found[f"{experts}.down_proj"] = torch.stack([e[down] for e in each])
    if config["model_type"] == "mpt":
        found["lm_head.weight"] = found["transformer.wte.weight"]
    return found


def build_plain(config: dict[str, Any], seed: int = 0) -> Any:
    """Return a float16 model with weights large enough that a wrong one shows."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.half().eval()


@pytest.fixture(scope="session")
def make_plain() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that writes airophin as its makers published it in float16, with the frequencies that
    transformers persisted at the time in the file; it returns the weights in float32.
    """

    def make(folder: Path) -> dict[str, torch.Tensor]:
        config = config_of("airophin")
        weights = {name: tensor.contiguous() for name, tensor in build_plain(config).state_dict().items()}
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
        save_file({**weights, **old}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return {name: tensor.float() for name, tensor in weights.items()}

    return make


@pytest.fixture(scope="session")
def make_float_model() -> Callable[..., tuple[dict[str, Any], Any, dict[str, torch.Tensor]]]:
    """Return a function from one of CONFIGS to its config.json, a float16 model of it, and its weights as checkpoints
    have them.
    """

    def make(arch: str, **sizes: Any) -> tuple[dict[str, Any], Any, dict[str, torch.Tensor]]:
        config = config_of(arch, sizes)
        model = build_plain(config)
        return config, model, {name: t.contiguous() for name, t in to_hub(model.state_dict(), config).items()}

    return make


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., dict[str, torch.Tensor]]:
    """Return a function that writes a packed checkpoint and returns the dequantized weights, float32, under the
    names of the checkpoint.
    """

    def make(
        folder: Path,
        arch: str = "airophin",
        *,
        bits: int = 4,
        group_size: int = 32,
        sym: bool = True,
        desc_act: bool = True,
        checkpoint_format: str = "gptq",
        file: str = "model.safetensors",
        config_in: str = "quantize_config.json",
        with_g_idx: bool = True,
        extra: dict[str, torch.Tensor] | None = None,
        seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(arch, sizes)
        model = build_plain(config, seed)
        tensors: dict[str, torch.Tensor] = {}
        plain: dict[str, torch.Tensor] = {}
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        # A router is a Linear of its own in transformers 4, with which AutoGPTQ runs.
        linear -= {n for n in linear if n.endswith(("lm_head", "shared_expert_gate", ".gate"))}
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in to_hub(model.state_dict(), config).items():
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or (layer not in linear and ".experts." not in layer):
                tensors[name] = tensor.contiguous()
                plain[name] = tensor.float()
                continue
            order = torch.randperm(tensor.shape[1], generator=generator) if desc_act else None
            packed = quantize_rtn(
                tensor, bits=bits, group_size=group_size, sym=sym, order=order, checkpoint_format=checkpoint_format
            )
            plain[name] = dequantized(packed, bits, group_size, checkpoint_format).t().contiguous()
            for part, value in packed.items():
                if part != "g_idx" or with_g_idx:
                    tensors[f"{layer}.{part}"] = value.contiguous()
        save_file({**tensors, **(extra or {})}, folder / file)
        settings = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym, "damp_percent": 0.01}
        if checkpoint_format != "gptq":
            settings["checkpoint_format"] = checkpoint_format
        if config_in == "config.json":
            config["quantization_config"] = {**settings, "quant_method": "gptq"}
        elif config_in:
            (folder / config_in).write_text(json.dumps(settings))
        architecture = type(model).__name__
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        return plain

    return make


def dequantized(packed: dict[str, torch.Tensor], bits: int, group_size: int, checkpoint_format: str) -> torch.Tensor:
    """Return the float32 [K, N] weight of packed tensors."""
    qzeros = packed["qzeros"]
    return dequantize(
        packed["qweight"],
        packed["scales"],
        zeros_v1_to_v2(qzeros, bits) if checkpoint_format == "gptq" else qzeros,
        None if is_sequential(packed["g_idx"], group_size) else packed["g_idx"],
        bits=bits,
        group_size=group_size,
    )


@pytest.fixture(scope="session")
def dequantized_folder() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function from a folder to its weights, float32, as `make_checkpoint` returns them."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        settings = json.loads((folder / "quantize_config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        for layer in [name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")]:
            packed = {part: weights.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
            version = settings.get("checkpoint_format", "gptq")
            weights[f"{layer}.weight"] = dequantized(packed, settings["bits"], settings["group_size"], version).t()
        return {name: tensor.float().contiguous() for name, tensor in weights.items()}

    return read


@pytest.fixture(scope="session")
def reference_model() -> Callable[..., Any]:
    """Return a function that builds the plain float32 transformers model of a folder from dequantized weights,
    with the rotary embedding that `rope_parameters` name.
    """

    def build(folder: Path, weights: dict[str, torch.Tensor], rope_parameters: dict[str, Any] | None = None) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        register_rope_types()
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("quantization_config", None)
        raw.pop("auto_map", None)
        if rope_parameters is not None:
            raw.pop("rope_scaling", None)
            raw["rope_parameters"] = rope_parameters
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[raw["model_type"]].from_dict(raw), dtype=torch.float32)
        model.load_state_dict(from_hub(weights, raw))
        return model.eval()

    return build


@pytest.fixture
def shipped() -> Path:
    """Return the folder of the model that ships with the package."""
    return FOLDER


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.execve(arguments[0], arguments, environment)

    def read_until(self, text: str, seconds: float = 120) -> str:
        """Return what it prints up to a text."""
        found, end = "", time.monotonic() + seconds
        while text not in found:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"expected {text!r} after {found[-500:]!r}"
            found += os.read(self._terminal, 1 << 16).decode(errors="replace")
        return found

    def type(self, text: str) -> None:
        """Type something, control characters among it."""
        os.write(self._terminal, text.encode())

    def close(self) -> None:
        """End the program, whatever it does."""
        os.close(self._terminal)
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


@pytest.fixture
def in_terminal() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts a program in a terminal, from its arguments and environment; it ends by itself."""
    started: list[Terminal] = []

    def start(arguments: list[str], environment: dict[str, str] | None = None) -> Terminal:
        started.append(Terminal([sys.executable, *arguments], environment or dict(os.environ)))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


@pytest.fixture
def webui_folder(tmp_path: Path, shipped: Path) -> Path:
    """Return the folder of a webui, as far as the stand-in is one, with the small model in it."""
    copy = tmp_path / "webui"
    shutil.copytree(WEBUI, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "loras", "extensions", "instruction-templates"):
        (copy / "user_data" / name).mkdir(parents=True)
    (copy / "extensions").mkdir()
    shutil.copytree(shipped, copy / "user_data/models/strand")
    return copy
