"""Every attention kernel against softmax in float64, for each kind of mask it takes."""

import pytest
import torch

import dit.attention as kernels
from dit.attention import Segments, attention, varlen_rows

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this kernel needs CUDA")


def reference(q, k, v, visible):
    """softmax(q k^T / sqrt(d)) v in float64, visible (b n m)."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights.nan_to_num(), v)


def case(kind, dtype, device=CPU, clips=2):
    """q, k, v, the mask to give, and which keys each query sees."""
    g = torch.Generator().manual_seed(0)
    b, n, m, d = 1 if kind == "segments" else clips, 12, 9, 16
    q, k, v = (torch.randn(b, 3, size, d, generator=g, dtype=dtype) for size in (n, m, m))
    q, k, v = (x.to(device) for x in (q, k, v))
    if kind == "none":
        return q, k, v, None, torch.ones(b, n, m, dtype=torch.bool)
    if kind == "mask":
        mask = torch.ones(b, m, dtype=torch.bool)
        mask[1, 4:] = False
        return q, k, v, mask[:, None, None].to(device), mask[:, None].expand(b, n, m)
    segments = Segments([5, 1, 6], [3, 2, 4], device)
    visible = segments.q_ids[:, None] == segments.k_ids
    return q, k, v, segments, visible[None].cpu()


KINDS = ["none", "mask", "segments"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kernels_of_the_cpu(kind, backend, dtype, tolerance):
    *qkv, mask, visible = case(kind, dtype)
    qkv = [x.requires_grad_() for x in qkv]
    got, expected = attention(*qkv, mask, backend), reference(*qkv, visible)
    assert expected.abs().max() > 0.5
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((got * weight).sum(), qkv)
    for mine, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), qkv)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_flex_on_the_cpu(kind):
    *qkv, mask, visible = case(kind, torch.float32)
    got, expected = attention(*qkv, mask, "flex"), reference(*qkv, visible)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="flex has no gradients on a CPU; use auto"):
        attention(qkv[0].requires_grad_(), *qkv[1:], mask, "flex")


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa", "varlen", "flex"])
def test_kernels_of_the_gpu(kind, backend):
    """bfloat16 against float64: three decimals, forwards and backwards."""
    *qkv, mask, visible = case(kind, torch.bfloat16, torch.device("cuda"))
    qkv = [x.requires_grad_() for x in qkv]
    got, expected = attention(*qkv, mask, backend), reference(*qkv, visible.cuda())
    torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((got.double() * weight).sum(), qkv)
    for mine, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), qkv)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_that_varlen_is_given(monkeypatch, kind):
    """Its kernel needs a GPU; what surrounds it is tested with one that keeps torch's contract."""
    import torch.nn.attention.varlen as varlen

    def by_runs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
        assert max_q >= cu_seq_q.diff().max()
        assert max_k >= cu_seq_k.diff().max()
        runs = []
        for i in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
            scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
            runs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), v))
        return torch.cat(runs)

    monkeypatch.setattr(varlen, "varlen_attn", by_runs)
    *qkv, mask, visible = case(kind, torch.float64)
    expected = reference(*qkv, visible)
    torch.testing.assert_close(varlen_rows(*qkv, mask), expected, atol=1e-12, rtol=1e-12)


def test_varlen_says_what_it_needs():
    *qkv, mask, _ = case("segments", torch.float32)
    with pytest.raises(ValueError, match="varlen got float32 with head size 16 on cpu; it needs"):
        attention(*qkv, mask, "varlen")


def test_auto_is_plain_for_few_keys_on_a_cpu(monkeypatch):
    used = []
    monkeypatch.setattr(kernels, "_plain", lambda q, k, v, mask: used.append(k.shape[2]) or q)
    q = torch.randn(1, 1, 4, 8)
    for m in (512, 513):
        attention(q, *torch.randn(2, 1, 1, m, 8).unbind(0))
    segments = Segments([2, 2], [512, 88], CPU)
    attention(q, *torch.randn(2, 1, 1, 600, 8).unbind(0), segments)
    assert used == [512, 512, 88]  # every run chooses for itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [1, 12 * 9 * 2, 12 * 9 * 4, 12 * 9 * 5])
@pytest.mark.parametrize("clips", [2, 7])  # more pieces than the three heads, too
def test_plain_attention_in_pieces(monkeypatch, kind, scores, clips):
    """A head at a time, two heads of a clip, one clip with a rest, ..."""
    *qkv, mask, visible = case(kind, torch.float64, clips=clips)
    monkeypatch.setattr(kernels, "CPU_PLAIN_SCORES", scores)
    expected = reference(*qkv, visible)
    got = attention(*qkv, mask, "plain")
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_bfloat16_on_the_cpu():
    """Two to three decimals, forwards and backwards, under autocast as well."""
    for backend in ("plain", "sdpa"):
        *qkv, mask, visible = case("mask", torch.bfloat16)
        qkv = [x.requires_grad_() for x in qkv]
        with torch.autocast("cpu", torch.bfloat16):
            got = attention(*qkv, mask, backend)
        expected = reference(*qkv, visible)
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2)
        weight = torch.randn_like(expected)
        gradients = torch.autograd.grad((got.double() * weight).sum(), qkv)
        for mine, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), qkv)):
            torch.testing.assert_close(mine, wanted, atol=5e-2, rtol=5e-2)


def test_a_run_without_keys_gives_zeros():
    q, k, v = (torch.randn(1, 2, size, 8) for size in (4, 3, 3))
    for backend in ("plain", "sdpa"):
        y = attention(q, k, v, Segments([1, 3], [0, 3], CPU), backend)
        assert y[:, :, :1].abs().max() == 0
        assert y[:, :, 1:].abs().min() > 0
