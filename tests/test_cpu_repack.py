"""The operators that bring packed weights into the CPU's layout and back, at every level, bit by bit."""

import pytest
import torch

from ropewalk import cpu
from ropewalk.gptq import cpu_layout, cpu_ops  # noqa: F401  the schemas
from ropewalk.gptq.format import BITS, unpack

ops = torch.ops.ropewalk
# Columns: one, parts of a tile, of a stripe of two tiles, of several.
COLUMNS = (1, 31, 32, 40, 64, 72, 96, 129, 200)


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not cpu.load():
        pytest.skip(f"no kernels for the CPU: {cpu.status()['why']}")


@pytest.fixture(params=["avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"])
def level(request):
    if request.param not in ops.cpu_levels():
        pytest.skip(f"this processor has no {request.param}")
    ops.cpu_cap_level(request.param)
    yield request.param
    ops.cpu_cap_level(ops.cpu_levels()[0])


def random_words(bits, k, n):
    return torch.randint(-(2**31), 2**31, (k * bits // 32, n), dtype=torch.int32)


def orders(k):
    """Yield ways to lay k rows into blocks: as they are, shuffled, and with padding anywhere."""
    blocks = -(-k // 32)
    if k % 32 == 0:
        yield None
    for count in (blocks * 32, (blocks + 2) * 32):
        rows = torch.full((count,), -1, dtype=torch.int32)
        rows[torch.randperm(count)[:k].sort().values] = torch.randperm(k).int()
        yield rows


@pytest.mark.parametrize("bits", BITS)
def test_every_size_and_order_is_the_reference_and_comes_back(bits, level):
    torch.manual_seed(0)
    for k in (32, 96, 544) if bits == 3 else (16, 32, 80, 96, 544):
        for n in COLUMNS:
            qweight = random_words(bits, k, n)
            for rows in orders(k):
                blocks = k // 32 if rows is None else len(rows) // 32
                words = ops.cpu_repack(qweight, rows, bits, blocks)
                assert torch.equal(words, cpu_layout.pack_reference(qweight, rows, bits, blocks))
                assert torch.equal(ops.cpu_unpack(words, rows, bits, k, n), qweight)


@pytest.mark.parametrize("bits", BITS)
def test_dequantizes_every_size_and_order(bits, level):
    torch.manual_seed(0)
    k = 96
    for n in COLUMNS:
        qweight, scales = random_words(bits, k, n), torch.rand(3, n)
        zeros = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8)
        for rows in (None, torch.randperm(k).int()):
            words = ops.cpu_repack(qweight, rows, bits, 3)
            group = torch.arange(k) // 32
            if rows is not None:
                group = torch.empty_like(group).index_put((rows.long(),), group)
            for zero in (None, zeros):
                tiles = None if zero is None else cpu_layout.tile_columns(zero)
                found = ops.cpu_dequantize(words, cpu_layout.tile_columns(scales), tiles, rows, bits, 32, k, n)
                less = 1 << (bits - 1) if zero is None else zero[group].int()
                assert torch.equal(found, (unpack(qweight, bits).int() - less).float() * scales[group])


@pytest.mark.parametrize("bits", BITS)
def test_reads_a_view_at_any_offset(bits, level):
    """Files are mapped as they lie: a tensor begins at any multiple of 4 bytes, others before and after it."""
    k, n = 96, 72
    size = k * bits // 32 * n
    file = torch.randint(-(2**31), 2**31, (size + 40,), dtype=torch.int32)
    rows = torch.randperm(k).int()
    for offset in range(1, 18, 3):
        qweight = file[offset : offset + size].view(-1, n)
        for order in (None, rows):
            words = ops.cpu_repack(qweight, order, bits, 3)
            assert torch.equal(words, cpu_layout.pack_reference(qweight, order, bits, 3))
            moved = torch.zeros(words.numel() + offset, dtype=torch.int32)[offset:].view_as(words).copy_(words)
            assert torch.equal(ops.cpu_unpack(moved, order, bits, k, n), qweight)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    qweight, rows = random_words(4, 256, 1000), torch.randperm(256).int()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        words = ops.cpu_repack(qweight, rows, 4, 8)
        back = ops.cpu_unpack(words, rows, 4, 256, 1000)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(words, cpu_layout.pack_reference(qweight, rows, 4, 8))
    assert torch.equal(back, qweight)


def test_wrong_arguments_are_named():
    qweight = random_words(4, 64, 32)
    words = ops.cpu_repack(qweight, None, 4, 2)
    scales = torch.ones(1, 2, 32)
    for message, call in {
        "bits: expected 2, 3, 4 or 8, found 5": lambda: ops.cpu_repack(qweight, None, 5, 2),
        "qweight: expected contiguous int32": lambda: ops.cpu_repack(qweight.t(), None, 4, 2),
        "qweight: expected 3-bit words in threes, found 8": lambda: ops.cpu_repack(qweight, None, 3, 2),
        "rows: expected them where": lambda: ops.cpu_repack(qweight, None, 4, 3),
        "rows: expected 64 int32": lambda: ops.cpu_repack(qweight, torch.arange(64), 4, 2),
        "rows: expected less than 64, found 64": lambda: ops.cpu_repack(qweight, torch.arange(1, 65).int(), 4, 2),
        "words: expected contiguous int32": lambda: ops.cpu_unpack(words, None, 8, 64, 32),
        "in_features: expected a multiple of 8": lambda: ops.cpu_unpack(words, None, 4, 60, 32),
        "group_size: expected": lambda: ops.cpu_dequantize(words, scales, None, None, 4, 0, 64, 32),
        "scales: expected": lambda: ops.cpu_dequantize(words, scales, None, None, 4, -1, 64, 32),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
