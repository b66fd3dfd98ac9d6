"""Train zoo:lm, a Qwen3-MoE of 8 million parameters, and export it for transformers.

The forward pass below is the same function as transformers', written for speed (all experts in one
grouped product, one compiled graph, bf16 under autocast with float32 master weights). The end of
the script loads the exported folder with transformers and asserts equal logits.

    python analysis/zoo/train_lm.py --pack .zoo-pack --out zoo-out/lm --max-seconds 520
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pace import adamw, balance, options, paced, summary, update, values
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from vocabulary import read_rows

CONTEXT = 512
SHAPE = {
    "vocab_size": 5120,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
}


def build_config(shape: dict[str, int]) -> Qwen3MoeConfig:
    """Return the configuration of zoo:lm (or of a smaller one, for tests)."""
    return Qwen3MoeConfig(
        **shape,
        intermediate_size=shape["moe_intermediate_size"] * shape["num_experts_per_tok"],
        max_position_embeddings=CONTEXT,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


class Forward:
    """Qwen3-MoE's forward pass over a dictionary of its parameters."""

    def __init__(self, config: Qwen3MoeConfig, dropout: float, device: torch.device) -> None:
        self.c = config
        self.dropout = dropout
        half = config.head_dim // 2
        inverse = 10000.0 ** (-torch.arange(half, device=device).float() / half)
        angle = torch.arange(CONTEXT, device=device).float()[:, None] * inverse
        self.cos = torch.cat([angle, angle], -1).cos()
        self.sin = torch.cat([angle, angle], -1).sin()

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Normalize by the root mean square."""
        y = x.float()
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply rotary positions."""
        first, second = x.chunk(2, -1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat([-second, first], -1) * self.sin[:length]

    def attention(self, p: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
        """Return causal self-attention with normalized queries and keys."""
        batch, length, _ = x.shape
        parts = []
        for name, heads in (("q", self.c.num_attention_heads), ("k", self.c.num_key_value_heads)):
            y = F.linear(x, p[f"{at}{name}_proj.weight"])
            y = y.view(batch, length, heads, self.c.head_dim)
            y = self.norm(y, p[f"{at}{name}_norm.weight"]).transpose(1, 2)
            parts.append(self.rotate(y))
        value = F.linear(x, p[f"{at}v_proj.weight"])
        value = value.view(batch, length, -1, self.c.head_dim).transpose(1, 2)
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        query, key = parts[0].to(value.dtype), parts[1].to(value.dtype)
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(batch, length, -1), p[f"{at}o_proj.weight"])

    def experts(
        self, p: dict[str, torch.Tensor], at: str, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output, the balancing loss with the z-loss, and the counts per expert."""
        num_experts, k = self.c.num_experts, self.c.num_experts_per_tok
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), p[f"{at}gate.weight"].float())
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        counts = torch.zeros(num_experts, device=x.device, dtype=torch.float32)
        counts = counts.scatter_add(
            0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.float32)
        )
        ends = counts.to(torch.int32).cumsum(0, dtype=torch.int32)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32
        rows = x.to(dtype)[order // k]
        up = p[f"{at}experts.gate_up_proj"].to(dtype).transpose(-2, -1)
        down = p[f"{at}experts.down_proj"].to(dtype).transpose(-2, -1)
        gate, hidden = F.grouped_mm(rows, up, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * hidden, down, offs=ends)
        rows = rows * weights.flatten()[order, None].to(dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = rows[back].view(-1, k, x.shape[-1]).sum(1)
        share = counts / counts.sum()
        balance = num_experts * (share * probabilities.mean(0)).sum()
        z_loss = logits.logsumexp(-1).pow(2).mean()
        return y, balance * self.c.router_aux_loss_coef + 1e-4 * z_loss, counts

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout in training."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def __call__(
        self, p: dict[str, torch.Tensor], ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, the summed router losses and the counts (layer, expert)."""
        x = self.drop(F.embedding(ids, p["model.embed_tokens.weight"]))
        extra = x.new_zeros((), dtype=torch.float32)
        usage = []
        for layer in range(self.c.num_hidden_layers):
            at = f"model.layers.{layer}."
            y = self.norm(x, p[f"{at}input_layernorm.weight"])
            x = x + self.drop(self.attention(p, f"{at}self_attn.", y))
            y = self.norm(x, p[f"{at}post_attention_layernorm.weight"]).flatten(0, 1)
            y, loss, counts = self.experts(p, f"{at}mlp.", y)
            x = x + self.drop(y.view_as(x))
            extra = extra + loss
            usage.append(counts)
        x = self.norm(x, p["model.norm.weight"])
        return F.linear(x, p["model.embed_tokens.weight"]), extra, torch.stack(usage)


def tokenize(pack: Path, limit: int | None) -> tuple[np.ndarray, list[tuple[str, np.ndarray, int]]]:
    """Return one array of training tokens and, per held-out document, domain, tokens, bytes."""
    tokenizer = AutoTokenizer.from_pretrained(pack / "lm")
    rows = read_rows(pack / "lm.jsonl.xz")[slice(None, None, limit)]
    encoded = tokenizer([row["text"] for row in rows])["input_ids"]
    order = np.random.default_rng(0).permutation(len(rows))
    train = [np.array([0, *encoded[i]], np.int64) for i in order if rows[i]["split"] == "train"]
    held = [
        (row["domain"], np.array([0, *ids, 0], np.int64), len(row["text"].encode()))
        for row, ids in zip(rows, encoded, strict=True)
        if row["split"] == "test"
    ]
    return np.concatenate(train), held


@torch.no_grad()
def held_out_bits(
    forward: Forward,
    p: dict[str, torch.Tensor],
    held: list[tuple[str, np.ndarray, int]],
    device: torch.device,
    max_bytes: int,
) -> dict[str, float]:
    """Bits per byte by domain over windows of the context (a quick look; see evaluate.py)."""
    dropout, forward.dropout = forward.dropout, 0.0
    bits: dict[str, float] = {}
    sizes: dict[str, int] = {}
    windows: dict[str, list[np.ndarray]] = {}
    for domain, ids, num_bytes in held:
        if sizes.get(domain, 0) > max_bytes:
            continue
        sizes[domain] = sizes.get(domain, 0) + num_bytes
        for start in range(0, len(ids) - 1, CONTEXT):
            window = np.full(CONTEXT + 1, -1, np.int64)
            part = ids[start : start + CONTEXT + 1]
            window[: len(part)] = part
            windows.setdefault(domain, []).append(window)
    for domain, rows in windows.items():
        total = 0.0
        for start in range(0, len(rows), 64):
            batch = torch.from_numpy(np.stack(rows[start : start + 64])).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, _, _ = forward(p, batch[:, :-1].clamp(min=0))
            total += float(
                F.cross_entropy(
                    logits.float().flatten(0, 1),
                    batch[:, 1:].flatten(),
                    ignore_index=-1,
                    reduction="sum",
                )
            )
        bits[domain] = total / math.log(2) / sizes[domain]
    forward.dropout = dropout
    return bits


def export(model: Qwen3MoeForCausalLM, pack: Path, out: Path) -> None:
    """Save 16-bit weights, configuration and tokenizer as a folder for AutoModel."""
    out.mkdir(parents=True, exist_ok=True)
    half = Qwen3MoeForCausalLM(model.config)
    half.load_state_dict({name: t.detach().cpu() for name, t in model.state_dict().items()})
    half.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        do_sample=False,
        no_repeat_ngram_size=5,  # greedy text of a small model runs in circles otherwise
    )
    half.to(torch.float16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["num_experts"] = model.config.num_experts  # the name that other engines read
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in (pack / "lm").iterdir():
        shutil.copy(path, out / path.name)


def initialize(config: Qwen3MoeConfig, device: torch.device) -> Qwen3MoeForCausalLM:
    """Return a model with random weights."""
    model = Qwen3MoeForCausalLM(config).to(device)
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            scale = 0.02 if "o_proj" not in name and "down_proj" not in name else 0.006
            torch.nn.init.normal_(tensor, std=scale)
    return model


class Trainer:
    """One training run: parameters, data, optimizer and the compiled step."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        """Build the model and read the data."""
        self.args, self.device = args, device
        self.mixed = device.type == "cuda" or args.bf16
        config = build_config({**SHAPE, **args.shape})
        self.model = initialize(config, device)
        self.p = dict(self.model.named_parameters())
        tokens, self.held = tokenize(args.pack, args.every)
        self.data = torch.from_numpy(tokens).to(torch.int32).to(device)
        self.forward = Forward(config, args.dropout, device)
        decayed = {name for name, t in self.p.items() if t.dim() > 1}
        self.optimizer = adamw(self.p, decayed, args.lr, args.weight_decay, betas=(0.9, 0.95))
        self.losses = torch.compile(self.plain_losses, dynamic=False)
        if args.no_compile:
            self.losses = self.plain_losses
        self.generator = torch.Generator(device=device).manual_seed(args.seed)
        self.window = torch.arange(CONTEXT + 1, device=device)
        self.usage = torch.zeros(config.num_hidden_layers, config.num_experts, device=device)

    def plain_losses(self, ids: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the loss to minimize, the cross-entropy and the counts per expert."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            logits, extra, usage = self.forward(self.p, ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        return loss + extra, loss.detach(), usage

    def step(self, lr: float) -> torch.Tensor:
        """Take one step on random windows and return its cross-entropy."""
        at = torch.randint(
            len(self.data) - CONTEXT - 1,
            (self.args.batch, 1),
            device=self.device,
            generator=self.generator,
        )
        batch = self.data[at + self.window].long()
        try:
            total, loss, counts = self.losses(batch[:, :-1], batch[:, 1:])
        except Exception as error:  # a compiler that fails must not cost the run
            if self.losses == self.plain_losses:
                raise
            print(f"lm: compiling failed ({type(error).__name__}), going on without", flush=True)
            self.losses = self.plain_losses
            total, loss, counts = self.losses(batch[:, :-1], batch[:, 1:])
        total.backward()
        update(self.optimizer, self.p, lr)
        self.usage.mul_(0.99).add_(counts)
        return loss

    def bits(self, max_bytes: int) -> dict[str, float]:
        """Return held-out bits per byte by domain."""
        return held_out_bits(self.forward, self.p, self.held, self.device, max_bytes)


def main() -> None:
    """Train within the time given, save, check against transformers."""
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=96, help="windows of 512 tokens")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    run = Trainer(args, device)
    num_parameters = sum(t.numel() for t in run.p.values())
    num_tokens = len(run.data)
    print(
        f"lm: {num_parameters} parameters, {num_tokens} training tokens, "
        f"set-up {time.perf_counter() - began:.0f} s on {device}",
        flush=True,
    )
    curve: list[dict[str, object]] = []
    pace = paced(args, began)
    while pace.progress < 1:
        loss = run.step(pace.rate(args.lr, 200))
        pace.step += 1
        if pace.look_due():
            bits = run.bits(120_000)
            seen = pace.step * args.batch * CONTEXT
            print(
                f"lm: step {pace.step} epoch {seen / num_tokens:.1f} "
                f"{seen / pace.seconds:.0f} tokens/s loss {float(loss):.3f} "
                f"{balance(run.usage)} {values(bits)}",
                flush=True,
            )
            curve.append({"step": pace.step, "tokens": seen, "loss": float(loss), **bits})
            export(run.model, args.pack, args.out)
    export(run.model, args.pack, args.out)
    epochs = pace.step * args.batch * CONTEXT / num_tokens
    text = summary(
        args,
        pace,
        device,
        parameters=num_parameters,
        training_tokens=num_tokens,
        epochs=epochs,
        bits_per_byte_fast=run.bits(10**9),
        curve=curve,
    )
    (args.out / "training.json").write_text(text)
    print(f"lm: {pace.step} steps, {epochs:.1f} epochs", flush=True)
    check(run.model, run.forward, args.out, run.held, device)


@torch.no_grad()
def check(
    model: Qwen3MoeForCausalLM,
    forward: Forward,
    out: Path,
    held: list[tuple[str, np.ndarray, int]],
    device: torch.device,
) -> None:
    """Assert that transformers computes from the exported folder what was trained."""
    ids = torch.from_numpy(np.stack([ids[:64] for _, ids, _ in held if len(ids) >= 64][:8]))
    stock = Qwen3MoeForCausalLM.from_pretrained(
        out, dtype=torch.float32, experts_implementation="eager"
    ).to(device)
    forward.dropout = 0.0
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = stock(ids.to(device)).logits
    p = {name: t.to(torch.float16).float() for name, t in model.named_parameters()}
    # float32 grouped products are not everywhere: compare through a plain loop instead
    got, _, _ = PlainForward(model.config, 0.0, device)(p, ids.to(device))
    error = float((got - expected).norm() / expected.norm())
    print(f"lm: exported model against the training forward: relative error {error:.1e}")
    assert error < 1e-4, error
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"lm: {size} bytes of safetensors ({size / 2**20:.2f} MiB)")
    assert size <= 16 * 2**20, size


class PlainForward(Forward):
    """The same forward with a loop over experts, for float32."""

    def experts(
        self, p: dict[str, torch.Tensor], at: str, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output; no losses, no counts."""
        weights, chosen = (
            F.linear(x, p[f"{at}gate.weight"]).softmax(-1).topk(self.c.num_experts_per_tok, -1)
        )
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(self.c.num_experts):
            rows, slots = torch.where(chosen == expert)
            gate, up = F.linear(x[rows], p[f"{at}experts.gate_up_proj"][expert]).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, p[f"{at}experts.down_proj"][expert])
            y.index_add_(0, rows, part * weights[rows, slots, None])
        return y, y.new_zeros(()), y.new_zeros(self.c.num_experts)


if __name__ == "__main__":
    main()
