"""What embeddings are worth, against naive loops and cases made by hand."""

import builtins
import re

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from sklearn.linear_model import LogisticRegression

import rinsx as rx
from rinsx.transfer import _rank, _zero_shot


#
# Embeddings
#


class Twice(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return jnp.tanh(x @ self.weight)


def looped():
    return rx.recur(Twice(jr.normal(jr.key(0), (4, 4))), rx.Loop(2, max=4), name="r")


def vectors_of(model, batch, key):
    return model(batch["images"])


def by_hand(model, images, rounds):
    x = np.asarray(images, np.float64)
    for _ in range(rounds):
        x = np.tanh(x @ np.asarray(model.blocks["A"].weight, np.float64))
    return x


def batches(number, rows=8, **more):
    rng = np.random.default_rng(0)
    made = []
    for i in range(number):
        images = rng.normal(size=(rows, 4)).astype(np.float32)
        made.append({"images": images, **{name: values[i] for name, values in more.items()}})
    return made


@pytest.mark.parametrize("mesh", [False, True])
def test_embeds_every_row_that_counts_at_every_depth(mesh):
    weights = np.array([[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0.5, 0, 0, 0, 0]], np.float32)
    # Of more bits than float32 has.
    labels = np.array([[3, -1, 2**31 - 1, -(2**31), 4, 65535, 65536, 2**24 + 1], range(8)], np.int32)
    data = batches(2, weights=weights, labels=labels)
    model, mesh = looped(), rx.train.mesh() if mesh else None
    placed = model if mesh is None else rx.train.place(model, mesh)
    found = rx.transfer.embed(placed, vectors_of, data, rounds={"r": [1, 3]}, mesh=mesh)
    keep = weights.reshape(-1) > 0
    assert set(found.vectors) == {(1,), (3,)}
    for (rounds,), vectors in found.vectors.items():
        want = by_hand(model, np.concatenate([batch["images"] for batch in data]), rounds)[keep]
        assert vectors.dtype == np.float32 and vectors.shape == want.shape == (10, 4)
        assert np.allclose(vectors, want, atol=1e-5)
    assert found.labels is not None and found.labels.dtype == np.int32
    assert found.labels.tolist() == labels.reshape(-1)[keep].tolist()


def test_embeds_without_weights_labels_or_rounds():
    data = batches(3, rows=2)
    found = rx.transfer.embed(looped(), vectors_of, data)
    want = by_hand(looped(), np.concatenate([batch["images"] for batch in data]), 2)
    assert list(found.vectors) == [()] and found.labels is None
    assert np.allclose(found.vectors[()], want, atol=1e-5)


def test_one_program_serves_every_depth_and_every_call():
    traced = []

    def fn(model, batch, key):
        traced.append(None)
        return model(batch["images"]).astype(jnp.bfloat16)

    for _ in range(2):
        found = rx.transfer.embed(looped(), fn, batches(3), rounds={"r": [1, 2, 4]})
        assert all(vectors.dtype == np.float32 for vectors in found.vectors.values())
    assert len(traced) == 1


def test_embed_gives_a_key():
    fn = lambda model, batch, key: jr.uniform(key, (8, 2))
    give = lambda seed: rx.transfer.embed(None, fn, batches(2), key=jr.key(seed)).vectors[()]
    assert np.array_equal(give(0), give(0)) and not np.array_equal(give(0), give(1))
    assert len(np.unique(give(0))) == 32


def test_parts_of_an_evaluation_put_together_are_the_whole():
    """Processes that share out the batches, each embedding its rows alone."""
    pairs = rx.data.Pairs(rx.data.digits(), rx.data.Pixels(8)).subset(range(50))
    weight = jr.normal(jr.key(0), (192, 5))
    fn = lambda weight, batch, key: batch["images"].reshape(-1, 192) @ weight
    embed = lambda *shard: rx.transfer.embed(weight, fn, rx.data.evaluation(pairs, 16, shard=shard))
    whole, together, labels = embed(0, 1), np.full((50, 5), np.nan), np.full(50, -1)
    for i in range(4):
        rows = np.array([row for row in range(50) if row % 16 // 4 == i])
        part = embed(i, 4)
        together[rows], labels[rows] = part.vectors[()], part.labels
    assert np.allclose(together, whole.vectors[()], atol=1e-5)
    assert np.array_equal(labels, whole.labels)
    assert np.array_equal(labels, rx.data.digits().labels[:50])


def test_embed_refuses():
    embed = lambda fn, data: rx.transfer.embed(looped(), fn, data)
    with pytest.raises(ValueError, match=r"floating-point embeddings, \[rows, d\]; got float32\[8\]"):
        embed(lambda m, b, k: m(b["images"])[:, 0], batches(1))
    with pytest.raises(ValueError, match=r"floating-point embeddings, \[rows, d\]; got int32\[8, 4\]"):
        embed(lambda m, b, k: b["images"].astype(int), batches(1))
    with pytest.raises(ValueError, match=r"a row for each of batch\['weights'\]; got 8 rows, and the shape \(7,\)"):
        embed(vectors_of, batches(1, weights=np.ones((1, 7), np.float32)))
    with pytest.raises(ValueError, match=r"a row for each of batch\['labels'\]; got 8 rows, and the shape \(3,\)"):
        embed(vectors_of, batches(1, labels=np.ones((1, 3), np.int32)))
    with pytest.raises(TypeError, match="must be integers; got float32"):
        embed(vectors_of, batches(1, labels=np.ones((1, 8), np.float32)))
    with pytest.raises(TypeError, match="must be a dict of arrays; got tuple"):
        embed(lambda m, b, k: b[0], [(np.ones((8, 4), np.float32),)])
    with pytest.raises(ValueError, match="no batches"):
        embed(vectors_of, [])


#
# Zero-shot classification
#


def test_classifier_is_the_ensemble_of_unit_vectors():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 4, 5)).astype(np.float32) * rng.uniform(0.1, 10, size=(3, 4, 1)).astype(np.float32)
    weights = rx.transfer.classifier(vectors)
    assert weights.dtype == np.float32
    for c in range(3):
        total = sum(v / np.sqrt(sum(float(x) ** 2 for x in v)) for v in vectors[c].astype(np.float64)) / 4
        assert np.allclose(weights[c], total / np.sqrt(sum(x**2 for x in total)), atol=1e-6)
    # Long templates count no more than short ones.
    assert np.allclose(rx.transfer.classifier(jnp.asarray(vectors) * 7), weights, atol=1e-6)


def test_classifier_refuses():
    good = np.ones((2, 2, 3))
    opposite = good.copy()
    opposite[1, 1] *= -5
    with pytest.raises(ValueError, match="the mean embedding must .* not 0; got .* of class 1\\.$"):
        rx.transfer.classifier(opposite)
    # The same in directions whose unit vectors are rounded.
    v = np.random.default_rng(0).normal(size=(1, 1, 7))
    with pytest.raises(ValueError, match="the mean embedding"):
        rx.transfer.classifier(np.concatenate([v, -3.3 * v], axis=1).astype(np.float32))
    for bad in (0, np.nan, np.inf):
        vectors = good.copy()
        vectors[0, 1] = bad
        with pytest.raises(ValueError, match="an embedding must .* of class 0, template 1"):
            rx.transfer.classifier(vectors)
    with pytest.raises(ValueError, match="at least one class and one template"):
        rx.transfer.classifier(np.ones((2, 0, 3)))
    say = r"`vectors` must be \[classes, templates, d\]; add an axis for one template; got the shape"
    for shape in ((2, 3), (2, 1, 1, 3)):
        with pytest.raises(ValueError, match=f"{say} {re.escape(str(shape))}"):
            rx.transfer.classifier(np.ones(shape))


def test_zero_shot_by_hand():
    images = np.array([[3.0, 2, 1], [1, 3, 2], [0, 0, 1]])
    labels = np.array([0, 0, 2])
    zero_shot = lambda k, images=images: rx.transfer.zero_shot(images, np.eye(3), labels, k).tolist()
    assert zero_shot(1) == [True, False, True]
    assert zero_shot(2) == [True, False, True]
    assert zero_shot(3) == [True, True, True]
    # A tie is lost, and so is what is no number.
    assert zero_shot(1, np.ones((3, 3))) == zero_shot(2, np.ones((3, 3))) == [False] * 3
    assert zero_shot(1, np.full((3, 3), np.nan)) == [False] * 3


def test_zero_shot_refuses():
    images, weights = np.eye(3), np.eye(3)
    with pytest.raises(ValueError, match="each label must be one of the 3 classes; got 3 at 1"):
        rx.transfer.zero_shot(images, weights, np.array([0, 3, 1]))
    with pytest.raises(ValueError, match="each label must be one of the 3 classes; got -1 at 0"):
        rx.transfer.zero_shot(images, weights, np.array([-1, 0, 1]))
    with pytest.raises(ValueError, match=r"one label an image, 3; got the shape \(2,\)"):
        rx.transfer.zero_shot(images, weights, np.array([0, 1]))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"from 1 to the number of classes, 3; got {k}"):
            rx.transfer.zero_shot(images, weights, np.array([0, 1, 2]), k)
    with pytest.raises(ValueError, match=r"`weights` must be \[classes, d\]; got the shape \(3,\)"):
        rx.transfer.zero_shot(images, np.ones(3), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"`images` must be \[n, d\]; got the shape \(3, 1, 3\)"):
        rx.transfer.zero_shot(images[:, None], weights, np.array([0, 1, 2]))
    with pytest.raises(
        ValueError, match=r"one width, .* `images` of the shape \(3, 3\) and `weights` of the shape \(3, 2\)"
    ):
        rx.transfer.zero_shot(images, weights[:, :2], np.array([0, 1, 2]))


