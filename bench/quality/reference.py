"""Writes reference.json into a model directory: what transformers computes from it in f32.

    python reference.py --model DIR [--count 200]

Prompts are questions of the evaluation tasks; the file says which, not their
tokens. Per generated token it holds the 16 largest logits and the logsumexp of
all. `kvasir-bench reference --model DIR` compares. Needs requirements.txt.
"""

import argparse
import json
import pathlib

import torch
import transformers

import corpus
import greedy

SEED = 7
CHUNK_TOKENS = 64
# Chunks of a context: 4 to 8, so that with 13 tasks every pair occurs.
LEAST_CHUNKS, SIZES = 4, 5
KEPT = 16
# Distance of the two best logits at each token, several times what f32 rounding
# moves them.
MARGIN = 5e-3


def prompts(v, model, count):
    tasks = list(v.tasks.values())
    for index in range(count):
        task, chunks = tasks[index % len(tasks)], LEAST_CHUNKS + index % SIZES
        context = corpus.evaluation(v, task, chunks, CHUNK_TOKENS, SEED, index)
        before = [v.bos, *(token for chunk in context.chunks for token in chunk)]
        for number, question in enumerate(context.questions):
            prompt = before + corpus.prompt(v, question.question)
            tokens, steps = greedy.greedy(model, prompt, v.eos)
            if greedy.margin(steps) >= MARGIN:
                best = steps.topk(KEPT)
                yield {
                    "task": task.name,
                    "chunks": chunks,
                    "index": index,
                    "question": number,
                    "tokens": tokens,
                    "ids": best.indices.tolist(),
                    "logits": rounded(best.values),
                    "logsumexp": rounded(steps.double().logsumexp(-1)),
                }
                break


def rounded(values):
    return [rounded(value) if value.dim() else round(float(value), 5) for value in values]


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="prompts")
    arguments = parser.parse_args()
    v = corpus.load()
    model = greedy.load(arguments.model)
    header = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": SEED,
        "chunk_tokens": CHUNK_TOKENS,
    }
    rows = [json.dumps(row, separators=(",", ":")) for row in prompts(v, model, arguments.count)]
    if len(rows) < arguments.count:
        raise SystemExit(f"only {len(rows)} prompts have clear answers: is the model trained?")
    body = ",\n".join(rows)
    text = f'{json.dumps(header)[:-1]}, "prompts": [\n{body}\n]}}\n'
    (arguments.model / "reference.json").write_text(text)


if __name__ == "__main__":
    main()
