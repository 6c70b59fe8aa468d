"""A small Llama (RMSNorm, RoPE, GQA, SwiGLU, tied embeddings) for training.

The layer is one function of its weights, so that `torch.compile` compiles it
once and not once a layer.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocabulary: int
    layers: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 640
    theta: float = 10000.0
    eps: float = 1e-5
    context: int = 4096

    def dict(self):
        return asdict(self)

    def hugging_face(self):
        """`config.json` in the layout of transformers."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "hidden_act": "silu",
            "max_position_embeddings": self.context, "rms_norm_eps": self.eps,
            "rope_theta": self.theta, "tie_word_embeddings": True,
            "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }


def rope(length, config, device):
    frequency = config.theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention_blocks(q, k, v, mask, block):
    """Causal attention in blocks of queries: faster than SDPA's backward on a CPU."""
    batch, kv_heads, group, length, width = q.shape
    k = k.reshape(batch * kv_heads, length, width)
    v = v.reshape(batch * kv_heads, length, width)
    out = []
    for start in range(0, length, block):
        n = min(block, length - start)
        end = start + n
        rows = q[:, :, :, start:end].reshape(batch * kv_heads, group * n, width)
        score = torch.bmm(rows, k[:, :end].transpose(1, 2)).view(batch * kv_heads, group, n, end)
        weight = torch.softmax(score.float() + mask[start:end, :end], -1).to(q.dtype)
        weight = weight.view(batch * kv_heads, group * n, end)
        out.append(torch.bmm(weight, v[:, :end]).view(batch, kv_heads, group, n, width))
    return torch.cat(out, 3) if len(out) > 1 else out[0]


def layer(x, n1, wq, wk, wv, wo, n2, wg, wu, wd, cos, sin, mask, kv_heads: int, eps: float, block: int):
    half = torch.bfloat16
    batch, length, _ = x.shape
    width = cos.shape[-1]
    h = norm(x, n1, eps).to(half)
    q = F.linear(h, wq.to(half)).view(batch, length, kv_heads, -1, width).permute(0, 2, 3, 1, 4)
    k = F.linear(h, wk.to(half)).view(batch, length, kv_heads, width).transpose(1, 2)
    v = F.linear(h, wv.to(half)).view(batch, length, kv_heads, width).transpose(1, 2)
    q = (rotate(q.float(), cos, sin) * width**-0.5).to(half)
    k = rotate(k.float(), cos, sin).to(half)
    if x.is_cuda:
        o = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=1.0, enable_gqa=True)
        o = o.view(batch, kv_heads, -1, length, width)
    else:
        o = attention_blocks(q, k, v, mask, block)
    o = o.permute(0, 3, 1, 2, 4).reshape(batch, length, -1)
    x = x + F.linear(o, wo.to(half)).float()
    h = norm(x, n2, eps).to(half)
    a = F.silu(F.linear(h, wg.to(half)).float()) * F.linear(h, wu.to(half)).float()
    return x + F.linear(a.to(half), wd.to(half)).float()


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()

        def matrix(rows, columns, gain):
            return nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))

        self.n1, self.n2 = nn.Parameter(torch.ones(c.hidden)), nn.Parameter(torch.ones(c.hidden))
        self.q = matrix(c.heads * c.head_dim, c.hidden, 0.7)
        self.k = matrix(c.kv_heads * c.head_dim, c.hidden, 0.7)
        self.v = matrix(c.kv_heads * c.head_dim, c.hidden, 0.7)
        # Zero output projections: a new layer adds nothing to the residual stream.
        self.o = matrix(c.hidden, c.heads * c.head_dim, 0.0)
        self.gate = matrix(c.feed_forward, c.hidden, 0.7)
        self.up = matrix(c.feed_forward, c.hidden, 0.7)
        self.down = matrix(c.hidden, c.feed_forward, 0.0)