class Towers(eqx.Module):
    image: eqx.Module
    text: eqx.Module
    table: jax.Array

    def embed_images(self, images):
        return self.image(images)

    def embed_texts(self, tokens):
        return self.text(self.table[tokens].sum(axis=1))


CAPTIONS = np.random.default_rng(1).integers(0, 9, size=(5, 3, 4))


def towers():
    grow = lambda x: eqx.tree_at(lambda m: m.blocks["A"].weight, x, 2 * x.blocks["A"].weight)
    return Towers(looped(), grow(looped()), jr.normal(jr.key(5), (9, 4)))


def told_by_hand(model, batch, rounds, k):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    images = by_hand(model.image, batch["images"], rounds)
    texts = by_hand(model.text, np.asarray(model.table)[CAPTIONS].sum(axis=2), rounds)
    scores = images @ unit(unit(texts).mean(axis=1)).T
    return [label in np.argsort(-row)[:k] for row, label in zip(scores, batch["labels"])]


@pytest.mark.parametrize(("batch_size", "mesh"), [(1, False), (4, False), (256, False), (8, True), (64, True)])
def test_zero_shot_of_a_model_at_every_depth(batch_size, mesh):
    model, mesh = towers(), rx.train.mesh() if mesh else None
    labels = np.random.default_rng(2).integers(0, 5, size=(3, 16))
    weights = np.ones((3, 16), np.float32)
    weights[2, 11:] = 0
    data = batches(3, rows=16, labels=labels, weights=weights)
    sizes = []

    def texts(model, batch, key):
        sizes.append(len(batch["tokens"]))
        return model.embed_texts(batch["tokens"])

    placed = model if mesh is None else rx.train.place(model, mesh)
    give = {"batch_size": batch_size, "mesh": mesh, "texts": texts, "rounds": {"r": [1, 3, 4]}}
    for k in (1, 2):
        right = rx.transfer.evaluate_zero_shot(placed, iter(data), CAPTIONS, k=k, **give)
        assert list(right) == [(1,), (3,), (4,)]
        for (rounds,), found in right.items():
            want = sum((told_by_hand(model, batch, rounds, k) for batch in data), [])[:43]
            assert found.dtype == bool and found.tolist() == want
    # Depths differ, or pairing them wrongly would not be seen.
    assert len({tuple(found) for found in right.values()}) == 3
    # One program, no larger than asked for, nor than there are captions.
    assert sizes == [min(batch_size, 15 if mesh is None else 16)]


