"""Trains the reader on the synthetic corpus, stage by stage, resumable.

    python train.py --out RUN [--recipe recipe.json] [--workers 2]

Stops at the end of the recipe or on SIGTERM / SIGINT; the same command goes
on from RUN/state.pt. Every line of RUN/log.jsonl is one measurement.

On a CPU, single-threaded workers share one parameter vector and update it
asynchronously (Hogwild with a lock around the update): there is no barrier
that another job on the machine could stall. On a GPU there is one worker.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import time

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import corpus
import model as reader

TASKS = ["text", "hop1", "hop2", "coref2", "coref3", "coref4", "override", "update",
         "ordinal", "compare", "needle", "kv", "copy", "copyref", "repeat"]
# Loss weights by role of the token.
ANSWER, END, TEXT, QUESTION = 1.0, 0.3, 0.1, 0.02
LOG_EVERY = 25
SAVE_EVERY = 100


def choose(r, options):
    """One of them, by its weight."""
    return r.choices(options, [o.get("weight", 1) for o in options])[0]


def shapes(stage):
    """Lengths of rows, with the chunks that fit: one for a stage that names none."""
    return stage.get("shapes", [{"length": stage.get("length")}])


def sequence(v, r, stage, shape):
    """One training row: tokens, loss weights, and the task of each answer token."""
    length = shape["length"]
    mixture = {**shape, **choose(r, stage["mixture"])}
    if "repeat" in mixture:
        return repeat(v, r, length)
    chunks = r.randint(*mixture["chunks"])
    size = r.randint(*mixture["size"])
    profile = {k: r.randint(*x) if isinstance(x, list) else x for k, x in mixture.get("profile", {}).items()}
    if mixture.get("list"):
        profile["pairs"] = r.randint(*shape["pairs"])
    context = corpus.sample(v, corpus.Profile(**profile), chunks, size, r.getrandbits(64), False)
    tokens = [v.bos]
    for chunk in context.chunks:
        tokens += chunk
    tokens = tokens[:length + 1]
    weights, tasks = [TEXT] * len(tokens), [0] * len(tokens)
    by_task = {}
    for q in context.questions:
        by_task.setdefault(q.task, []).append(q)
    for group in by_task.values():
        r.shuffle(group)
    importance = stage.get("questions", {})
    while by_task:
        names = list(by_task)
        task = r.choices(names, [importance.get(n, 1.0) for n in names])[0]
        q = by_task[task].pop()
        if not by_task[task]:
            del by_task[task]
        ask, answer = corpus.prompt(v, q.question), q.answer + [v.eos]
        if len(tokens) + len(ask) + len(answer) > length + 1:
            if length + 1 - len(tokens) < 12:
                break
            continue
        tokens += ask + answer
        weights += [QUESTION] * len(ask) + [ANSWER] * len(q.answer) + [END]
        # Only the first token of an answer is counted: the others follow from it.
        tasks += [0] * len(ask) + [TASKS.index(task)] + [0] * len(q.answer)
    missing = length + 1 - len(tokens)
    return tokens + [v.pad] * missing, weights + [0.0] * missing, tasks + [0] * missing


def repeat(v, r, length):
    """A random string again and again: what an induction head is for."""
    n = r.randint(6, 40)
    block = r.sample(range(7, len(v.tokens)), n)
    tokens = (block * (length // n + 2))[:length + 1]
    seen = min(n, length + 1)
    rest = length + 1 - seen
    return tokens, [0.0] * seen + [0.5] * rest, [0] * seen + [TASKS.index("repeat")] * rest


def batch(v, r, stage, shape, rows):
    return [np.array(x) for x in zip(*(sequence(v, r, stage, shape) for _ in range(rows)))]


def chosen_rows(r, weights, share):
    """Rows that get logits: every answer, and a reweighted sample of the rest."""
    strong = np.nonzero(weights >= 0.25)[0]
    weak = np.nonzero((weights > 0) & (weights < 0.25))[0]
    limit = int(len(weights) * share)
    if len(strong) > limit:
        strong = np.sort(np.array(r.sample(list(strong), limit)))
    kept = np.array(r.sample(range(len(weak)), min(limit - len(strong), len(weak))), dtype=np.int64)
    rows = np.concatenate([strong, weak[kept]])
    w = weights[rows].astype(np.float32)
    w[len(strong):] *= len(weak) / max(1, len(kept))
    return rows, w / w.sum()


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration of Muon (Jordan et al., 2024), in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * (m @ m)) @ x
    return (x.mT if tall else x).float()


class Shared:
    """The vectors that all workers see: parameters and optimiser state."""

    def __init__(self, n, device):
        self.flat, self.momentum, self.variance = (torch.zeros(n, device=device) for _ in range(3))
        # [task, (answers, right, loss)]; the last row counts tokens.
        self.stats = torch.zeros(len(TASKS) + 1, 3, dtype=torch.float64)
        # steps and tokens of this stage; a worker that wants to stop; compile turn
        self.count = torch.zeros(2, dtype=torch.float64)
        self.stop = torch.zeros(1, dtype=torch.int64)
        if device == "cpu":
            for t in vars(self).values():
                t.share_memory_()
        else:
            for t in (self.stats, self.count, self.stop):
                t.share_memory_()


def schedule(stage, done):
    """Learning-rate factor at `done` (0 to 1) of the stage."""
    start, end = stage.get("lr_from", 1.0), stage.get("lr_to", 1.0)
    return start + (end - start) * min(1.0, done)


def update(named, shared, gradient, stage, step, factor):
    lr, rate = stage["lr"] * factor, stage.get("adam", stage["lr"] / 5) * factor
    momentum = min(0.95, 0.85 + 0.1 * step / 200)
    for name, start, shape in named:
        n = shape.numel()
        g, p = gradient[start:start + n].view(shape), shared.flat[start:start + n].view(shape)
        m = shared.momentum[start:start + n].view(shape)
        if len(shape) == 2 and name != "embedding":
            m.lerp_(g, 1 - momentum)
            u = orthogonalise(g.lerp(m, momentum))
            p.mul_(1 - lr * 0.02).add_(u, alpha=-lr * max(1, shape[0] / shape[1]) ** 0.5)
        else:
            s = shared.variance[start:start + n].view(shape)
            m.lerp_(g, 0.1)
            s.mul_(0.98).addcmul_(g, g, value=0.02)
            p.add_(m / (s.sqrt() + 1e-8), alpha=-rate)


def train(rank, arguments, stage, shared, lock, device):
    os.nice(arguments.nice)
    if device == "cpu":
        torch.set_num_threads(1)
    for s in (signal.SIGINT, signal.SIGTERM):  # the parent hears them and raises the flag
        signal.signal(s, signal.SIG_IGN)
    v = corpus.load()
    config = reader.Config(len(v.tokens), stage["layers"])
    function = torch.compile(reader.layer, dynamic=False)
    net = reader.Llama(config, function, stage.get("block", 256)).to(device)
    local, gradient = torch.empty_like(shared.flat), torch.zeros_like(shared.flat)
    named, start = [], 0
    for name, p in net.named_parameters():
        n = p.numel()
        p.data, p.grad = local[start:start + n].view(p.shape), gradient[start:start + n].view(p.shape)
        named.append((name, start, p.shape))
        start += n
    micro = stage.get("micro", 2048)
    micros = max(1, stage["batch"] // micro)
    seed = random.Random(f"{arguments.seed}/{stage['name']}/{rank}/{int(shared.count[1])}").getrandbits(64)
    r = random.Random(seed)
    local.copy_(shared.flat)
    with lock:  # one compiles, the others find it in the cache
        for shape in shapes(stage):
            blank = torch.zeros(max(1, micro // shape["length"]), shape["length"], dtype=torch.long, device=device)
            net.logits(blank, torch.zeros(1, dtype=torch.long, device=device)).sum().backward()
    last, clock, seen = 0, time.time(), shared.stats.clone()
    while not shared.stop[0] and shared.count[1] < stage["tokens"]:
        local.copy_(shared.flat)
        gradient.zero_()
        stats = torch.zeros_like(shared.stats)
        for _ in range(micros):
            shape = choose(r, shapes(stage))
            rows = max(1, micro // shape["length"])
            tokens, weights, tasks = batch(v, r, stage, shape, rows)
            target, weights, tasks = tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1), tasks[:, 1:].reshape(-1)
            chosen, w = chosen_rows(r, weights, stage.get("share", 0.4))
            want = torch.from_numpy(target[chosen]).to(device)
            logits = net.logits(torch.from_numpy(tokens[:, :-1].copy()).to(device), torch.from_numpy(chosen).to(device))
            loss = F.cross_entropy(logits, want, reduction="none")
            (loss * torch.from_numpy(w / micros).to(device)).sum().backward()
            right, loss = (logits.argmax(-1) == want).cpu().numpy(), loss.detach().cpu().numpy()
            kind, weak = tasks[chosen], (weights[chosen] < 0.25) & (weights[chosen] > 0.05)
            for k in range(1, len(TASKS)):
                s = kind == k
                if s.any():
                    stats[k] += torch.tensor([s.sum(), right[s].sum(), loss[s].sum()])
            stats[0] += torch.tensor([weak.sum(), right[weak].sum(), loss[weak].sum()])
            stats[-1, 0] += rows * shape["length"]
        with lock:
            step = int(shared.count[0])
            shared.count[0] += 1
            shared.count[1] += float(stats[-1, 0])
            shared.stats += stats
            done = float(shared.count[1]) / stage["tokens"]
            warm = min(1.0, (step + 1) / stage.get("warm", 40))
            update(named, shared, gradient, stage, step, warm * schedule(stage, done))
        if rank == 0 and int(shared.count[0]) // LOG_EVERY > last:
            last = int(shared.count[0]) // LOG_EVERY
            since = shared.stats - seen
            seen = shared.stats.clone()
            entry = {"stage": stage["name"], "layers": stage["layers"], "step": int(shared.count[0]),
                     "tokens": int(shared.count[1]), "rate": round(float(since[-1, 0]) / (time.time() - clock)),
                     "text_loss": round(float(since[0, 2] / max(1, since[0, 0])), 3),
                     "answer_loss": round(float(since[1:-2, 2].sum() / max(1, since[1:-2, 0].sum())), 3)}
            entry.update({t: round(float(since[k, 1] / since[k, 0]), 3)
                          for k, t in enumerate(TASKS) if k and since[k, 0] > 0})
            clock = time.time()
            line = json.dumps(entry)
            print(line, flush=True)
            with open(arguments.out / "log.jsonl", "a") as log:
                log.write(line + "\n")
            if last % (SAVE_EVERY // LOG_EVERY) == 0:
                save(arguments.out, stage, shared)


def save(out, stage, shared):
    state = {"stage": stage["name"], "layers": stage["layers"], "count": shared.count.clone(),
             "flat": shared.flat.clone(), "momentum": shared.momentum.clone(), "variance": shared.variance.clone()}
    torch.save(state, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")


def flatten(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def unflatten(net, flat):
    start = 0
    for p in net.parameters():
        p.data.copy_(flat[start:start + p.numel()].view(p.shape))
        start += p.numel()


def exported(directory, v):
    """The state of a run that ended with this export: weights as stored, no moments."""
    from safetensors.torch import load_file

    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    net = reader.Llama(reader.Config(len(v.tokens), layers))
    net.load_hugging_face(load_file(directory / "model.safetensors"))
    flat = flatten(net)
    return {"stage": None, "layers": layers, "flat": flat,
            "momentum": torch.zeros_like(flat), "variance": torch.zeros_like(flat)}


def begin(stage, state, v, seed, device):
    """Parameters and optimiser state for a stage: new, grown, or as they were."""
    torch.manual_seed(seed)
    net = reader.Llama(reader.Config(len(v.tokens), stage["layers"]))
    shared = Shared(flatten(net).numel(), device)
    if state is None:
        reader.structured_init(net, (v.initials, v.finals), seed)
    elif state["layers"] == stage["layers"]:
        shared.momentum.copy_(state["momentum"])
        shared.variance.copy_(state["variance"])
        unflatten(net, state["flat"])
        if state["stage"] == stage["name"]:
            shared.count.copy_(state["count"])
    else:
        config = reader.Config(len(v.tokens), state["layers"])
        for key in ("momentum", "variance", "flat"):
            small = reader.Llama(config)
            unflatten(small, state[key])
            if key == "flat":
                reader.grow(small, net)
            else:
                empty = reader.Llama(net.config)
                unflatten(empty, torch.zeros_like(shared.flat))
                reader.grow(small, empty)
                getattr(shared, key).copy_(flatten(empty))
    shared.flat.copy_(flatten(net))
    return shared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--recipe", type=pathlib.Path, default=pathlib.Path(__file__).with_name("recipe.json"))
    parser.add_argument("--init", type=pathlib.Path, help="an exported model to start from; needs --first")
    parser.add_argument("--first", help="the stage to start with; without a run to go on with, the recipe's first")
    parser.add_argument("--workers", type=int, default=2, help="processes on a CPU")
    parser.add_argument("--nice", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    v = corpus.load()
    stages = json.loads(arguments.recipe.read_text())["stages"]
    path = arguments.out / "state.pt"
    state = torch.load(path, weights_only=True, map_location=device) if path.exists() else None
    names = [s["name"] for s in stages]
    if state is None and arguments.init:
        if arguments.first is None:
            parser.error("--init says from where, --first with which stage")
        state = exported(arguments.init, v)
    name = arguments.first or (state["stage"] if state else names[0])
    if name not in names:
        parser.error(f"the recipe has no stage {name!r}; there are {', '.join(names)}")
    first = names.index(name)
    context = mp.get_context("spawn")
    for stage in stages[first:]:
        shared = begin(stage, state, v, arguments.seed, device)
        signal.signal(signal.SIGTERM, lambda *_: shared.stop.fill_(1))
        signal.signal(signal.SIGINT, lambda *_: shared.stop.fill_(1))
        lock = context.Lock()
        if device == "cuda":
            train(0, arguments, stage, shared, lock, device)
        else:
            workers = [context.Process(target=train, args=(k, arguments, stage, shared, lock, device))
                       for k in range(arguments.workers)]
            for w in workers:
                w.start()
            for w in workers:
                w.join()
            if any(w.exitcode for w in workers):
                raise SystemExit("a worker failed; see above")
        save(arguments.out, stage, shared)
        if shared.stop[0]:
            return
        state = torch.load(path, weights_only=True, map_location=device)


if __name__ == "__main__":
    main()
