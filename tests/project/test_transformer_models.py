"""The pieces of benchmarks/transformer.py: the network twice, its tensors, sentences, figures."""

import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

import jaxmet as jm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import transformer
from transformer_models import sentences, times
from transformer_models.agreement import agreement
from transformer_models.bert import SentenceEncoder, Size, stacked, unstacked
from transformer_models.minilm import linen_variables

TINY = Size(depth=3, width=12, heads=3, inner=20, vocabulary=17, positions=9)


def drawn_tensors(size: Size = TINY) -> dict[str, np.ndarray]:
    """Tensors named and laid out as in PyTorch's BERT, matrices as (outputs, inputs)."""
    rng = np.random.default_rng(0)
    w, tensors = size.width, {}

    def dense(name: str, ins: int, outs: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(size=(outs, ins)) / math.sqrt(ins)
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=outs)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, size=w)
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=w)

    for table, rows in (
        ("word", size.vocabulary),
        ("position", size.positions),
        ("token_type", 2),
    ):
        shape = (rows, w)
        tensors[f"embeddings.{table}_embeddings.weight"] = rng.normal(size=shape)
    norm("embeddings.LayerNorm")
    for i in range(size.depth):
        here = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{here}.attention.{name}", w, w)
        norm(f"{here}.attention.output.LayerNorm")
        dense(f"{here}.intermediate.dense", w, size.inner)
        dense(f"{here}.output.dense", size.inner, w)
        norm(f"{here}.output.LayerNorm")
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def sentence_by_hand(tensors: Any, tokens: np.ndarray, size: Size = TINY) -> np.ndarray:
    """The embedding of one sentence without padding, in float64, head by head."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(1, keepdims=True) + size.epsilon)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(
        "embeddings.LayerNorm", x + t["embeddings.token_type_embeddings.weight"][0]
    )
    each = size.width // size.heads
    for i in range(size.depth):
        here = f"encoder.layer.{i}"
        heads = []
        for h in range(size.heads):
            own = slice(h * each, (h + 1) * each)
            q, k, v = (
                dense(f"{here}.attention.self.{name}", x)[:, own]
                for name in ("query", "key", "value")
            )
            heads.append(scipy.special.softmax(q @ k.T / math.sqrt(each), axis=1) @ v)
        mixed = dense(f"{here}.attention.output.dense", np.concatenate(heads, 1))
        x = norm(f"{here}.attention.output.LayerNorm", x + mixed)
        h = dense(f"{here}.intermediate.dense", x)
        h = h * 0.5 * (1 + scipy.special.erf(h / math.sqrt(2)))
        x = norm(f"{here}.output.LayerNorm", x + dense(f"{here}.output.dense", h))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def padded() -> tuple[np.ndarray, np.ndarray]:
    """Four sentences of 2 to 9 tokens, padded to 9 with a token that has an embedding."""
    lengths = np.array([9, 2, 5, 7])
    tokens = np.random.default_rng(1).integers(0, TINY.vocabulary, (4, 9))
    return tokens.astype(np.int32), np.arange(9) < lengths[:, None]


def test_the_network_is_bert_by_hand(padded: Any) -> None:
    tokens, mask = padded
    tensors = drawn_tensors()
    found = SentenceEncoder(TINY).apply(linen_variables(tensors, TINY), tokens, mask)
    expected = [sentence_by_hand(tensors, row[kept]) for row, kept in zip(tokens, mask)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=2e-6)


def test_scanned_layers_compute_the_same(padded: Any) -> None:
    variables = linen_variables(drawn_tensors(), TINY)
    unrolled = SentenceEncoder(TINY).apply(variables, *padded)
    scanned = SentenceEncoder(TINY, scanned=True)
    found = scanned.apply(stacked(variables), *padded)
    np.testing.assert_allclose(found, unrolled, rtol=0, atol=2e-6)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), *padded)
    ours = jax.eval_shape(lambda: stacked(variables))
    assert ours == shapes


def test_variables_are_stacked_and_taken_apart_again() -> None:
    variables = linen_variables(drawn_tensors(), TINY)
    again = unstacked(stacked(variables))
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_drawn_weights_are_the_same_for_both_networks() -> None:
    unrolled, scanned = (times.drawn(TINY, scanned=s) for s in (False, True))
    jax.tree.map(np.testing.assert_array_equal, stacked(unrolled), scanned)


def test_rows_are_told_apart_by_their_names() -> None:
    names = [row.name for row in [*transformer.rows(), *times.DEPTHS]]
    assert len(names) == len(set(names)) > 30


def test_a_tensor_of_another_network_is_named() -> None:
    tensors = drawn_tensors()
    del tensors["encoder.layer.2.output.dense.bias"]
    with pytest.raises(ValueError, match="encoder.layer.2.output.dense.bias.*no such"):
        linen_variables(tensors, TINY)
    tensors = drawn_tensors() | {"encoder.layer.0.output.dense.weight": np.ones((2, 3))}
    with pytest.raises(ValueError, match=r"shape \(12, 20\); found: \(2, 3\)"):
        linen_variables(tensors, TINY)


@pytest.mark.parametrize("scanned", [False, True])
def test_every_product_of_the_network_is_quantized(scanned: bool, padded: Any) -> None:
    variables = linen_variables(drawn_tensors(), TINY)
    model = SentenceEncoder(TINY, scanned=scanned)
    variables = stacked(variables) if scanned else variables
    graph = jm.trace(model.apply, variables, *padded)
    quantizers = jm.calibrate(
        variables, graph, [padded], mask=lambda batch: batch[1], progress=False
    )
    kernels = [name for name in quantizers.weights if name.endswith("kernel")]
    assert len(kernels) == 6 * (1 if scanned else TINY.depth)


def test_sentences_are_plain_and_apart() -> None:
    ours, others = sentences.calibration(), sentences.evaluation()
    assert len(set(ours)) == 128 and len(set(others)) == 256
    assert not set(ours) & set(others)
    for one in ours + others:
        assert sentences.PLAIN.fullmatch(one) and 12 <= len(one.split()) <= 60
    assert sentences.calibration() == ours


def test_sentences_of_a_text() -> None:
    words = "Eleven more words follow so that this sentence is long enough"
    text = (
        f"{words} here.  Too short.\n\nNotes\n-----\n{words} below.\n\n{words}\nthere."
    )
    assert sentences.sentences([text, text]) == [f"{words} here.", f"{words} there."]


def test_items_are_evenly_spaced() -> None:
    assert sentences.evenly(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    with pytest.raises(ValueError, match="9 sentences are needed, and there are 8"):
        sentences.evenly(list("abcdefgh"), 9)


def test_figures_of_agreement() -> None:
    exact = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    same = agreement(2 * exact, exact)  # another length, the same directions
    assert same.cosine == pytest.approx(1) and same.rank == pytest.approx(1)
    assert same.sqnr == pytest.approx(0)
    assert agreement(exact, exact).sqnr == np.inf
    turned = exact.copy()
    turned[0] = [0.6, 0.8]
    found = agreement(turned, exact)
    assert found.cosine == pytest.approx((0.6 + 1 + 1) / 3)
    assert found.sqnr == pytest.approx(10 * math.log10(23 / 0.8))
    half = math.sqrt(0.5)
    pairs = [0.8, 1.4 * half, half], [0.0, half, half]
    assert found.rank == pytest.approx(scipy.stats.spearmanr(*pairs).statistic)