def test_zero_shot_of_a_model_by_its_own_methods_and_by_functions():
    model, data = towers(), batches(1, labels=np.arange(8)[None] % 5)
    (found,) = rx.transfer.evaluate_zero_shot(model, data, jnp.asarray(CAPTIONS)).values()
    assert found.tolist() == told_by_hand(model, data[0], 2, 1)
    noise = lambda model, batch, key: jr.normal(key, (len(jax.tree.leaves(batch)[0]), 4))
    draw = lambda seed: rx.transfer.evaluate_zero_shot(
        None,
        batches(8, labels=np.tile(np.arange(8) % 5, (8, 1))),
        CAPTIONS,
        images=noise,
        texts=noise,
        key=jr.key(seed),
    )[()]
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


@pytest.mark.parametrize(("number", "batch_size", "devices"), [(15, 8, 4), (15, 256, 4), (16, 8, 8), (3, 4, 4)])
def test_processes_share_out_the_captions(number, batch_size, devices, monkeypatch):
    rows, parts = np.arange(2 * number).reshape(number, 2), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        parts.append(list(_zero_shot._captions(rows, batch_size, devices)))
    found = []
    for both in zip(*parts, strict=True):
        tokens, weights = (np.concatenate([part[name] for part in both]) for name in ("tokens", "weights"))
        assert len(tokens) <= batch_size and len(tokens) % devices == 0
        found += tokens[weights > 0].tolist()
    assert found == rows.tolist()


