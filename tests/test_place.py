"""Which device each module goes to: what accelerate plans, what is refused; a split model computes the same."""

import pytest
import torch

import ropewalk
from ropewalk.errors import NotEnoughMemoryError, UsageError
from ropewalk.loader import place, skeleton
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.rope import decide_rope
from ropewalk.loader.rotary import rope_types


@pytest.fixture
def model(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with rope_types():
        return skeleton.build(checkpoint, decide_rope(checkpoint.config), torch.float32).model


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as planning goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (10**9, 10**9))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_everything_on_one_device(model, no_gpu):
    for device_map in (None, "cpu", torch.device("cpu"), {"": "cpu"}):
        assert place.plan(model, device_map, None, torch.float32) == {"": torch.device("cpu")}


def test_a_gpu_is_taken_where_there_is_one(model, two_gpus):
    assert place.plan(model, None, None, torch.float16) == {"": torch.device("cuda", 0)}
    assert place.plan(model, "cuda:1", None, torch.float16) == {"": torch.device("cuda", 1)}
    assert place.plan(model, 1, None, torch.float16) == {"": torch.device("cuda", 1)}


def size(model, prefix=""):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(
        t.numel() * min(t.itemsize, 2 if t.is_floating_point() else 8) for n, t in tensors if n.startswith(prefix)
    )


def test_auto_counts_the_packed_bytes(model, two_gpus):
    """A GPU that holds the packed model but not an unpacked one takes all of it; one that is smaller takes a part."""
    whole = size(model)
    dense = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    assert dense > 1.5 * whole
    enough = int(1.3 * whole)
    assert set(place.plan(model, "sequential", {0: enough, "cpu": "1GB"}, torch.float16).values()) == {
        torch.device("cuda", 0)
    }
    # The first keeps room for its largest layer, as accelerate has it.
    first = int(size(model, "model.embed_tokens") + 2.5 * size(model, "model.layers.0"))
    placed = place.plan(model, "sequential", {0: first, 1: whole, "cpu": "1GB"}, torch.float16)
    assert set(placed.values()) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert placed["model.layers.0"] == torch.device("cuda", 0)
    assert placed["lm_head"] == torch.device("cuda", 1)


def test_cpu_layers_take_what_does_not_fit(model, two_gpus):
    first = int(size(model, "model.embed_tokens") + 2.5 * size(model, "model.layers.0"))
    placed = place.plan(model, "sequential", {"cuda:0": first, "cpu": "1GB"}, torch.float16)
    assert set(placed.values()) == {torch.device("cuda", 0), torch.device("cpu")}
    find = place.device_of(placed)
    assert find("lm_head.weight") == torch.device("cpu")
    assert find("model.layers.0.mlp.down_proj.qweight") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device_map", "max_memory", "message"),
    [
        ("disk", None, "expected GPUs and cpu, found disk"),
        ({"": "disk"}, None, "packed layers are not offloaded to disk"),
        ({"model": "cpu", "lm_head": "disk"}, None, "found disk for lm_head"),
        ("auto", {"cpu": 30_000}, "found disk for"),
        ("cuda:3", None, r"expected cpu or one of the \d+ GPUs here, found 'cuda:3'"),
        ("tpu", None, "expected cpu, cuda or cuda:N, found 'tpu'"),
        ("xpu", None, "expected cpu, cuda or cuda:N, found 'xpu'"),
        (3.5, None, "expected cpu, cuda or cuda:N, found 3.5"),
        ({"model": "cpu"}, None, "expected a device for every module, found none for lm_head"),
        ({"": "cpu", "model.layerz": "cpu"}, None, "names of modules of LlamaForCausalLM, found 'model.layerz'"),
        ("cpu", {"cpu": "1GB"}, "max_memory: expected device_map auto"),
        ("auto", {"cpu": "much"}, "max_memory"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(model, device_map, max_memory, message):
    with pytest.raises(UsageError, match=message):
        place.plan(model, device_map, max_memory, torch.float32)


def test_too_little_memory_is_found_before_anything_is_read(tmp_path, make_checkpoint, monkeypatch, no_gpu):
    make_checkpoint(tmp_path)
    monkeypatch.setattr(place, "free_memory", lambda: 50_000)
    monkeypatch.setattr("ropewalk.loader.fill.fill", lambda *_: pytest.fail("read"))
    with pytest.raises(NotEnoughMemoryError, match=r"memory of cpu: expected 0\.00 GB free, found 0\.00 GB") as caught:
        ropewalk.load(tmp_path)
    assert caught.value.needed > caught.value.free == 50_000


def test_free_memory_is_what_a_container_leaves(tmp_path):
    for name, text in {
        "memory.max": "1000000",
        "memory.current": "600000",
        "memory.stat": "anon 5\ninactive_file 100000\nactive_file 50000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert place._left_of_limit(str(tmp_path)) == 550_000
    (tmp_path / "memory.max").write_text("max")
    assert place._left_of_limit(str(tmp_path)) > 1 << 60
    assert 0 < place.free_memory() < 1 << 60


def test_a_model_over_several_devices_computes_the_same(tmp_path, make_checkpoint, no_gpu):
    """Here both are the CPU by two names, which gets the model the hooks of a split one."""
    make_checkpoint(tmp_path)
    whole, _ = ropewalk.load(tmp_path)
    split, _ = ropewalk.load(tmp_path)
    one, other = torch.device("cpu"), torch.device("cpu", 0)
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    place.dispatch(split, dict(zip(names, (one, one, other, other, one, other), strict=True)))
    assert split.hf_device_map["model.layers.1"] == "cpu:0"
    assert hasattr(split.model.layers[1], "_hf_hook")
    assert not any(t.is_meta for t in split.state_dict().values())  # nothing was offloaded
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(ids).logits)
    made = split.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, whole.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_on_the_cpu_compute_there(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    placed = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    model, _ = ropewalk.load(tmp_path, device_map={**placed, "model.rotary_emb": 0}, dtype="float16")
    devices = {n: m.qweight.device.type for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {d for n, d in devices.items() if n.startswith("model.layers.1.")} == {"cpu"}
    assert {d for n, d in devices.items() if n.startswith("model.layers.0.")} == {"cuda"}
    whole, _ = ropewalk.load(tmp_path, device_map="cuda", dtype="float16")
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        found, expected = model(ids).logits, whole(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_last_layers_on_the_cpu(model, two_gpus):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    placed = place.plan(model, "cpu-layers:1", None, torch.float16)
    assert placed["model.layers.0"] == placed["model.embed_tokens"] == placed["model.norm"] == placed["lm_head"] == gpu
    assert placed["model.layers.1"] == cpu
    find = place.device_of(placed)
    assert {find(name) for name, _ in model.named_parameters() if ".layers.1." in name} == {cpu}
    assert set(place.plan(model, "cpu-layers:0", None, torch.float16).values()) == {gpu}
    for count in ("3", "-1", "x", ""):
        with pytest.raises(UsageError, match="expected 0 to 2 layers on the CPU, found"):
            place.plan(model, f"cpu-layers:{count}", None, torch.float16)
