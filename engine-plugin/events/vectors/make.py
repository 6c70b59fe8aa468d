"""Test vectors, made by vLLM itself: `python make.py`, with the interpreter that has vLLM 0.32.

`hashes.json`: prompts, and the hashes of their blocks by vLLM's own request hasher.
`events.json`: batches of events, encoded by msgspec as vLLM's publisher does, as maps; and as
arrays, by the same classes declared `array_like`, as vLLM declared them before.
"""

import json
import os
from pathlib import Path

import msgspec
from vllm.distributed import kv_events
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

HERE = Path(__file__).parent


def hashes() -> list[dict]:
    tokens = [(i * 7919 + 13) % 151_936 for i in range(200)]
    edge = [0, 23, 24, 255, 256, 65_535, 65_536, 2**31 - 1, 2**32 - 1] * 8
    image = {"identifier": "5f2c" * 16, "offset": 20, "length": 30}
    next_image = {"identifier": "second", "offset": 50, "length": 14}
    far_image = {"identifier": "third", "offset": 130, "length": 33}
    lora = {"name": "sql", "path": "/adapters/sql"}
    cases = [
        ("plain", {}),
        ("block of 16", {"block_size": 16}),
        ("PYTHONHASHSEED", {"seed": "0"}),
        ("integers of every length", {"tokens": edge}),
        ("shorter than a block", {"tokens": tokens[:31]}),
        ("adapter", {"lora": lora}),
        ("salt", {"salt": "tenant-1"}),
        ("salt beyond ASCII", {"salt": "Gebühr ☂"}),
        ("images", {"items": [image, next_image, far_image]}),
        ("all", {"lora": lora, "salt": "s", "items": [image, far_image]}),
        ("all, PYTHONHASHSEED", {"seed": "random", "lora": lora, "salt": "s"}),
    ]
    made = []
    for number, (name, extra) in enumerate(cases):
        case = {"name": name, "seed": None, "block_size": 32, "tokens": tokens}
        case |= {"lora": None, "salt": None, "items": []} | extra
        os.environ.pop("PYTHONHASHSEED", None)
        if case["seed"] is not None:
            os.environ["PYTHONHASHSEED"] = case["seed"]
        kv_cache_utils.init_none_hash(sha256_cbor)
        adapter = case["lora"] and LoRARequest(case["lora"]["name"], 1, case["lora"]["path"])
        request = Request(
            request_id=str(number),
            prompt_token_ids=case["tokens"],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            lora_request=adapter or None,
            cache_salt=case["salt"],
            mm_features=[
                MultiModalFeatureSpec(
                    data=None,
                    modality="image",
                    identifier=item["identifier"],
                    mm_position=PlaceholderRange(offset=item["offset"], length=item["length"]),
                )
                for item in case["items"]
            ],
            block_hasher=kv_cache_utils.get_request_block_hasher(case["block_size"], sha256_cbor),
        )
        case["none_hash"] = kv_cache_utils.NONE_HASH.hex()
        case["hashes"] = [it.hex() for it in request.block_hashes]
        os.environ.pop("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", None)
        case["events"] = [
            str(kv_cache_utils.maybe_convert_block_hash(it)) for it in request.block_hashes
        ]
        made.append(case)
    return made


def arrays(kind: type) -> type:
    """The class as it was when events were arrays."""
    fields = [
        (it.name, it.type)
        if it.default is msgspec.NODEFAULT
        else (it.name, it.type, it.default)
        for it in msgspec.structs.fields(kind)
    ]
    return msgspec.defstruct(
        kind.__name__, fields, array_like=True, omit_defaults=True, tag=True
    )


def as_array(event: msgspec.Struct) -> msgspec.Struct:
    return arrays(type(event))(*(getattr(event, it) for it in event.__struct_fields__))


def events() -> list[dict]:
    digest = bytes(range(32))
    plain = BlockStored(
        block_hashes=[1, 2**63 + 5, 2**64 - 1],
        parent_block_hash=None,
        token_ids=list(range(96)),
        block_size=32,
        lora_id=None,
        medium=kv_events.MEDIUM_GPU,
        lora_name=None,
    )
    full = BlockStored(
        block_hashes=[digest, bytes(reversed(digest))],
        parent_block_hash=digest,
        token_ids=[0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1],
        block_size=4,
        lora_id=3,
        medium=kv_events.MEDIUM_CPU,
        lora_name="sql",
        extra_keys=[("sql", ("image", -12), "salt"), None],
        group_idx=1,
        kv_cache_spec_kind="sliding_window",
        kv_cache_spec_sliding_window=4096,
        locality="REMOTE",
        ownership="obj",
        session_id="s-1",
    )
    digests = BlockStored([7], 6, [1, 2], 2, None, None, None, extra_keys=[(digest,)])
    gone = BlockRemoved(block_hashes=[1, digest], medium="GPU")
    gone_place = BlockRemoved([2], "STORAGE", group_idx=2, locality="LOCAL", ownership="fs")
    silent = BlockRemoved([3], None)
    batches = [
        ("empty", KVEventBatch(0.0, [])),
        ("stored", KVEventBatch(1700000000.25, [plain], data_parallel_rank=0)),
        ("every field", KVEventBatch(1.5, [full, digests], data_parallel_rank=300)),
        ("removed", KVEventBatch(2.0, [gone, gone_place, silent])),
        ("cleared", KVEventBatch(3.0, [plain, AllBlocksCleared(), gone], data_parallel_rank=1)),
    ]
    made = []
    for name, batch in batches:
        old = KVEventBatch(
            batch.ts, [as_array(it) for it in batch.events], batch.data_parallel_rank
        )
        encode = msgspec.msgpack.Encoder().encode
        made.append({"name": name, "maps": encode(batch).hex(), "arrays": encode(old).hex()})
    return made


if __name__ == "__main__":
    for name, made in (("hashes", hashes()), ("events", events())):
        text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text.replace("},{\"name", "},\n{\"name") + "\n")