def test_zero_shot_of_a_model_refuses():
    good = batches(1, labels=np.arange(8)[None] % 5)

    def give(data=good, tokens=CAPTIONS, **options):
        return rx.transfer.evaluate_zero_shot(towers(), data, tokens, **options)

    with pytest.raises(ValueError, match=r"`tokens` must be \[classes, templates, context\]; add an axis.* \(5, 4\)"):
        give(tokens=CAPTIONS[:, 0])
    with pytest.raises(ValueError, match=r"at least one class and one template; got the shape \(5, 0, 4\)"):
        give(tokens=CAPTIONS[:, :0])
    with pytest.raises(ValueError, match="from 1 to the number of classes, 5; got 6"):
        give(k=6)
    with pytest.raises(ValueError, match="positive multiple of the number of devices of the mesh, 1; got 0"):
        give(batch_size=0)
    with pytest.raises(ValueError, match="positive multiple of the number of devices of the mesh, 8; got 12"):
        give(batch_size=12, mesh=rx.train.mesh())
    with pytest.raises(ValueError, match='the batches must have "labels"'):
        give(data=batches(1))
    with pytest.raises(ValueError, match="each label must be one of the 5 classes; got 5 at 5"):
        give(data=batches(1, labels=np.arange(8)[None]))


#
# Retrieval
#


