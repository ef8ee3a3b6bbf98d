"""A small training run as a program of its own: `python _processes.py OPTIONS_AS_JSON`."""

import json
import os
import pathlib
import signal
import sys


def main(options):
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.get('devices', 1)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if "process" in options:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{options['port']}", options["processes"], options["process"])
    import equinox as eqx
    import jax.random as jr
    import numpy as np

    import rinsx as rx

    if options.get("toy"):
        model, loss = toy(jr.key(0))
    else:
        config = rx.models.DecoderConfig(257, 16, 1, 2, hidden=24, context=8, dtype="float32")
        model = rx.models.DecoderLM(config, "A^r", r=2, key=jr.key(0))
        loss = rx.models.DecoderLM.loss
    texts = ["some text to train on, long enough for a few windows", "and more of it, in a second document"] * 4
    tokens = rx.data.tokenize(rx.data.documents(texts), rx.data.Bytes())
    batches = rx.data.batches(rx.data.Windows(tokens, 8), 8, seed=3)
    mesh = rx.train.mesh(options["shards"]) if "shards" in options else None
    if mesh is not None and options.get("place"):
        model = rx.train.place(model, mesh)
    folder = pathlib.Path(options["folder"])
    held_out = [next(iter(rx.data.batches(rx.data.Windows(tokens, 8), 8, seed=4)))]

    def evaluate(model):
        found = rx.train.evaluate(model, loss, held_out, rounds={"r": [1, 3]}, mesh=mesh)
        return {"loss": found[(3,)].mean, "shallow": found[(1,)].mean}

    class Signal(rx.train.AbstractLog):
        """Sends itself SIGTERM, so that the moment is known."""

        def write(self, step, metrics):
            if step == options.get("signal"):
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self):
            pass

    logs = [Signal(), rx.train.JsonLines(folder / f"{options.get('log', 'metrics')}.jsonl")]
    with rx.train.Checkpoints(folder / "checkpoints", every=4, keep=3) as checkpoints:
        run = rx.train.fit(
            model,
            loss,
            batches,
            rx.train.adamw(rx.train.cosine(1e-2)),
            steps=options["steps"],
            key=jr.key(1),
            depth={"r": rx.depth.Uniform(1, 2) if options.get("toy") else 2},
            accumulate=2 if options.get("toy") else 1,
            steps_per_call=options.get("steps_per_call", 2),
            evaluate=evaluate,
            evaluate_every=6,
            checkpoints=checkpoints,
            logs=logs,
            mesh=mesh,
        )
    for log in logs:
        log.close()
    whole = eqx.filter(run.model, eqx.is_array)
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        whole = jax.jit(lambda x: x, out_shardings=everywhere)(whole)
    leaves = [np.asarray(x) for x in jax.tree.leaves(whole)]
    if jax.process_index() == 0:
        np.savez(folder / "model.npz", *leaves)
    told = {"step": run.step, "stopped": run.stopped, "flops": run.flops, "metrics": run.metrics}
    print("RUN " + json.dumps(told), flush=True)


def toy(key):
    """A looped model that compiles faster than a decoder, and its loss."""
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr
    import optax

    import rinsx as rx

    a, b, table = (jr.normal(k, shape) / 4 for k, shape in zip(jr.split(key, 3), [(8, 8), (8, 8), (257, 8)]))
    block = lambda w: rx.lift(eqx.Partial(lambda w, x: x + jnp.tanh(x @ w), w))
    model = {"table": table, "body": rx.compose("A^r B", {"A": block(a), "B": block(b)}, r=2)}

    def loss(model, batch, key):
        states = model["body"](model["table"][batch["tokens"]])
        states = states * (1 + 0.1 * jr.normal(key, states.shape))
        each = optax.softmax_cross_entropy_with_integer_labels(states @ model["table"].T, batch["targets"])
        return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])

    return model, loss


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
