"""Train zoo:mt, an NLLB-MoE of 8 million parameters, and export it for transformers.

transformers (5.17 to 5.23) executes experts 0 and 1 of this architecture only, so the forward pass
below dispatches by itself: every token to its two experts, all experts in one grouped product. It
follows evaluation semantics (no capacity drops, outputs of the experts times one minus the token
dropout). The end of the script loads the exported folder with transformers, applies moeprof's
dispatch and asserts equal logits.

    python analysis/zoo/train_mt.py --pack .zoo-pack --out zoo-out/mt --max-seconds 520
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pace import adamw, balance, options, paced, summary, update, values
from tokenizers import Tokenizer
from transformers import GenerationConfig, NllbMoeConfig, NllbMoeForConditionalGeneration
from vocabulary import LANGUAGE_TAGS, read_rows

SHAPE = {
    "vocab_size": 7680,
    "d_model": 192,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "num_experts": 16,
}
PAD, END = 1, 2
MAX_TOKENS = 160  # longer pairs are left out

Tensors = dict[str, torch.Tensor]


def build_config(shape: dict[str, int]) -> NllbMoeConfig:
    """Return the configuration of zoo:mt (or of a smaller one, for tests)."""
    return NllbMoeConfig(
        **shape,
        max_position_embeddings=256,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        moe_eval_capacity_token_fraction=1.0,
        moe_token_dropout=0.1,
        router_aux_loss_coef=0.01,
        scale_embedding=True,
        bos_token_id=0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=END,
    )


class Forward:
    """NLLB-MoE's forward pass over fused parameters, with correct dispatch."""

    def __init__(self, config: NllbMoeConfig, positions: torch.Tensor, dropout: float) -> None:
        self.c = config
        self.positions = positions
        self.dropout = dropout
        self.training = True
        self.usage: list[torch.Tensor] = []
        self.extra: list[torch.Tensor] = []

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout in training."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def linear(self, p: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
        """Apply a linear layer with bias."""
        return F.linear(x, p[f"{at}.weight"], p[f"{at}.bias"])

    def norm(self, p: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
        """Apply a layer norm."""
        return F.layer_norm(x, (x.shape[-1],), p[f"{at}.weight"], p[f"{at}.bias"])

    def attention(
        self,
        p: Tensors,
        at: str,
        x: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """Return attention of `x` over `memory`."""
        batch, length, width = x.shape
        heads = self.c.encoder_attention_heads
        shape = (batch, -1, heads, width // heads)
        query = self.linear(p, f"{at}.q_proj", x).view(shape).transpose(1, 2)
        key = self.linear(p, f"{at}.k_proj", memory).view(shape).transpose(1, 2)
        value = self.linear(p, f"{at}.v_proj", memory).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.linear(p, f"{at}.out_proj", y.transpose(1, 2).reshape(batch, length, width))

    def ffn(self, p: Tensors, at: str, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Return a dense or a sparse feed-forward layer; `keep` marks what is not padding."""
        if f"{at}.router.classifier.weight" not in p:
            return self.linear(p, f"{at}.fc2", F.relu(self.linear(p, f"{at}.fc1", x)))
        shape = x.shape
        x, keep = x.flatten(0, 1), keep.flatten()
        num_experts = self.c.num_experts
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), p[f"{at}.router.classifier.weight"])
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * keep[:, None]
        ids = chosen.flatten()
        order = ids.argsort()
        ones = keep.float()[:, None].expand(-1, 2).flatten()
        counts = x.new_zeros(num_experts, dtype=torch.float32).scatter_add(0, ids, ones)
        rows = x.new_zeros(num_experts, dtype=torch.float32)
        ends = rows.scatter_add(0, ids, torch.ones_like(ones)).to(torch.int32)
        y = self.experts(p, f"{at}.experts", x, ids[order], order // 2, ends.cumsum(0).int())
        y = y * weights.flatten()[order, None].to(y.dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = y[back].view(-1, 2, x.shape[-1])
        rate = self.c.moe_token_dropout
        if self.training:  # mask whole expert outputs; evaluation multiplies by the kept share
            y = y * (torch.rand(y.shape[:2], device=y.device) >= rate)[..., None]
            num_tokens = keep.sum()
            importance = (probabilities * keep[:, None]).sum(0) / num_tokens
            balance = num_experts * (counts / counts.sum() * importance).sum()
            z_loss = (logits.logsumexp(-1).pow(2) * keep).sum() / num_tokens
            self.extra.append(self.c.router_aux_loss_coef * balance + 1e-3 * z_loss)
            self.usage.append(counts.detach())
        else:
            y = y * (1 - rate)
        return y.sum(1).view(shape)

    def experts(
        self,
        p: Tensors,
        at: str,
        x: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Run all experts over rows sorted by expert."""
        dtype = torch.bfloat16
        first = p[f"{at}.fc1.weight"].to(dtype).transpose(-2, -1)
        second = p[f"{at}.fc2.weight"].to(dtype).transpose(-2, -1)
        y = F.grouped_mm(x.to(dtype)[rows], first, offs=ends)
        y = F.relu(y + p[f"{at}.fc1.bias"].to(dtype)[ids])
        y = F.grouped_mm(y, second, offs=ends)
        return y + p[f"{at}.fc2.bias"].to(dtype)[ids]

    def embed(self, p: Tensors, ids: torch.Tensor) -> torch.Tensor:
        """Embed ids and add their positions."""
        keep = ids != PAD
        positions = keep.cumsum(1) * keep + PAD
        x = F.embedding(ids, p["model.shared.weight"]) * math.sqrt(self.c.d_model)
        return self.drop(x + self.positions[positions])

    def __call__(self, p: Tensors, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return logits for every position of the decoder input `target`."""
        self.usage, self.extra = [], []
        keep = source != PAD
        mask = keep[:, None, None, :]
        x = self.embed(p, source)
        for layer in range(self.c.encoder_layers):
            at = f"model.encoder.layers.{layer}"
            y = self.norm(p, f"{at}.self_attn_layer_norm", x)
            x = x + self.drop(self.attention(p, f"{at}.self_attn", y, y, mask, causal=False))
            y = self.norm(p, f"{at}.ff_layer_norm", x)
            x = x + self.drop(self.ffn(p, f"{at}.ffn", y, keep))
        memory = self.norm(p, "model.encoder.layer_norm", x)
        keep = target != PAD
        x = self.embed(p, target)
        for layer in range(self.c.decoder_layers):
            at = f"model.decoder.layers.{layer}"
            y = self.norm(p, f"{at}.self_attn_layer_norm", x)
            x = x + self.drop(self.attention(p, f"{at}.self_attn", y, y, None, causal=True))
            y = self.norm(p, f"{at}.cross_attention_layer_norm", x)
            y = self.attention(p, f"{at}.cross_attention", y, memory, mask, causal=False)
            x = x + self.drop(y)
            y = self.norm(p, f"{at}.ff_layer_norm", x)
            x = x + self.drop(self.ffn(p, f"{at}.ffn", y, keep))
        x = self.norm(p, "model.decoder.layer_norm", x)
        return F.linear(x, p["model.shared.weight"])


class PlainForward(Forward):
    """The same forward with a loop over experts, for float32."""

    def experts(
        self,
        p: Tensors,
        at: str,
        x: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Run all experts over rows sorted by expert."""
        y = torch.zeros(len(rows), x.shape[-1], device=x.device)
        for expert in range(self.c.num_experts):
            at_expert = torch.where(ids == expert)[0]
            part = F.linear(
                x[rows[at_expert]], p[f"{at}.fc1.weight"][expert], p[f"{at}.fc1.bias"][expert]
            )
            y[at_expert] = F.linear(
                F.relu(part), p[f"{at}.fc2.weight"][expert], p[f"{at}.fc2.bias"][expert]
            )
        return y


def fuse(model: NllbMoeForConditionalGeneration) -> Tensors:
    """Copy the parameters, the experts of each layer stacked into one tensor."""
    state = dict(model.named_parameters())
    fused: Tensors = {}
    num_experts = model.config.num_experts
    for name, tensor in state.items():
        if ".expert_" not in name:
            fused[name] = tensor.detach().clone()
        elif ".expert_0." in name:
            stack = [state[name.replace(".expert_0.", f".expert_{e}.")] for e in range(num_experts)]
            fused[name.replace(".expert_0.", ".")] = torch.stack(stack).detach().clone()
    return fused


def unfuse(fused: Tensors, model: NllbMoeForConditionalGeneration) -> None:
    """Write fused parameters back into a model."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            key, expert = name, None
            if ".expert_" in name:
                head, tail = name.split(".expert_")
                number, rest = tail.split(".", 1)
                key, expert = f"{head}.{rest}", int(number)
            source = fused[key] if expert is None else fused[key][expert]
            tensor.copy_(source.to(tensor.device, tensor.dtype))


class Pairs:
    """Tokenized pairs in flat arrays, batched by length."""

    def __init__(self, sources: list[list[int]], targets: list[list[int]], tags: list[int]) -> None:
        keep = [
            i
            for i in range(len(sources))
            if max(len(sources[i]), len(targets[i])) <= MAX_TOKENS and sources[i] and targets[i]
        ]
        self.sources = [np.array([4, *sources[i], END], np.int32) for i in keep]
        self.targets = [np.array([END, tags[i], *targets[i], END], np.int32) for i in keep]
        self.source_lengths = np.array([len(s) for s in self.sources])
        self.target_lengths = np.array([len(t) for t in self.targets])
        self.num_tokens = int(self.source_lengths.sum() + self.target_lengths.sum())

    def batches(self, num_tokens: int, seed: int) -> list[np.ndarray]:
        """Shuffle, group pairs of similar length, shuffle the groups."""
        generator = np.random.default_rng(seed)
        noise = generator.uniform(0, 1, len(self.sources))
        longest = np.maximum(self.source_lengths, self.target_lengths)
        order = np.lexsort((noise, np.ceil(longest / 4)))
        cost = np.ceil(longest[order] / 4) * 8  # both sides padded to the longest
        groups, start = [], 0
        for i in range(len(order)):
            if (i + 1 - start) * cost[i] > num_tokens and i > start:
                groups.append(order[start:i])
                start = i
        groups.append(order[start:])
        return [groups[i] for i in generator.permutation(len(groups))]

    def padded(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one batch as padded tensors."""
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(pad([side[i] for i in rows])) for side in (self.sources, self.targets)
        )


def pad(rows: list[np.ndarray]) -> np.ndarray:
    """Stack rows padded to a common multiple of four."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // 4) * 4
    out = np.full((len(rows), width), PAD, np.int64)
    out[np.arange(width)[None, :] < lengths[:, None]] = np.concatenate(rows)
    return out


def segment(
    path: Path, rows: list[dict[str, str]], dropout: float | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize both sides, with BPE dropout (another segmentation on each call) or without."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.model.dropout = dropout
    sides = []
    for side in ("source", "target"):
        done = tokenizer.encode_batch_fast([r[side] for r in rows], add_special_tokens=False)
        sides.append([e.ids for e in done])
    return sides[0], sides[1]


def export(fused: Tensors, config: NllbMoeConfig, pack: Path, out: Path) -> None:
    """Save 16-bit weights, configuration and tokenizer as a folder for AutoModel."""
    out.mkdir(parents=True, exist_ok=True)
    model = NllbMoeForConditionalGeneration(config)
    unfuse(fused, model)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=0,
        max_new_tokens=160,
        num_beams=1,
        do_sample=False,
    )
    model.to(torch.float16).save_pretrained(out)
    for path in (pack / "mt").iterdir():
        shutil.copy(path, out / path.name)


@torch.no_grad()
def held_out_loss(
    forward: Forward, p: Tensors, held: dict[str, Pairs], device: torch.device, mixed: bool
) -> dict[str, float]:
    """Mean cross-entropy per target token of every held-out group."""
    forward.training = False
    result = {}
    for name, pairs in held.items():
        total, count = 0.0, 0
        for rows in pairs.batches(16384, 0)[:40]:
            source, target = (t.to(device) for t in pairs.padded(rows))
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits = forward(p, source, target[:, :-1])
            labels = target[:, 1:].clone()
            labels[:, 0] = PAD
            total += float(
                F.cross_entropy(
                    logits.float().flatten(0, 1),
                    labels.flatten(),
                    ignore_index=PAD,
                    reduction="sum",
                )
            )
            count += int((labels != PAD).sum())
        result[name] = total / max(count, 1)
    forward.training = True
    return result


def initialize(config: NllbMoeConfig, device: torch.device) -> tuple[Tensors, torch.Tensor]:
    """Return fused random parameters and the table of positions."""
    model = NllbMoeForConditionalGeneration(config)
    positions = model.model.encoder.embed_positions.weights.to(device)
    p = {name: t.to(device).requires_grad_() for name, t in fuse(model).items()}
    with torch.no_grad():
        for name, t in p.items():
            if name.endswith("bias"):
                t.zero_()
            elif t.dim() > 1:
                fan = t.shape[-1] + t.shape[-2]
                small = 0.5 if "out_proj" in name or "fc2" in name else 1.0
                std = config.d_model**-0.5 if "shared" in name else small * math.sqrt(2 / fan)
                t.normal_(std=0.02 if "router" in name else std)
        p["model.shared.weight"][PAD] = 0
    return p, positions


class Trainer:
    """One training run: parameters, segmented pairs and optimizer."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        """Build the model, read and segment the pairs."""
        self.args, self.device = args, device
        self.mixed = device.type == "cuda" or args.bf16
        self.config = build_config({**SHAPE, **args.shape})
        self.p, self.positions = initialize(self.config, device)
        kind = Forward if self.mixed else PlainForward
        self.forward = kind(self.config, self.positions, args.dropout)
        decayed = {
            name
            for name, t in self.p.items()
            if t.dim() > 1 and not name.endswith("bias") and "shared" not in name
        }
        self.optimizer = adamw(
            self.p, decayed, args.lr, args.weight_decay, betas=(0.9, 0.98), eps=1e-9
        )
        self.usage: torch.Tensor | None = None
        rows = read_rows(args.pack / "mt.jsonl.xz")[slice(None, None, args.every)]
        self.train_rows = [r for r in rows if r["split"] == "train"]
        self.held = {}
        for domain in ("help", "interface", "scripture"):
            group = [r for r in rows if r["split"] == "test" and r["domain"] == domain]
            if group:
                self.held[domain] = self.segmented(group, None)
        # Segmentations of the training text: one to start with, three more and the one without
        # BPE dropout while training already runs.
        self.pool = ThreadPoolExecutor(1)
        self.first = self.segmented(self.train_rows, args.bpe_dropout)
        submit = self.pool.submit
        self.final: Future[Pairs] = submit(self.segmented, self.train_rows, None)
        self.others = [submit(self.segmented, self.train_rows, args.bpe_dropout) for _ in range(3)]
        self.queue: list[np.ndarray] = []
        self.current = self.first
        self.epoch = 0

    def segmented(self, rows: list[dict[str, str]], dropout: float | None) -> Pairs:
        """Tokenize pairs."""
        tags = {tag: i + 4 for i, tag in enumerate(LANGUAGE_TAGS)}
        sides = segment(self.args.pack / "mt", rows, dropout)
        return Pairs(*sides, [tags[r["language"]] for r in rows])

    def next_batch(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one batch; every epoch has another segmentation, the last ones the plain one."""
        if not self.queue:
            ready = [self.first, *(f.result() for f in self.others if f.done())]
            self.current = ready[self.epoch % len(ready)]
            if progress > 0.9 and self.final.done():
                self.current = self.final.result()
            self.epoch += 1
            self.queue = self.current.batches(self.args.batch_tokens, self.epoch)
        source, target = self.current.padded(self.queue.pop())
        return (
            source.to(self.device, non_blocking=True),
            target.to(self.device, non_blocking=True),
        )

    def step(self, lr: float, progress: float) -> torch.Tensor:
        """Take one step and return its cross-entropy."""
        source, target = self.next_batch(progress)
        labels = target[:, 1:].clone()
        labels[:, 0] = PAD  # the language is given, not predicted
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            logits = self.forward(self.p, source, target[:, :-1])
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=PAD,
            label_smoothing=self.args.smoothing,
        )
        (loss + torch.stack(self.forward.extra).sum()).backward()
        update(self.optimizer, self.p, lr)
        counts = torch.stack(self.forward.usage)
        self.usage = counts if self.usage is None else self.usage * 0.99 + counts
        return loss.detach()

    def nats(self) -> dict[str, float]:
        """Return the held-out cross-entropy per target token by domain."""
        return held_out_loss(self.forward, self.p, self.held, self.device, self.mixed)


def main() -> None:
    """Train within the time given, save, check against transformers."""
    parser = options(__doc__)
    parser.add_argument("--batch-tokens", type=int, default=40000, help="both sides, padded")
    parser.add_argument("--bpe-dropout", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    run = Trainer(args, device)
    num_parameters = sum(t.numel() for t in run.p.values())
    print(
        f"mt: {num_parameters} parameters, {len(run.first.sources)} training pairs, "
        f"{run.first.num_tokens} tokens, set-up {time.perf_counter() - began:.0f} s on {device}",
        flush=True,
    )
    curve: list[dict[str, object]] = []
    pace = paced(args, began)
    while pace.progress < 1:
        loss = run.step(pace.rate(args.lr, 800), pace.progress)
        pace.step += 1
        if pace.look_due():
            nats = run.nats()
            assert run.usage is not None
            print(
                f"mt: step {pace.step} epoch {run.epoch} at {pace.seconds:.0f} s "
                f"loss {float(loss):.3f} {balance(run.usage)} {values(nats)}",
                flush=True,
            )
            curve.append({"step": pace.step, "epoch": run.epoch, "loss": float(loss), **nats})
            export(run.p, run.config, args.pack, args.out)
    export(run.p, run.config, args.pack, args.out)
    text = summary(
        args,
        pace,
        device,
        parameters=num_parameters,
        epochs=run.epoch,
        training_pairs=len(run.first.sources),
        held_out_nats_per_token=run.nats(),
        curve=curve,
    )
    (args.out / "training.json").write_text(text)
    print(f"mt: {pace.step} steps, {run.epoch} epochs", flush=True)
    run.pool.shutdown(cancel_futures=True, wait=False)
    check(run, args.out)
    sys.stdout.flush()
    os._exit(0)  # a segmentation still running in the background is of no use any more


@torch.no_grad()
def check(run: Trainer, out: Path) -> None:
    """Assert that transformers with the corrected dispatch computes what was trained."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from moeprof.zoo.dispatch import fix_nllb_dispatch

    device, pairs = run.device, run.held["help"]
    source, target = (t.to(device) for t in pairs.padded(np.arange(min(16, len(pairs.sources)))))
    stock = (
        NllbMoeForConditionalGeneration.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager"
        )
        .to(device)
        .eval()
    )
    num_fixed = fix_nllb_dispatch(stock)
    torch.backends.cuda.matmul.allow_tf32 = False
    half = {name: t.detach().to(torch.float16).float() for name, t in run.p.items()}
    plain = PlainForward(run.config, run.positions, 0.0)
    plain.training = False
    got = plain(half, source, target)
    expected = stock(
        input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=target
    ).logits
    keep = target != PAD
    error = float((got - expected)[keep].norm() / expected[keep].norm())
    print(
        f"mt: {num_fixed} layers fixed; exported model against the training forward: "
        f"relative error {error:.1e}"
    )
    assert error < 1e-4, error
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"mt: {size} bytes of safetensors ({size / 2**20:.2f} MiB)")
    assert size <= 16 * 2**20, size


if __name__ == "__main__":
    main()
