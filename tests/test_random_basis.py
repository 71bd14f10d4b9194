"""The basis: the generator's published vectors, an independent decoder, and independence from how it is made."""

import numpy as np
import pytest
import torch

import reference
from nola_vision.adapters.random_basis import (
    Basis,
    _compiled_words,
    _words,
    basis_bytes,
    basis_key,
    buckets,
    combine,
    decode,
    philox4x32,
)

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_its_published_vectors(counter: str, key: str, output: str) -> None:
    words = [int(word, 16) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    made = philox4x32(tuple(torch.tensor([word]) for word in words), (k0, k1))
    assert [int(word) for word in made] == [int(word, 16) for word in output.split()]
    assert [f"{int(w):08x}" for w in reference.philox(np.array(words, np.uint32), (k0, k1))] == output.split()


@pytest.mark.parametrize(("count", "rank", "length"), [(3, 4, 160), (5, 1, 7), (2, 3, 33)])
def test_basis_equals_the_numpy_decoder_bit_for_bit(count: int, rank: int, length: int) -> None:
    made = basis_bytes(basis_key(11, "shape 160x640", "A"), 0, count, rank, length)
    assert np.array_equal(made.numpy(), reference.basis(11, "shape 160x640", "A", count, rank, length))


def test_any_part_is_the_same_whatever_else_is_made() -> None:
    key = basis_key(0, "shape 48x96", "B")
    whole = basis_bytes(key, 0, 40, 4, 96)
    assert torch.equal(basis_bytes(key, 17, 23, 4, 96), whole[17:23])
    assert torch.equal(basis_bytes(key, 0, 8, 4, 96), whole[:8])  # the first k' of a k-basis
    assert torch.equal(basis_bytes(key, 0, 40, 2, 96), whole[:, :2])  # a lower rank


def test_thread_count_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    key, threads = basis_key(0, "shape 768x48", "A"), torch.get_num_threads()
    expected = torch.from_numpy(reference.basis(0, "shape 768x48", "A", 300, 4, 768))  # beyond torch's parallel grain
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(basis_bytes(key, 0, 300, 4, 768), expected)
    finally:
        torch.set_num_threads(threads)
    for words in (1, 1000, 2**14):
        monkeypatch.setattr("nola_vision.adapters.random_basis._BLOCKS_AT_ONCE", words)
        assert torch.equal(basis_bytes(key, 3, 40, 4, 768), expected[3:40])


def test_keys_differ_in_every_part() -> None:
    keys = {basis_key(s, i, f) for s in (0, 1, -1) for i in ("shape 2x3", "weight 2x3") for f in ("A", "B", "A0")}
    assert len(keys) == 18


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = basis_bytes(basis_key(0, "shape 8x8", "A"), 0, 4, 2, 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(basis_bytes(basis_key(0, "shape 8x8", "A"), 0, 4, 2, 8), made)


def test_values_are_exact_and_equal_at_every_precision() -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    exact = (2 * every.double() + 1) / 256
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(decode(every, dtype).double(), exact), dtype
    assert torch.equal(exact, -exact.flip(0))


def test_law_is_uniform_with_variance_one_third() -> None:
    made = basis_bytes(basis_key(3, "shape 64x64", "A"), 0, 256, 4, 64)
    counts = np.bincount(made.numpy().astype(np.int16).ravel() + 128, minlength=256)
    expected = made.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 255 + 5 * np.sqrt(2 * 255)  # 5 sigma of chi-square with 255 degrees of freedom
    flat = decode(made, torch.float64).flatten()
    assert abs(float(flat.mean())) < 5 * (1 / 3 / flat.numel()) ** 0.5
    pairs = float((flat[:-1] * flat[1:]).mean())
    assert abs(pairs) < 5 * (1 / 3) / flat.numel() ** 0.5


@pytest.mark.parametrize("names", [["shape 9x5"], ["weight a", "weight b", "weight c"]], ids=["shared", "per_layer"])
@pytest.mark.parametrize(
    ("storage", "budget"), [("cached", 1), ("cached", 10**9), ("streamed", 1), ("streamed", 10**9)]
)
def test_combine_is_the_matrix_product_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, storage: str, budget: int, names: list[str]
) -> None:
    monkeypatch.setattr("nola_vision.adapters.random_basis._DECODE_BYTES", {"cpu": budget})
    basis = Basis([basis_key(0, name, "A") for name in names], 7, 2, 37, storage, memory_mib=budget / 2**20)
    coefficients = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    dense = np.stack([reference.values(reference.basis(0, name, "A", 7, 2, 37)).reshape(7, -1) for name in names])
    expected = torch.einsum("nlk,lkx->nlx", coefficients, torch.from_numpy(dense).expand(3, 7, 74))
    assert torch.allclose(combine(coefficients, basis), expected, rtol=0, atol=1e-13)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(combine(coefficients, basis), coefficients, upstream)
    by_hand = torch.einsum("nlx,lkx->nlk", upstream, torch.from_numpy(dense).expand(3, 7, 74))
    assert torch.allclose(gradient, by_hand, rtol=0, atol=1e-12)
    # the first coefficients alone are combined with the first matrices
    first = torch.einsum("nlk,lkx->nlx", coefficients[..., :4], torch.from_numpy(dense).expand(3, 7, 74)[:, :4])
    assert torch.allclose(combine(coefficients[..., :4], basis), first, rtol=0, atol=1e-13)


@pytest.mark.slow  # a minute of g++
def test_compiled_code_makes_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    _compiled_words.cache_clear()
    key = basis_key(7, "weight w", "P")
    for rows, positions in (((0, 3), (0, 100)), ((1, 3), (32, 83))):
        plain = basis_bytes(key, 2, 40, 3, 100, rows=rows, positions=positions)
        assert torch.equal(basis_bytes(key, 2, 40, 3, 100, rows=rows, positions=positions, compiled=True), plain)
        expected = reference.basis(7, "weight w", "P", 40, 3, 100)[2:, slice(*rows), slice(*positions)]
        assert np.array_equal(plain.numpy(), expected)
    assert _compiled_words("cpu") is not _words
    _compiled_words.cache_clear()


def test_a_machine_without_a_compiler_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _compiled_words.cache_clear()
    monkeypatch.setattr("nola_vision.adapters.random_basis.shutil.which", lambda _: None)
    try:
        made = basis_bytes(basis_key(0, "w", "P"), 0, 2, 1, 50, compiled=True)
        assert _compiled_words("cpu") is _words
    finally:
        _compiled_words.cache_clear()
    assert torch.equal(made, basis_bytes(basis_key(0, "w", "P"), 0, 2, 1, 50))


def test_buckets_are_as_the_format_page_says() -> None:
    bucket, sign = buckets(basis_key(5, "weight w", "hash"), 1001, 37)
    words = reference.words(5, "weight w", "hash", 1, 1, 501).reshape(-1, 2)[:1001].astype(np.uint64)
    assert np.array_equal(bucket.numpy(), (words[:, 0] * 37 >> 32).astype(np.int64))
    assert np.array_equal(sign.numpy(), np.where(words[:, 1] % 2, -1.0, 1.0))
    assert bucket.min() == 0 and bucket.max() == 36 and abs(float(sign.mean())) < 0.2
