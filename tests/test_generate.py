"""Generated text is what the model says, token by token, however it is batched, streamed, stopped or drafted."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

import rinsx as rx

from ._naive_decoder import decode as naive


G = rx.generate
VOCAB, STEPS = 11, 6
CONFIG = rx.models.DecoderConfig(VOCAB, 8, 2, 2, kv_heads=1, hidden=16, tied=False, context=8, dtype="float32")
PROMPTS = jr.randint(jr.key(9), (3, 4), 0, VOCAB)
LENGTHS = jnp.array([4, 2, 3])
GREEDY = G.Sampler(temperature=0)


def model_of(signature="A^r B", **options):
    model = rx.models.DecoderLM(CONFIG, signature, key=jr.key(0), **options)
    # Layers that do more than at the start, so that a round matters, and text is not one token for ever.
    blocks = jax.tree.map(lambda w: 3 * w if w.ndim == 3 else w, model.body.blocks)
    model = eqx.tree_at(lambda m: m.body.blocks, model, blocks)
    return eqx.tree_at(lambda m: m.head.weight, model, replace_fn=lambda w: 2 * w)


MODEL = model_of(r=3)


def continued(model, prompt, steps, r=3, read=lambda i, r: i if r is None else min(i, r - 1)):
    """The greedy continuation, from the whole text again for every token."""
    text = list(map(int, prompt))
    log_probs = []
    for _ in range(steps):
        logits = naive(model, text, [r] * len(text), read)[-1]
        text.append(int(logits.argmax()))
        log_probs.append(logits.max() - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max())
    return text[len(prompt) :], log_probs


def test_greedy_text_and_its_log_probabilities():
    out = G.tokens(MODEL, PROMPTS, lengths=LENGTHS, steps=STEPS, sampler=GREEDY)
    for b, n in enumerate(LENGTHS.tolist()):
        tokens, log_probs = continued(MODEL, PROMPTS[b, :n], STEPS)
        assert out.tokens[b].tolist() == tokens
        np.testing.assert_allclose(out.log_probs[b], log_probs, atol=1e-4)
    assert out.lengths.tolist() == [STEPS] * 3 and out.rounds is None
    # Token by token, with rounds that are set by the call; and from prompts with padding on the left.
    shallow = rx.with_rounds(MODEL, r=1)
    parts = G.stream(shallow, PROMPTS, lengths=LENGTHS, steps=STEPS, sampler=GREEDY, rounds={"r": 3})
    assert jnp.stack([part.tokens for part in parts], 1).tolist() == out.tokens.tolist()
    left = jnp.stack([jnp.roll(row, -int(n)) for row, n in zip(PROMPTS, LENGTHS)])
    prompts, lengths = G.to_right(left, jnp.arange(4) >= 4 - LENGTHS[:, None])
    assert G.tokens(MODEL, prompts, lengths=lengths, steps=STEPS, sampler=GREEDY).tokens.tolist() == out.tokens.tolist()


def test_padding_may_be_any_number():
    padded = jnp.where(jnp.arange(4) < LENGTHS[:, None], PROMPTS, jnp.array([VOCAB, -1, 2**30])[:, None])
    same = {"lengths": LENGTHS, "steps": STEPS, "sampler": G.Sampler(temperature=0, repetition_penalty=1.5)}
    want = G.tokens(MODEL, PROMPTS, **same)
    for got in (G.tokens(MODEL, padded, **same), G.speculate(MODEL, padded, draft={"r": 1}, **same)):
        assert got.tokens.tolist() == want.tokens.tolist()
        np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)
    # By hand, too: nothing of the padding is left in the cache.
    hidden, cache = eqx.filter_jit(MODEL.decode)(padded, MODEL.cache(3, 8), counts=LENGTHS)
    last = jnp.take_along_axis(hidden, LENGTHS[:, None, None] - 1, axis=1)[:, 0]
    assert MODEL.logits(last).argmax(-1).tolist() == [
        continued(MODEL, PROMPTS[b, :n], 1)[0][0] for b, n in enumerate(LENGTHS)
    ]
    hidden, _ = eqx.filter_jit(MODEL.decode)(PROMPTS[:, :1], cache)
    assert jnp.isfinite(hidden).all()


def test_a_sequence_depends_on_its_own_key_alone():
    sampler = G.Sampler(temperature=0.8, top_k=7, top_p=0.9, repetition_penalty=1.2)
    keys = jr.split(jr.key(3), 3)
    generate = lambda prompts, lengths, keys: G.tokens(
        MODEL, prompts, lengths=lengths, steps=STEPS, sampler=sampler, key=keys, capacity=16
    )
    together = generate(PROMPTS, LENGTHS, keys)
    for b in (0, 2):
        alone = generate(PROMPTS[b : b + 1], LENGTHS[b : b + 1], keys[b : b + 1])
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
    again = generate(PROMPTS, LENGTHS, keys)
    assert again.tokens.tolist() == together.tokens.tolist()
    other = generate(PROMPTS, LENGTHS, jr.split(jr.key(4), 3))
    assert other.tokens.tolist() != together.tokens.tolist()


def test_what_is_drawn_has_the_models_distribution():
    n = 3000
    sampler = G.Sampler(temperature=1.5)
    out = G.tokens(MODEL, jnp.broadcast_to(PROMPTS[:1], (n, 4)), steps=1, sampler=sampler, key=jr.key(1))
    p = np.asarray(jax.nn.softmax(MODEL(PROMPTS[:1])[0, -1] / 1.5), np.float64)
    assert chi_square(out.tokens[:, 0], p) > 1e-4


def chi_square(drawn, p):
    """The p-value of what was drawn, rare outcomes put together."""
    counts = np.bincount(np.asarray(drawn), minlength=len(p))
    rare = p * counts.sum() < 5
    put = lambda x: np.append(x[~rare], x[rare].sum()) if rare.any() else x
    wanted = put(p * counts.sum())
    if rare.any() and wanted[-1] == 0:
        return 1.0 if put(counts)[-1] == 0 else 0.0
    return scipy.stats.chisquare(put(counts), wanted * counts.sum() / wanted.sum()).pvalue


def test_stop_tokens_end_a_sequence():
    free = G.tokens(MODEL, PROMPTS, lengths=LENGTHS, steps=STEPS, sampler=GREEDY)
    stop = [int(free.tokens[0, 2]), int(free.tokens[1, 0])]
    out = G.tokens(MODEL, PROMPTS, lengths=LENGTHS, steps=STEPS, sampler=GREEDY, stop=stop)
    for b in range(3):
        ends = [i for i, token in enumerate(free.tokens[b].tolist()) if token in stop]
        n = ends[0] + 1 if ends else STEPS
        assert int(out.lengths[b]) == n
        assert out.tokens[b].tolist() == free.tokens[b, :n].tolist() + [0] * (STEPS - n)
        assert not out.log_probs[b, n:].any()
    # Prompts of one length, which are written together: one that ends does not disturb the others.
    free = G.tokens(MODEL, PROMPTS, steps=STEPS, sampler=GREEDY)
    out = G.tokens(MODEL, PROMPTS, steps=STEPS, sampler=GREEDY, stop=[int(free.tokens[0, 0])])
    for b in range(3):
        n = int(out.lengths[b])
        assert out.tokens[b, :n].tolist() == free.tokens[b, :n].tolist()
    assert out.lengths[0] == 1 and max(out.lengths) > 1
    stop = [int(G.tokens(MODEL, PROMPTS[1:2, :2], steps=1, sampler=GREEDY).tokens[0, 0])]
    parts = list(G.stream(MODEL, PROMPTS[1:2], lengths=LENGTHS[1:2], steps=STEPS, sampler=GREEDY, stop=stop))
    assert len(parts) == 1 and bool(parts[0].done[0])


CRITERIA = [G.StateChange(0.4), G.KL(0.02), G.EntropyChange(0.02)]


def states_of(model, text, r, converged):
    """The rounds that the last token takes, by running rounds one by one: those before it took `r`."""
    before = None
    for i in range(1, 6):
        rounds = [*r, i]
        logits = naive(model, text, rounds, lambda i, r: i if r is None else min(i, r - 1))[-1]
        if before is not None and converged(before, logits):
            return i, logits
        before = logits
    return 5, before


@pytest.mark.parametrize("criterion", CRITERIA[1:])
def test_until_predictions_converge(criterion):
    out = G.tokens(MODEL, PROMPTS[:1], steps=4, sampler=GREEDY, rounds=G.Until(criterion, most=5))
    text, r = PROMPTS[0].tolist(), [5] * 4
    assert int(out.rounds[0, 0]) == 5
    converged = lambda a, b: bool(criterion(jnp.asarray(a)[None], jnp.asarray(b)[None])[0])
    for i in range(3):
        text.append(int(out.tokens[0, i]))
        used, logits = states_of(MODEL, text, r, converged)
        assert int(out.rounds[0, i + 1]) == used
        assert int(out.tokens[0, i + 1]) == int(logits.argmax())
        r.append(used)
    assert len(set(r)) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_converging_does_not_depend_on_the_batch(criterion):
    rounds = G.Until(criterion, least=2, most=6)
    run = lambda b: G.tokens(MODEL, PROMPTS[b], lengths=LENGTHS[b], steps=STEPS, sampler=GREEDY, rounds=rounds)
    together = run(slice(0, 3))
    for b in range(3):
        alone = run(slice(b, b + 1))
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
        assert alone.rounds[0].tolist() == together.rounds[b].tolist()
    assert 2 <= int(together.rounds[:, 1:].min()) < int(together.rounds[:, 1:].max())


@pytest.mark.parametrize(
    "signature, layers, loop",
    [("(A B^2)^r A", 2, rx.Loop(2)), ("A (B C^s)^r", 3, rx.Loop(2)), ("A^r B", 2, rx.Loop(2, cache=rx.cache.Last(2)))],
)
def test_slots_of_a_sequence_that_has_converged_do_not_depend_on_the_batch(signature, layers, loop):
    config = rx.models.DecoderConfig(11, 8, layers, 2, kv_heads=1, hidden=16, context=16, dtype="float32")
    loops = {"r": loop, "s": 2} if "s" in signature else {"r": loop}
    model = rx.models.DecoderLM(config, signature, key=jr.key(0), **loops)
    # So that rounds differ.
    model = jax.tree.map(lambda x: 3 * x if eqx.is_array(x) and x.ndim >= 2 else x, model)
    rounds = G.Until(G.StateChange(0.3), most=5)
    run = lambda prompts: G.tokens(model, prompts, steps=6, sampler=GREEDY, rounds=rounds)
    prompts = jr.randint(jr.key(9), (4, 4), 0, 11)
    together = run(prompts)
    assert len(set(np.ravel(together.rounds).tolist())) > 1
    for b in range(4):
        alone = run(prompts[b : b + 1])
        assert alone.rounds[0].tolist() == together.rounds[b].tolist()
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[b], atol=2e-3)


def test_work_is_saved_once_all_have_converged():
    # A block that counts its visits on the host.
    calls = []

    class Counted(eqx.Module):
        layer: rx.nn.TransformerLayer

        def __call__(self, state, *, key=None, **context):
            jax.debug.callback(lambda: calls.append(1))
            return self.layer(state, **context)

    model = eqx.tree_at(lambda m: m.body.blocks["A"].layers, MODEL, replace_fn=Counted)
    out = G.tokens(model, PROMPTS, steps=3, sampler=GREEDY, rounds=G.Until(G.StateChange(0.4), most=40))
    jax.effects_barrier()
    # The prompt runs all rounds, each later token as many as the slowest of the batch.
    assert len(calls) == 40 + int(out.rounds[:, 1:].max(axis=0).sum())
    assert int(out.rounds[:, 1:].max()) < 40
    # Nothing waits for a sequence that has ended.
    calls.clear()
    rounds = G.Until(G.StateChange(0.4), most=40)
    out = G.tokens(model, PROMPTS, steps=3, sampler=GREEDY, rounds=rounds, stop=[int(out.tokens[0, 0])])
    jax.effects_barrier()
    assert len(calls) == 40 + int(out.rounds[:, 1:].max(axis=0).sum())
    assert out.lengths[0] == 1 and max(out.lengths) == 3


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("policy", [None, rx.cache.First()])
def test_speculation_is_the_deep_models_greedy_text(ahead, policy):
    model = model_of(r=rx.Loop(3, cache=policy))
    want = G.tokens(model, PROMPTS, lengths=LENGTHS, steps=8, sampler=GREEDY)
    got = G.speculate(model, PROMPTS, lengths=LENGTHS, steps=8, sampler=GREEDY, draft={"r": 1}, ahead=ahead)
    assert got.tokens.tolist() == want.tokens.tolist()
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)
    assert got.lengths.tolist() == [8] * 3
    assert np.all((0 <= got.accepted) & (got.accepted <= got.drafted))
    # A draft by the deep model itself always stands.
    same = G.speculate(model, PROMPTS, lengths=LENGTHS, steps=8, sampler=GREEDY, draft={"r": 3}, ahead=ahead)
    assert same.tokens.tolist() == want.tokens.tolist() and same.accepted.tolist() == same.drafted.tolist()
    assert int(same.passes) == -(-7 // (ahead + 1))
    stop = [int(want.tokens[0, 3])]
    want = G.tokens(model, PROMPTS, lengths=LENGTHS, steps=8, sampler=GREEDY, stop=stop)
    got = G.speculate(model, PROMPTS, lengths=LENGTHS, steps=8, sampler=GREEDY, stop=stop, draft={"r": 1}, ahead=ahead)
    assert got.tokens.tolist() == want.tokens.tolist() and got.lengths.tolist() == want.lengths.tolist()


def test_speculation_penalises_what_stands_before_a_token():
    """Drafts too: what was drafted and refused is not seen afterwards."""
    sampler = G.Sampler(temperature=0, repetition_penalty=2.5)
    same = {"lengths": LENGTHS, "steps": 12}
    want = G.tokens(MODEL, PROMPTS, sampler=sampler, **same)
    got = G.speculate(MODEL, PROMPTS, sampler=sampler, draft={"r": 1}, ahead=3, **same)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert want.tokens.tolist() != G.tokens(MODEL, PROMPTS, sampler=GREEDY, **same).tokens.tolist()
    assert 0 < int(got.accepted.sum()) < int(got.drafted.sum())


@pytest.mark.parametrize("penalty", [None, 1.5])
def test_speculation_draws_from_the_deep_model(penalty):
    n, sampler = 4000, G.Sampler(temperature=1.3, top_k=6, repetition_penalty=penalty)
    prompts = jnp.broadcast_to(PROMPTS[:1], (n, 4))
    out = G.speculate(MODEL, prompts, draft={"r": 1}, ahead=2, steps=3, sampler=sampler, key=jr.key(5))
    assert 0.05 < float(out.accepted.sum() / out.drafted.sum()) < 0.95
    # The second and third token, given those before, for the commonest of them.
    first = np.bincount(np.asarray(out.tokens[:, 0])).argmax()
    of_first = np.asarray(out.tokens)[np.asarray(out.tokens[:, 0]) == first]
    second = np.bincount(of_first[:, 1]).argmax()
    of_second = of_first[of_first[:, 1] == second]

    def probs(text, model=MODEL):
        seen = None if penalty is None else jnp.zeros(VOCAB, bool).at[jnp.array(text)].set(True)
        return np.exp(np.asarray(sampler.log_probs(model(jnp.array([text]))[0, -1], seen), np.float64))

    text = PROMPTS[0].tolist()
    assert chi_square(of_first[:, 1], probs([*text, int(first)])) > 1e-4
    assert chi_square(of_second[:, 2], probs([*text, int(first), int(second)])) > 1e-4
    # The shallow model is another: the test would have seen it.
    assert chi_square(of_first[:, 1], probs([*text, int(first)], rx.with_rounds(MODEL, r=1))) < 1e-4


def test_speculation_with_starts_that_draw():
    """They draw anew in each pass: the text has the distribution of that which is generated token by token."""
    n, sampler = 4000, G.Sampler(temperature=1.3)
    model = model_of(r=rx.Loop(3, inject=rx.injection.Add(), start=rx.start.Normal()))
    prompts = jnp.broadcast_to(PROMPTS[:1], (n, 4))
    out = G.speculate(model, prompts, draft={"r": 1}, ahead=2, steps=3, sampler=sampler, key=jr.key(5))
    want = G.tokens(model, prompts, steps=3, sampler=sampler, key=jr.key(6))
    assert 0.05 < float(out.accepted.sum() / out.drafted.sum()) < 0.95
    for i in (1, 2):
        pairs = [np.asarray(x.tokens[:, 0] * VOCAB + x.tokens[:, i]) for x in (out, want)]
        counts = np.stack([np.bincount(x, minlength=VOCAB**2) for x in pairs])
        rare = counts.sum(0) < 20
        counts = np.append(counts[:, ~rare], counts[:, rare].sum(1, keepdims=True) + 1, axis=1)
        assert scipy.stats.chi2_contingency(counts).pvalue > 1e-4


def test_sequential_policies_run_a_prompt_token_by_token():
    model = model_of(r=rx.Loop(3, cache=rx.cache.Last()))
    read = lambda i, r: i if r is None else r - 1
    out = G.tokens(model, PROMPTS, lengths=LENGTHS, steps=4, sampler=GREEDY)
    for b, n in enumerate(LENGTHS.tolist()):
        assert out.tokens[b].tolist() == continued(model, PROMPTS[b, :n], 4, read=read)[0]
    # At once it is an approximation: the prompt's own tokens are those of a model that shares nothing.
    at_once = G.tokens(model, PROMPTS, steps=1, sampler=GREEDY, prefill="parallel")
    plain = G.tokens(MODEL, PROMPTS, steps=1, sampler=GREEDY)
    np.testing.assert_allclose(at_once.log_probs, plain.log_probs, atol=1e-5)
    with pytest.raises(ValueError, match="sequential cache policy"):
        G.speculate(model, PROMPTS, draft={"r": 1}, steps=2, sampler=GREEDY)


def test_prompts_longer_than_a_piece_of_a_window():
    model = model_of(r=2, windows={"A": 3})
    prompts = jr.randint(jr.key(1), (2, 150), 0, VOCAB)
    out = G.tokens(model, prompts, lengths=[150, 131], steps=2, sampler=GREEDY)
    for b, n in enumerate((150, 131)):
        logits = model(prompts[b : b + 1, :n])[0, -1]
        assert int(out.tokens[b, 0]) == int(logits.argmax())


def test_a_sweep_is_the_loss_at_each_depth():
    batch = {"tokens": PROMPTS, "targets": PROMPTS[:, ::-1]}
    got = G.sweep(MODEL, rx.models.DecoderLM.loss, batch, [1, 2, 5])
    for r, loss in zip((1, 2, 5), got):
        total, weight = rx.with_rounds(MODEL, r=r).loss(batch)
        np.testing.assert_allclose(loss, total / weight, rtol=1e-5)


@pytest.mark.parametrize("options", [{"gradient": rx.gradient.Full()}, {"unroll": True}])
def test_how_a_model_was_trained_does_not_bind_its_depth(options):
    model = model_of(r=rx.Loop(3, **options))
    batch = {"tokens": PROMPTS, "targets": PROMPTS[:, ::-1]}
    losses = [G.sweep(m, rx.models.DecoderLM.loss, batch, [1, 5]) for m in (model, MODEL)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for rounds in (G.Until(G.StateChange(0.4), most=5), {"r": jnp.int32(2)}):
        got, want = (
            G.tokens(m, PROMPTS, steps=3, sampler=GREEDY, rounds=rounds)
            for m in (model_of(r=rx.Loop(3, max=5, **options)), model_of(r=rx.Loop(3, max=5)))
        )
        assert got.tokens.tolist() == want.tokens.tolist()


def test_what_is_refused():
    tokens = lambda **options: G.tokens(MODEL, PROMPTS, **{"steps": 2, "sampler": GREEDY, **options})
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1; got 0"):
        tokens(steps=0)
    with pytest.raises(ValueError, match=r"`lengths` are from 1 to 4.*got \[4, 0, 2\]"):
        tokens(lengths=[4, 0, 2])
    with pytest.raises(ValueError, match=r"one number for each of 3 prompts; got shape \[2\]"):
        tokens(lengths=[4, 2])
    with pytest.raises(TypeError, match=r"`lengths` are integers from 1 to 4; got float32: \[2.9.*, 3.2.*, 4.0\]"):
        tokens(lengths=[2.9, 3.2, 4])
    with pytest.raises(TypeError, match=r"`rounds` are integers of at least 1; got \[1.9, 2\]"):
        G.sweep(MODEL, rx.models.DecoderLM.loss, {}, iter([1.9, 2]))
    with pytest.raises(ValueError, match=r"`rounds` are integers of at least 1; got \[2, 0\]"):
        G.sweep(MODEL, rx.models.DecoderLM.loss, {}, [2, 0])
    with pytest.raises(
        ValueError, match=r"(?s)`rounds` are numbers of rounds by the names of loops.*got Until\(.*most=4"
    ):
        # Not the type checker's error.
        speculate = inspect.unwrap(G.speculate)
        speculate(MODEL, PROMPTS, draft={"r": 1}, steps=2, sampler=GREEDY, rounds=G.Until(G.KL(0.1), most=4))
    with pytest.raises(ValueError, match="`capacity` is 5 positions, but a prompt of 4, 2 steps need 6"):
        tokens(capacity=5)
    with pytest.raises(ValueError, match="give key="):
        tokens(sampler=G.Sampler())
    with pytest.raises(ValueError, match=r"one for each of 3 sequences; got shape \[2\]"):
        tokens(key=jr.split(jr.key(0), 2))
    with pytest.raises(ValueError, match="at most `most`; got least=4 and most=2"):
        G.Until(G.KL(0.1), least=4, most=2)
    with pytest.raises(ValueError, match="`tolerance` must be positive; got 0"):
        G.KL(0)
    with pytest.raises(ValueError, match="no loop of this model is named q"):
        tokens(rounds=G.Until(G.KL(0.1), most=2, loop="q"))
    with pytest.raises(ValueError, match=r"prompts are integers \[batch, p\].*float32\[3, 4\]"):
        G.tokens(MODEL, jnp.ones((3, 4)), steps=1, sampler=GREEDY)
    with pytest.raises(ValueError, match="r may run 5 rounds, past its cache, which has slots for 3"):
        cache = MODEL.cache(3, 8, stops=True)
        MODEL.decode(PROMPTS[:, :1], cache, until=G.Until(G.KL(0.1), most=5))
    with pytest.raises(ValueError, match="make the cache with stops=True"):
        MODEL.decode(PROMPTS[:, :1], MODEL.cache(3, 8), until=G.Until(G.KL(0.1), most=3))
    nested = model_of("(A^r B)^2", r=2)
    with pytest.raises(ValueError, match="no loop around it"):
        G.tokens(nested, PROMPTS, steps=2, sampler=GREEDY, rounds=G.Until(G.KL(0.1), most=2))