def place(scores, right):
    """Where the first right one stands in the list, sorted by score, the wrong before the right where they tie."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in right))
    return min(order.index(i) for i in right)


@given(st.integers(1, 7), st.integers(0, 6), st.integers(0, 99), st.booleans(), st.sampled_from([1, 100, 2**26]))
def test_retrieval_sorts(number, more, seed, coarse, piece):
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.concatenate([np.arange(number), rng.integers(number, size=more)]))
    draw = lambda n: rng.integers(-1, 2, size=(n, 3)).astype(np.float32) if coarse else rng.normal(size=(n, 3))
    images, texts = draw(number), draw(number + more)
    at = range(1, number + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rank, "_PIECE", piece)
        recall = rx.transfer.retrieval(images, texts, owners, at)
        weights = rx.transfer.zero_shot(texts, images, owners, k=1)
    own = [[j for j in range(len(texts)) if owners[j] == i] for i in range(number)]
    of_images = [place([float(images[i] @ text) for text in texts], own[i]) for i in range(number)]
    of_texts = [place([float(image @ texts[j]) for image in images], [owners[j]]) for j in range(len(texts))]
    for k in at:
        assert np.isclose(recall.image_to_text[k], np.mean([p < k for p in of_images]))
        assert np.isclose(recall.text_to_image[k], np.mean([p < k for p in of_texts]))
    # With images for classes and texts for images, zero-shot classification is retrieval.
    assert weights.tolist() == [p < 1 for p in of_texts]


def test_retrieval_by_hand():
    same = np.eye(4)
    assert rx.transfer.retrieval(same, same, at=(1, 4)) == ({1: 1.0, 4: 1.0}, {1: 1.0, 4: 1.0})
    shifted = np.roll(same, 1, axis=0)
    assert rx.transfer.retrieval(same, shifted, at=(1, 3)) == ({1: 0.0, 3: 0.0}, {1: 0.0, 3: 0.0})
    # The second text of image 0 finds it, the first does not: image 0 has found one of its own.
    texts = np.array([[0, 1, 0, 0.0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    recall = rx.transfer.retrieval(jnp.eye(4), jnp.asarray(texts), jnp.array([0, 0, 1, 2, 3]), at=[1])
    assert recall == rx.transfer.Recall(image_to_text={1: 1.0}, text_to_image={1: 0.8})


def test_ties_count_against_the_model():
    """Embeddings that are all the same know nothing."""
    images = np.tile(np.random.default_rng(0).normal(size=(1, 33)), (37, 1))
    recall = rx.transfer.retrieval(images, images, at=(1, 5, 36, 37))
    assert recall.image_to_text == recall.text_to_image == {1: 0.0, 5: 0.0, 36: 0.0, 37: 1.0}
    # Texts of one image that tie with each other take no places from it.
    recall = rx.transfer.retrieval(np.eye(2), np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), at=(1, 2))
    assert recall == ({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0})


def test_equal_vectors_tie_wherever_they_stand():
    """Whatever order a library adds products up in."""
    rng = np.random.default_rng(0)
    for width in (7, 64, 515):
        vectors = rng.normal(size=(50, width))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        texts = np.concatenate([vectors, vectors])
        recall = rx.transfer.retrieval(texts[:50], texts, np.arange(100) % 50, at=(1,))
        assert recall.text_to_image[1] == 1.0
        labels = np.arange(50)
        assert not rx.transfer.zero_shot(texts[:50], texts, labels).any()
        assert rx.transfer.zero_shot(texts[:50], texts, labels, k=2).all()


def test_retrieval_refuses():
    images, texts = np.eye(3), np.eye(3)[[0, 1, 2, 2]]
    retrieval = rx.transfer.retrieval
    with pytest.raises(ValueError, match="unless `owners` says otherwise; got 3 images and 4 texts"):
        retrieval(images, texts, at=(1,))
    with pytest.raises(ValueError, match=r"one owner a text, 4; got the shape \(3,\)"):
        retrieval(images, texts, np.arange(3), at=(1,))
    with pytest.raises(ValueError, match="each owner must be one of the 3 images; got 3 at 3"):
        retrieval(images, texts, np.arange(4), at=(1,))
    with pytest.raises(ValueError, match="each image must have a text; 1 have none, the first of them image 1"):
        retrieval(images, texts, np.array([0, 0, 2, 2]), at=(1,))
    with pytest.raises(ValueError, match="from 1 to the number of images, 3; got 4"):
        retrieval(images, texts, np.array([0, 1, 2, 2]), at=(1, 4))
    with pytest.raises(ValueError, match="from 1 to the number of texts, 3; got 5"):
        retrieval(images, images)
    with pytest.raises(ValueError, match="from 1 to the number of texts, 3; got 0"):
        retrieval(images, images, at=(0,))
    with pytest.raises(ValueError, match="`at` must hold at least one number"):
        retrieval(images, images, at=())
    with pytest.raises(ValueError, match=r"`images` must be \[images, d\]; got the shape \(3,\)"):
        retrieval(images[0], images, at=(1,))
    with pytest.raises(ValueError, match=r"`texts` must be \[texts, d\]; got the shape \(3, 1, 3\)"):
        retrieval(images, images[:, None], at=(1,))
    with pytest.raises(
        ValueError, match=r"one width, .* `images` of the shape \(3, 3\) and `texts` of the shape \(3, 2\)"
    ):
        retrieval(images, images[:, :2], at=(1,))


#
# Linear probes
#


def blobs(rows, seed=0, noise=1.0, width=6, classes=3):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(classes, size=rows)
    return (centres[labels] + noise * rng.normal(size=(rows, width))).astype(np.float32), labels


def test_the_probe_minimises_what_it_says():
    """Against plain gradient descent on the stated objective, at one strength."""
    (x, y), (test, test_labels) = blobs(80), blobs(60, seed=1)
    strength = 0.05
    probe = rx.transfer.linear_probe(x, y, test, test_labels, strengths=[strength])
    mean, deviation = x.mean(0), x.std(0)
    scaled = jnp.asarray((x - mean) / deviation)

    @jax.jit
    def descend(weights):
        def objective(weights):
            w, b = weights
            nats = -jnp.mean(jax.nn.log_softmax(scaled @ w + b)[jnp.arange(len(y)), y])
            return nats + strength / 2 * jnp.sum(w**2)

        step = lambda weights, _: (jax.tree.map(lambda p, g: p - 0.5 * g, weights, jax.grad(objective)(weights)), None)
        return jax.lax.scan(step, weights, length=3000)[0]

    w, b = descend((jnp.zeros((6, 3)), jnp.zeros(3)))
    logits = (test - mean) / deviation @ np.asarray(w) + np.asarray(b)
    first, second = np.sort(logits, axis=1)[:, :-3:-1].T
    clear = first - second > 1e-2
    assert np.sum(clear) > 50
    assert np.array_equal(probe.correct[clear], (np.argmax(logits, axis=1) == test_labels)[clear])
    assert 0.5 < np.mean(probe.correct) < 1
    assert probe.strength == strength and list(probe.accuracies) == [strength]


def test_the_probe_chooses_on_held_out_rows():
    """Many features of noise and few rows: weak regularisation is worse, and so is a very strong one."""
    (x, y), (test, test_labels) = blobs(150, noise=1.5, width=6), blobs(300, seed=1, noise=1.5, width=6)
    noise = lambda rows, seed: np.random.default_rng(seed).normal(size=(rows, 60)).astype(np.float32)
    x, test = np.concatenate([x, noise(150, 2)], axis=1), np.concatenate([test, noise(300, 3)], axis=1)
    probe = rx.transfer.linear_probe(x, y, test, test_labels, seed=1)
    assert len(probe.accuracies) == 8 and probe.correct.dtype == bool and probe.correct.shape == (300,)
    best = max(probe.accuracies.values())
    # The strongest of the best.
    assert probe.strength == max(s for s, accuracy in probe.accuracies.items() if accuracy == best)
    assert probe.strength > 1e-3
    weak = rx.transfer.linear_probe(x, y, test, test_labels, strengths=[1e-5], seed=1)
    assert np.mean(probe.correct) > np.mean(weak.correct)
    again = rx.transfer.linear_probe(x, y, test, test_labels, seed=1)
    assert np.array_equal(again.correct, probe.correct) and again[1:] == probe[1:]
    # Other rows are held out.
    assert rx.transfer.linear_probe(x, y, test, test_labels, seed=2).accuracies != probe.accuracies


def test_the_accuracies_are_those_of_the_rows_held_out():
    """Training rows of which a fifth of each class is held out: the multiset of what can be right is known."""
    x, y = blobs(50, noise=0.05)
    y = np.sort(y)
    shuffled = rx.transfer.linear_probe(x, y, x, y, strengths=[1e-2, 1.0])
    held = sum(np.bincount(y) // 5)
    assert all(np.isclose(a * held, round(a * held)) for a in shuffled.accuracies.values())


def test_the_test_rows_play_no_part_in_training():
    (x, y), (test, labels) = blobs(60), blobs(40, seed=1)
    whole = rx.transfer.linear_probe(x, y, test, labels)
    half = rx.transfer.linear_probe(x, y, test[:20], labels[:20])
    assert whole[1:] == half[1:] and np.array_equal(whole.correct[:20], half.correct)


def test_a_constant_feature_and_labels_of_any_number():
    x, y = blobs(60, noise=0.1)
    x = np.concatenate([x, np.ones((60, 1), np.float32)], axis=1)
    names = np.array([-7, 100, 3])
    probe = rx.transfer.linear_probe(jnp.asarray(x), jnp.asarray(names[y]), x, np.where(y == 0, 5, names[y]))
    # Nothing learns label 5.
    assert np.array_equal(probe.correct, y != 0)


def test_the_probe_is_that_of_scikit_learn():
    """Refitted on all rows at the chosen strength."""
    (x, y), (test, labels) = blobs(90), blobs(80, seed=1)
    probe = rx.transfer.linear_probe(x, y, test, labels)
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    model = LogisticRegression(C=1 / (probe.strength * 90), max_iter=5000, tol=1e-8).fit((x - mean) / deviation, y)
    assert np.mean(probe.correct == (model.predict((test - mean) / deviation) == labels)) >= 0.98


def test_the_probe_refuses():
    (x, y), (test, labels) = blobs(30), blobs(10, seed=1)
    probe = rx.transfer.linear_probe
    with pytest.raises(ValueError, match=r"`train_labels` must be one for each of 30 rows; got the shape \(29,\)"):
        probe(x, y[:29], test, labels)
    with pytest.raises(ValueError, match=r"`test_labels` must be one for each of 0 rows; got the shape \(0,\)"):
        probe(x, y, test[:0], labels[:0])
    with pytest.raises(
        ValueError, match=r"`train_vectors` of the shape \(30, 6\) and `test_vectors` of the shape \(10, 5\)"
    ):
        probe(x, y, test[:, :5], labels)
    for shape in ((30,), (30, 2, 3)):
        with pytest.raises(
            ValueError, match=rf"`train_vectors` must be \[rows, d\]; got the shape {re.escape(str(shape))}"
        ):
            probe(np.ones(shape), y, test, labels)
    with pytest.raises(ValueError, match="`test_vectors` must be finite; 1 rows are not, the first of them row 3"):
        probe(x, y, np.where(np.arange(10)[:, None] == 3, np.nan, test), labels)
    for strengths in ([], [0.0], [1.0, np.inf], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="`strengths` must be positive numbers, at least one; got"):
            probe(x, y, test, labels, strengths=strengths)
    with pytest.raises(ValueError, match=r"two classes in training, .* got \{1: 30\}, rows by label"):
        probe(x, np.ones(30, int), test, labels)
    with pytest.raises(ValueError, match=r"at least five rows; got \{0: 3, 1: 3\}"):
        probe(x[:6], np.arange(6) % 2, test, labels)


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'rinsx\[vision\]'"):
        rx.transfer.linear_probe(*blobs(30), *blobs(10))
