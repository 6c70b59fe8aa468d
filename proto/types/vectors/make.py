#!/usr/bin/env python3
"""Derives the published identity vectors from their description alone.

An independent implementation of the derivation in ../src: it shares no code with
the Rust one, so the two check each other. Needs `pip install blake3`.
Prints identity.json.
"""
import json
import struct

from blake3 import blake3

DTYPES = {"f32": 1, "f16": 2, "bf16": 3, "f8e4m3": 4, "f8e5m2": 5}


def field(tag, data):
    return struct.pack("<BQ", tag, len(data)) + data


def digest(context, *fields):
    return blake3(b"".join(fields), derive_key_context=context).digest()


def layout_encoding(v):
    if isinstance(v["planes"], list):
        kind, (key_dim, value_dim) = 1, v["planes"]
    else:
        kind, key_dim, value_dim = 2, v["planes"], 0
    return struct.pack("<BBBBHHHHI", 1, DTYPES[v["dtype"]], kind, 0, v["layers"],
                       v["kv_heads"], key_dim, value_dim, v["chunk_tokens"])


def derive(v):
    layout = layout_encoding(v)
    fields = [field(1, v["architecture"].encode()), field(2, v["weights"].encode()),
              field(3, v["rope"].encode())]
    if v["adapter"] is not None:
        fields += [field(4, v["adapter"][0].encode()), field(5, v["adapter"][1].encode())]
    fields += [field(6, layout), field(7, bytes([v["tokenizer_byte"]] * 32)),
               field(8, v["tenant"].encode())]
    namespace = digest("kvasir v1 namespace", *fields)
    tokens = [i * 7 + 1 for i in range(v["token_count"])]
    size, keys = v["chunk_tokens"], []
    for start in range(0, len(tokens) - size + 1, size):
        parent = [field(2, keys[-1])] if keys else []
        chunk = struct.pack(f"<{size}I", *tokens[start:start + size])
        keys.append(digest("kvasir v1 chunk prefix", field(1, namespace), *parent, field(3, chunk)))
    everything = struct.pack(f"<{len(tokens)}I", *tokens)
    before = struct.pack(f"<{v['content_prefix']}I", *tokens[:v["content_prefix"]])
    return {
        **v,
        "layout_encoding": layout.hex(),
        "layout_digest": digest("kvasir v1 layout", field(1, layout)).hex(),
        "namespace": namespace.hex(),
        "prefix_keys": [key.hex() for key in keys],
        "content_key": digest("kvasir v1 chunk content", field(1, namespace), field(3, everything)).hex(),
        "content_key_after": digest("kvasir v1 chunk content", field(1, namespace),
                                    field(3, everything), *[field(5, before)] * bool(before)).hex(),
        "opaque_key": digest("kvasir v1 chunk opaque", field(1, namespace), field(4, b"block-1")).hex(),
    }


BASE = {
    "name": "grouped-query", "architecture": "llama hidden=4096", "weights": "rev-1",
    "rope": "default theta=500000", "adapter": None, "layers": 32, "kv_heads": 8,
    "planes": [128, 128], "chunk_tokens": 256, "dtype": "bf16", "tokenizer_byte": 7,
    "tenant": "", "token_count": 600, "content_prefix": 1,
}
CASES = [
    BASE,
    {**BASE, "name": "multi-head", "kv_heads": 32, "dtype": "f16", "chunk_tokens": 64},
    {**BASE, "name": "latent", "layers": 61, "kv_heads": 1, "planes": 576, "chunk_tokens": 64},
    {**BASE, "name": "different key and value widths", "planes": [192, 128], "dtype": "f8e4m3"},
    {**BASE, "name": "adapter", "adapter": ["sql", "3"]},
    {**BASE, "name": "empty adapter is not no adapter", "adapter": ["", ""]},
    {**BASE, "name": "tenant", "tenant": "acme", "content_prefix": 7},
    {**BASE, "name": "shorter than a chunk", "token_count": 255, "dtype": "f32",
     "content_prefix": 0},
]

print(json.dumps({
    "tokens": "token i of token_count is 7*i + 1",
    "tokenizer": "32 times tokenizer_byte",
    "content_key_after": "the prefix is the first content_prefix tokens",
    "opaque_key": "name is the ASCII text block-1",
    "vectors": [derive(v) for v in CASES],
}, indent=1))
