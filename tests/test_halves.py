"""Embeddings that keep their 16 bits on the CPU."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from ropewalk import cpu
from ropewalk.cpu.dense import dense_linear
from ropewalk.loader.halves import HalfEmbedding, HalfLinear
from ropewalk.loader.load import load

HALVES = [torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")


@pytest.fixture(autouse=True)
def best_level():
    yield
    torch.ops.ropewalk.cpu_cap_level(torch.ops.ropewalk.cpu_levels()[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), [(257, 320), (3, 33), (64, 31), (1, 1), (100, 2048)])
def test_products_are_those_of_float32_and_alike_at_every_level(dtype, n, k):
    weight = torch.randn(n, k).to(dtype)
    for m in (1, 2, 5):
        x = torch.randn(m, k)
        expected = linear(x.double(), weight.double())
        bound = 2 * (linear(x, weight.float()).double() - expected).abs().max() + 1e-6 * expected.abs().max()
        found = []
        for level in torch.ops.ropewalk.cpu_levels():
            torch.ops.ropewalk.cpu_cap_level(level)
            found.append(dense_linear(x, weight))
            assert (found[-1].double() - expected).abs().max() <= bound
        assert all(torch.equal(found[0], other) for other in found)
        # A row does not depend on the others.
        assert torch.equal(torch.cat([dense_linear(row[None], weight) for row in x]), found[0])


def test_threads_do_not_matter():
    weight, x = torch.randn(3000, 512).half(), torch.randn(512)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(dense_linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_wrong_arguments_are_named():
    weight = torch.randn(8, 32).half()
    for x, w, what in (
        (torch.randn(1, 32).double(), weight, "x: expected float32"),
        (torch.randn(1, 31), weight, r"weight: expected contiguous float16 or bfloat16 \[N, 31\]"),
        (torch.randn(1, 32), weight.float(), "weight: expected contiguous float16"),
        (torch.randn(1, 32), weight[:, ::1].t().contiguous().t(), "weight: expected contiguous float16"),
    ):
        with pytest.raises(RuntimeError, match=what):
            dense_linear(x, w)


def test_the_operator_is_whole():
    torch.library.opcheck(torch.ops.ropewalk.cpu_dense_linear, (torch.randn(2, 32), torch.randn(8, 32).half()))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_layer_takes_what_a_linear_layer_takes(dtype):
    layer = HalfLinear(torch.randn(40, 32).to(dtype), torch.randn(40).to(dtype))
    plain = nn.Linear(32, 40)
    plain.load_state_dict({name: t.float() for name, t in layer.state_dict().items()})
    for x in (torch.randn(32), torch.randn(2, 3, 32), torch.randn(50, 32), torch.randn(0, 32)):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5)
    assert layer(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(2, 32), rtol=0, atol=1e-5)
    again = copy.deepcopy(layer).float()
    torch.testing.assert_close(again(x.detach()), plain(x.detach()), rtol=0, atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_an_embedding_gives_the_vectors_of_float32():
    weight = torch.randn(20, 8).half()
    layer = HalfEmbedding(weight, 3, torch.float32)
    ids = torch.tensor([[1, 3], [19, 0]])
    assert torch.equal(layer(ids), weight.float()[ids])
    assert layer.half()(ids).dtype == torch.float16
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float16
    assert torch.equal(copy.deepcopy(layer).float()(ids), weight.float()[ids])


def test_a_loaded_model_keeps_the_embeddings_of_its_file(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    model, _ = load(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, HalfLinear)
    assert isinstance(embedding, HalfEmbedding)
    assert head.weight.dtype == embedding.weight.dtype == torch.float16
    assert model.dtype == torch.float32
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = linear(hidden, head.weight.float())
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(ids[:, :2]).logits[0, -1], expected[0, 1], rtol=0, atol=1e-4)


def test_tied_embeddings_share_one_weight(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = load(tmp_path)
    assert isinstance(model.lm_head, HalfLinear)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
