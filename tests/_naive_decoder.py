"""A decoder in numpy, token by token, with its keys and values in a dictionary: what the tests of caches compare with."""

import numpy as np


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * scale


def turn(x, position):
    """Rotary positions of heads `[heads, dim]`."""
    half = x.shape[-1] // 2
    angles = position * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


class Layer:
    """One transformer layer with weights of a `rx.nn.TransformerLayer`, number `i` of a stack."""

    def __init__(self, stack, i):
        of = lambda x: np.asarray(x[i], np.float64)
        layers = stack.layers
        attention, mlp = layers.attention, layers.mlp
        self.q, self.k, self.v, self.out = (of(getattr(attention, n).weight) for n in ("q", "k", "v", "out"))
        self.up, self.gate, self.down = (of(getattr(mlp, n).weight) for n in ("up", "gate", "down"))
        self.norms = of(layers.attention_norm.scale), of(layers.mlp_norm.scale)
        self.dim, self.window = attention.head_dim, attention.window

    def keys(self, x, position):
        x = rms(x, self.norms[0])
        k = turn((x @ self.k).reshape(-1, self.dim), position)
        return k, (x @ self.v).reshape(-1, self.dim)

    def __call__(self, x, position, seen):
        """`seen`: pairs of keys and values, of the positions that are attended to."""
        q = turn((rms(x, self.norms[0]) @ self.q).reshape(-1, self.dim), position)
        heads = []
        for h, query in enumerate(q):
            group = h * seen[0][0].shape[0] // len(q)
            scores = np.array([query @ k[group] for k, _ in seen]) / np.sqrt(self.dim)
            weights = np.exp(scores - scores.max())
            heads.append(sum(w * v[group] for w, (_, v) in zip(weights / weights.sum(), seen)))
        x = x + np.concatenate(heads) @ self.out
        y = rms(x, self.norms[1])
        gate = y @ self.gate
        return x + (gate / (1 + np.exp(-gate)) * (y @ self.up)) @ self.down


def decode(model, tokens, rounds, read):
    """Logits of one sequence under `A^r B`.

    **Arguments:**

    - `rounds`: the number of rounds of each token.
    - `read`: `(i, r) -> j`: the round whose keys and values of an earlier token, which ran `r` rounds, round `i` attends to;
        `None` for none. Of its own token it is `read(i, None)`.
    """
    blocks = model.body.blocks
    layers = {name: [Layer(blocks[name], i) for i in range(blocks[name].depth)] for name in "AB"}
    kept: dict = {}
    logits = []
    for t, token in enumerate(tokens):
        x = np.asarray(model.embedding.weight, np.float64)[token]

        def visit(x, name, i):
            for n, layer in enumerate(layers[name]):
                kept[name, i, n, t] = layer.keys(x, t)
                seen = []
                for s in range(t + 1):
                    j = 0 if name == "B" else read(i, None if s == t else rounds[s])
                    if j is not None and (layer.window is None or s > t - layer.window):
                        seen.append(kept[name, j, n, s])
                x = layer(x, t, seen)
            return x

        for i in range(rounds[t]):
            x = visit(x, "A", i)
        x = visit(x, "B", 0)
        head = model.embedding.weight.T if model.head is None else model.head.weight
        logits.append(rms(x, np.asarray(model.norm.scale)) @ np.asarray(head, np.float64))
    return np.stack(logits)
