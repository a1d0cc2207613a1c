"""The rotation in plain torch, against transformers' own, and its backward against autograd."""

import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_half

from ropewalk.rope import inverse_frequencies
from ropewalk.rope.reference import cos_sin, rope, rope_backward, rotate


def inputs(dim=32, heads=4, kv_heads=2, batch=2, seq=7, dtype=torch.float32):
    torch.manual_seed(0)
    # As attention has them: transposed views of [batch, seq, heads, dim].
    q = torch.randn(batch, seq, heads, dim).to(dtype).transpose(1, 2)
    k = torch.randn(batch, seq, kv_heads, dim).to(dtype).transpose(1, 2)
    # Left padding, repeats, and positions far out.
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [9, 3, 16383, 5, 5, 0, 100]])[:batch, :seq]
    return q, k, positions


def test_half_rotated_agrees_with_transformers():
    q, k, positions = inputs()
    inv_freq, _ = inverse_frequencies("default", dim=32)
    cos, sin = cos_sin(inv_freq, positions, 1.3)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    kept = q.clone(), k.clone()
    ours = rope(q, k, inv_freq, positions, 1.3)
    for found, expected in zip(ours, apply_half(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])


def test_interleaved_agrees_with_transformers():
    q, k, positions = inputs()
    inv_freq, _ = inverse_frequencies("default", dim=32)
    cos, sin = cos_sin(inv_freq, positions)
    found, _ = rope(q, k, inv_freq, positions, interleaved=True)
    expected = apply_interleaved(q.transpose(1, 2), sin, cos).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_rest_alone(interleaved):
    q, k, positions = inputs()
    inv_freq, _ = inverse_frequencies("default", dim=8)
    turned, _ = rope(q, k, inv_freq, positions, interleaved=interleaved)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    alone, _ = rope(q[..., :8], k[..., :8], inv_freq, positions, interleaved=interleaved)
    assert torch.equal(turned[..., :8], alone)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(interleaved, dtype):
    q, k, positions = inputs(dtype=dtype)
    inv_freq, _ = inverse_frequencies("default", dim=32)
    found = rope(q, k, inv_freq, positions, interleaved=interleaved)
    exact = rope(q.float(), k.float(), inv_freq, positions, interleaved=interleaved)
    assert all(f.dtype == dtype and torch.equal(f, e.to(dtype)) for f, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [32, 12])
def test_backward_agrees_with_autograd(interleaved, dim):
    q, k, positions = inputs()
    inv_freq, _ = inverse_frequencies("default", dim=dim)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = rope(q, k, inv_freq, positions, 1.2, interleaved=interleaved)
    gradients = [torch.randn_like(o) for o in out]
    expected = torch.autograd.grad(out, (q, k), gradients)
    found = rope_backward(*gradients, inv_freq, positions, 1.2, interleaved=interleaved)
    for f, e in zip(found, expected, strict=True):
        # Only the rotated part is scaled by 1.2; the gradient of the rest passes through.
        torch.testing.assert_close(f, e, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_in_float64(interleaved):
    x = torch.randn(1, 2, 3, 10, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rotate(t, angles.cos(), angles.sin(), interleaved=interleaved), (x,))


def test_relative_positions_are_all_that_counts():
    q, k, _ = inputs(batch=1, seq=1)
    inv_freq, _ = inverse_frequencies("partial-ntk", dim=32, factor=4, original_max_position_embeddings=64)

    def score(m, n):
        turned_q, _ = rope(q, k, inv_freq, torch.tensor([[m]]))
        _, turned_k = rope(q, k, inv_freq, torch.tensor([[n]]))
        return (turned_q[:, :2] * turned_k).sum(-1)

    torch.testing.assert_close(score(5, 3), score(105, 103), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(5, 3), score(5, 4))


def test_a_rotary_dim_above_the_head_is_refused():
    with pytest.raises(ValueError, match="at most the head's 8 channels, found 16"):
        rotate(torch.zeros(1, 8), torch.zeros(8), torch.zeros(8))
