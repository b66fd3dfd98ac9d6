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
        y = x.float()
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat([-second, first], -1) * self.sin[:length]

    def attention(self, p: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
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


def main() -> None:
    """Train within the time given, save, check against transformers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=Path(".zoo-pack"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--max-seconds", type=float, default=520.0, help="training time, set-up apart"
    )
    parser.add_argument("--deadline-s", type=float, help="stop this long after the start, at most")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=96, help="windows of 512 tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", type=json.loads, default={}, help="overrides, for a tiny test")
    parser.add_argument("--every", type=int, default=None, help="keep every n-th document only")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast without a GPU too")
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixed = device.type == "cuda" or args.bf16
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    config = build_config({**SHAPE, **args.shape})
    model = Qwen3MoeForCausalLM(config).to(device)
    p = dict(model.named_parameters())
    for name, tensor in p.items():
        if tensor.dim() > 1:
            scale = 0.02 if "o_proj" not in name and "down_proj" not in name else 0.006
            torch.nn.init.normal_(tensor, std=scale)
    num_parameters = sum(t.numel() for t in p.values())
    tokens, held = tokenize(args.pack, args.every)
    print(
        f"lm: {num_parameters} parameters, {len(tokens)} training tokens, "
        f"set-up {time.perf_counter() - began:.0f} s on {device}",
        flush=True,
    )
    data = torch.from_numpy(tokens).to(torch.int32).to(device)
    forward = Forward(config, args.dropout, device)
    decay = [t for t in p.values() if t.dim() > 1]
    plain = [t for t in p.values() if t.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )

    def losses(ids: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits, extra, usage = forward(p, ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        return loss + extra, loss.detach(), usage

    step_losses = losses if args.no_compile else torch.compile(losses, dynamic=False)
    generator = torch.Generator(device=device).manual_seed(args.seed)
    window = torch.arange(CONTEXT + 1, device=device)
    usage = torch.zeros(config.num_hidden_layers, config.num_experts, device=device)
    curve: list[dict[str, object]] = []
    step, start, last_look = 0, time.perf_counter(), time.perf_counter()
    limit = args.max_seconds
    if args.deadline_s is not None:
        limit = min(limit, args.deadline_s - (start - began))
    while True:
        progress = max((time.perf_counter() - start) / limit, step / args.max_steps)
        if progress >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / 200)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(
            len(data) - CONTEXT - 1, (args.batch, 1), device=device, generator=generator
        )
        batch = data[at + window].long()
        try:
            total, loss, counts = step_losses(batch[:, :-1], batch[:, 1:])
        except Exception as error:  # a compiler that fails must not cost the run
            if step_losses is losses:
                raise
            print(f"lm: compiling failed ({type(error).__name__}), going on without", flush=True)
            step_losses = losses
            continue
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        usage.mul_(0.99).add_(counts)
        step += 1
        if time.perf_counter() - last_look > max(limit / 12, 5):
            bits = held_out_bits(forward, p, held, device, 120_000)
            seen = step * args.batch * CONTEXT
            rare = (usage < 0.1 * usage.mean(1, keepdim=True)).float().mean(1).max()
            print(
                f"lm: step {step} epoch {seen / len(data):.1f} "
                f"{seen / (time.perf_counter() - start):.0f} tokens/s loss {float(loss):.3f} "
                f"rare {float(rare):.2f} max/mean {float((usage.amax(1) / usage.mean(1)).max()):.2f} "
                + " ".join(f"{d} {b:.3f}" for d, b in bits.items()),
                flush=True,
            )
            curve.append({"step": step, "tokens": seen, "loss": float(loss), **bits})
            last_look = time.perf_counter()
            export(model, args.pack, args.out)
    export(model, args.pack, args.out)
    bits = held_out_bits(forward, p, held, device, 10**9)
    print(
        f"lm: {step} steps, {step * args.batch * CONTEXT / len(data):.1f} epochs, held out "
        + " ".join(f"{d} {b:.3f}" for d, b in bits.items()),
        flush=True,
    )
    summary = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "parameters": num_parameters,
        "steps": step,
        "training_tokens": len(data),
        "epochs": step * args.batch * CONTEXT / len(data),
        "seconds": time.perf_counter() - start,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "bits_per_byte_fast": bits,
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    check(model, forward, args.out, held, device)


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
