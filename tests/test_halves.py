"""The output embedding that keeps its 16 bits on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from ropewalk import cpu
from ropewalk.cpu.dense import dense_linear
from ropewalk.loader.checkpoint import open_checkpoint
from ropewalk.loader.half_linear import HalfLinear, keep_half
from ropewalk.loader.load import load
from ropewalk.shipped import FOLDER

HALVES = [torch.float16, torch.bfloat16]


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
    torch.testing.assert_close(again(x.detach()), plain(x.detach()), rtol=0, atol=1e-6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_a_loaded_model_keeps_the_embedding_of_its_file():
    """Whether the shipped model ties its embeddings or not, the logits are those of float32."""
    model, _ = load(FOLDER)
    head = model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    assert isinstance(head, HalfLinear) == (not tied)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = linear(hidden, head.weight.float())
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(ids[:, :2]).logits[0, -1], expected[0, 1], rtol=0, atol=1e-4)


def test_an_untied_head_is_kept_and_saved(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    assert isinstance(loaded.lm_head, HalfLinear)
    assert loaded.lm_head.weight.dtype == torch.float16
    loaded.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_a_tied_head_stays_tied(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    loaded.lm_head = nn.Linear(64, 96, bias=False)
    assert keep_half(loaded, checkpoint)
    loaded.lm_head = nn.Linear(64, 96, bias=False)
    loaded.lm_head.weight = loaded.model.embed_tokens.weight
    assert not keep_half(loaded, checkpoint)
    assert type(loaded.lm_head) is nn.Linear
