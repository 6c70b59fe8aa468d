"""Writes a trained reader as a Hugging Face checkpoint, with questions for the demo.

    python export.py --state RUN/state.pt --out DIR
    python3 export.py --tokenizer

The first needs requirements.txt. The second writes tokenizer.json beside this
file, which the first copies and the tests read; standard library only.
"""

import argparse
import hashlib
import json
import pathlib
import shutil

import corpus

HERE = pathlib.Path(__file__).parent

# (name, how many, chunks, tokens of a chunk); `<s>` comes on top.
DOCUMENTS = [("short", 4, 8, 64), ("medium", 3, 12, 80), ("long", 3, 16, 96), ("longest", 2, 16, 120)]
DOCUMENT_PROFILE = {"total": 1000, "alias": 400, "role": 350, "needles": 150, "relation": 800,
                    "continuation": 350, "persons": 2}
# One question of each group.
GROUPS = [["hop1"], ["hop2"], ["coref2", "coref3", "coref4"], ["override"], ["compare"], ["needle"],
          ["copy", "copyref"]]
SEED = 1000
# Distance of the two best logits at each token of a reference, so that a
# correct engine gives the same text although it rounds differently.
MARGIN = 0.05


def tokenizer(v):
    """`tokenizer.json`: WordPiece over words between spaces. Nothing is added in front."""
    special = v.spec["special"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": v.ids[word], "content": word, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for word in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": v.tokens[v.unk],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": v.ids,
        },
    }


def tokenizer_config(v):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": v.tokens[v.bos],
        "eos_token": v.tokens[v.eos],
        "pad_token": v.tokens[v.pad],
        "unk_token": v.tokens[v.unk],
        "clean_up_tokenization_spaces": False,
    }


def export(v, state_path, out):
    import torch
    from safetensors.torch import save_file

    import model as reader
    import train

    state = torch.load(state_path, weights_only=True, map_location="cpu")
    net = reader.Llama(reader.Config(len(v.tokens), state["layers"]))
    train.unflatten(net, state["flat"])
    save_file(net.hugging_face(), out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", net.config.hugging_face())


def questions(v, directory):
    """Lines of `questions.jsonl`: documents over held-out names, and what transformers answers."""
    import greedy

    model = greedy.load(directory)
    seed = SEED
    for name, count, chunks, size in DOCUMENTS:
        for number in range(count):
            document, seed = f"{name}-{number + 1}", seed + 1
            context, chosen = choose(v, model, chunks, size, seed)
            tokens = [v.bos, *(token for chunk in context.chunks for token in chunk)]
            for turn, (question, reference) in enumerate(chosen):
                yield {
                    "id": f"{document}/{turn + 1}",
                    "kind": question.task,
                    "document_id": document,
                    "document_tokens": len(tokens),
                    "document": v.text(tokens),
                    "question": v.text(corpus.prompt(v, question.question)),
                    "answer": v.text(question.answer),
                    "reference": v.text(reference),
                }


def choose(v, model, chunks, size, seed):
    """The first context with a question of every group whose reference is clear, and those questions."""
    import greedy

    profile = corpus.Profile(**DOCUMENT_PROFILE)
    for attempt in range(corpus.ATTEMPTS):
        rng = corpus.Rng(corpus.mix(seed, attempt))
        context = corpus.Builder(v, profile, chunks, size, rng, True).build()
        rng.shuffle(context.questions)
        groups = [[q for q in context.questions if q.task in kinds] for kinds in GROUPS]
        if not all(groups):
            continue
        before = [v.bos, *(token for chunk in context.chunks for token in chunk)]
        chosen = []
        for group in groups:
            for question in group[:6]:
                prompt = before + corpus.prompt(v, question.question)
                tokens, steps = greedy.greedy(model, prompt, v.eos)
                if tokens[-1] == v.eos and len(tokens) <= 8 and greedy.margin(steps) >= MARGIN:
                    chosen.append((question, tokens[:-1]))
                    break
        if len(chosen) == len(groups):
            return context, chosen
    raise SystemExit("no document has a clear answer of every kind: is the model trained?")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--tokenizer", action="store_true", help="write tokenizer.json beside this file")
    parser.add_argument("--state", type=pathlib.Path, help="state.pt of a training run")
    parser.add_argument("--out", type=pathlib.Path, help="directory to write")
    arguments = parser.parse_args()
    v = corpus.load()
    if arguments.tokenizer:
        write_json(HERE / "tokenizer.json", tokenizer(v))
        return
    if arguments.state is None or arguments.out is None:
        parser.error("--tokenizer, or --state and --out")
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    export(v, arguments.state, out)
    shutil.copy(HERE / "tokenizer.json", out)
    write_json(out / "tokenizer_config.json", tokenizer_config(v))
    with open(out / "questions.jsonl", "w") as file:
        file.writelines(json.dumps(question) + "\n" for question in questions(v, out))
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "questions.jsonl"]
    for name in names:
        (out / name).chmod(0o644)
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