class Llama(nn.Module):
    NAMES = {
        "n1": "input_layernorm", "n2": "post_attention_layernorm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }

    def __init__(self, config, function=layer, block=256):
        super().__init__()
        self.config, self.function, self.block = config, function, block
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.hidden) * 0.05)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        self.tables = {}

    def table(self, length, device):
        if length not in self.tables:
            mask = torch.full((length, length), float("-inf"), device=device).triu(1)
            self.tables[length] = (*rope(length, self.config, device), mask)
        return self.tables[length]

    def hidden(self, tokens):
        c = self.config
        cos, sin, mask = self.table(tokens.shape[1], tokens.device)
        x = F.embedding(tokens, self.embedding)
        for l in self.layers:
            x = self.function(x, l.n1, l.q, l.k, l.v, l.o, l.n2, l.gate, l.up, l.down,
                              cos, sin, mask, c.kv_heads, c.eps, self.block)
        return norm(x, self.norm, c.eps)

    def logits(self, tokens, rows):
        """Logits at the given rows of the flattened batch."""
        h = self.hidden(tokens).reshape(-1, self.config.hidden)[rows].to(torch.bfloat16)
        return F.linear(h, self.embedding.to(torch.bfloat16)).float()

    def hugging_face(self):
        """Tensors in bf16, under the names of transformers."""
        return {k: p.detach().to(torch.bfloat16).contiguous().clone() for k, p in self.named().items()}

    @torch.no_grad()
    def load_hugging_face(self, tensors):
        for name, parameter in self.named().items():
            parameter.copy_(tensors[name])

    def named(self):
        state = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, l in enumerate(self.layers):
            for ours, theirs in self.NAMES.items():
                state[f"model.layers.{i}.{theirs}.weight"] = getattr(l, ours)
        return state


@torch.no_grad()
def structured_init(model, classes, seed):
    """Hand-set heads to start from; the layout stays plain Llama.

    A model of this size sees too few tokens on a CPU to form induction heads
    (Olsson et al., 2022) by itself. Layer 0 gets two previous-token heads
    (offsets 1 and 2) and two heads that look at the latest name (its first
    and its second syllable); layer 1 an induction head; layer 2 a head that
    looks at tokens with the same latest name. All else adds nothing at first.

    `classes` is (ids of first syllables, ids of second syllables).
    """
    c = model.config
    width, half = c.head_dim, c.head_dim // 2
    g = torch.Generator().manual_seed(seed)

    def subspace():
        """Orthonormal rows that leave the three class dimensions alone."""
        q, _ = torch.linalg.qr(torch.randn(c.hidden - 3, c.hidden - 3, generator=g))
        out = torch.zeros(width, c.hidden)
        out[:, 3:] = q[:width]
        return out

    theta = c.theta ** -(torch.arange(0, width, 2).float() / width)
    model.embedding.copy_(torch.randn(model.embedding.shape, generator=g) * 0.05)
    model.embedding[:, 0] = 0.3
    model.embedding[:, 1:3] = 0
    for dimension, ids in zip((1, 2), classes):
        model.embedding[ids, dimension] = 0.3
    identity, previous, before = subspace(), subspace(), subspace()
    first, second, copied = subspace(), subspace(), subspace()

    l = model.layers[0]
    sharp = 10
    l.k[:width] = 0
    l.k[:sharp, 0] = 1.0
    for head, offset in ((0, 1), (1, 2)):
        l.q[head * width:(head + 1) * width] = 0
        for f in range(sharp):
            l.q[head * width + f, 0] = torch.cos(theta[f] * offset)
            l.q[head * width + f + half, 0] = -torch.sin(theta[f] * offset)
    l.v[:width] = identity
    l.k[width:2 * width] = 0
    for head, dimension in ((2, 1), (3, 2)):
        l.q[head * width:(head + 1) * width] = 0
        for f in range(6 + dimension % 2, half, 2):
            l.k[width + f, dimension] = 0.7
            l.q[head * width + f, 0] = 0.7
    l.v[width:2 * width] = identity
    for head, out in ((0, previous), (1, before), (2, first), (3, second)):
        l.o[:, head * width:(head + 1) * width] = 0.1 * out.T

    slow = list(range(16, half)) + list(range(16 + half, width))
    l = model.layers[1]
    l.q[:width], l.k[:width] = 0, 0
    for i, dimension in enumerate(slow):
        l.q[dimension], l.k[dimension] = 2.5 * identity[i], 2.5 * previous[i]
    l.v[:width] = copied
    l.o[:, :width] = 0.5 * copied.T

    l = model.layers[2]
    l.q[:width], l.k[:width] = 0, 0
    for i, dimension in enumerate(slow):
        source = first if i % 2 else second
        l.q[dimension] = l.k[dimension] = 1.5 * source[i]
    l.v[:width] = copied
    l.o[:, :width] = 0.1 * copied.T


@torch.no_grad()
def grow(small, large):
    """Copies a trained model into the lowest layers of a deeper one.

    The layers above start silent, so that the function stays the same.
    """
    large.embedding.copy_(small.embedding)
    large.norm.copy_(small.norm)
    for to, source in zip(large.layers, small.layers):
        for name in Llama.NAMES:
            getattr(to, name).copy_(getattr(source, name))
