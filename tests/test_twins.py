"""The routing twins at a tiny size: packing, the model, learning, recording, evidence."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moeprof
from analysis.gpu.twins import __main__ as program
from analysis.gpu.twins import pack as packing
from analysis.gpu.twins.batches import Batch, LmBatches, MtBatches, windows
from analysis.gpu.twins.learning import LearningOptions, held_out, learn, mean_loss
from analysis.gpu.twins.model import Twin
from analysis.gpu.twins.pack import END, FIRST_LANGUAGE, LANGUAGES, PAD
from analysis.gpu.twins.recording import MtPlan, shared_sources
from analysis.gpu.twins.routing import TwinMoe
from analysis.gpu.twins.shape import lm_config, mt_config

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "facts": "river city people north south border coast island capital area",
    "code": "return import self class raise value print index while None",
}
FOREIGN = {"deu_Latn": "Haus Baum Fluss", "fra_Latn": "maison arbre fleuve", "spa_Latn": "casa rio"}
CPU = torch.device("cpu")


def sentence(rng, domain, count):
    words = WORDS[domain].split()
    # Every word but the first follows from the one before, so that there is something to learn.
    start = rng.integers(len(words))
    return " ".join(words[(start + 3 * i) % len(words)] for i in range(count))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    documents = [
        {
            "domain": domain,
            "split": "test" if i % 4 == 0 else "train",
            "text": "\n".join(sentence(rng, domain, 12) for _ in range(24)),
        }
        for i in range(24)
        for domain in WORDS
    ]
    pairs = [
        {
            "source": f"{sentence(rng, 'facts', 3 + i % 9)} {i}",
            "target": f"{' '.join([words] * (1 + i % 3))} {i}",
            "language": language,
            "domain": "help" if i % 2 else "docs",
            "split": "test" if i % 5 == 0 else "train",
        }
        for i in range(150)
        for language, words in FOREIGN.items()
    ]
    # The source of a sentence is one for all its languages.
    for i, pair in enumerate(pairs):
        pair["source"] = pairs[i - i % len(FOREIGN)]["source"]
    folder = tmp_path_factory.mktemp("pack")
    for task, rows, packer in (
        ("lm", documents, packing.pack_lm),
        ("mt", pairs, packing.pack_mt),
    ):
        pack, tokenizer = packer(rows, 320)
        packing.write_pack(folder / f"{task}.pack", pack)
        tokenizer.save(str(folder / f"{task}.tokenizer.json"))
    return folder, documents, pairs


def tiny_lm(pack):
    return program.tiny(lm_config(pack.token_bytes.size))


def tiny_mt(pack):
    return program.tiny(mt_config(pack.token_bytes.size))


def test_packs_give_the_text_back(data):
    from tokenizers import Tokenizer

    folder, documents, pairs = data
    lm = packing.read_lm(folder / "lm.pack")
    tokenizer = Tokenizer.from_file(str(folder / "lm.tokenizer.json"))
    texts = [tokenizer.decode(ids) for ids in lm.documents.split()]
    assert texts == [row["text"] for row in documents]
    assert [lm.domains[i] for i in lm.domain] == [row["domain"] for row in documents]
    for ids, row in zip(lm.documents.split(), documents, strict=True):
        assert lm.token_bytes[ids].sum() == len(row["text"].encode())
    mt = packing.read_mt(folder / "mt.pack")
    tokenizer = Tokenizer.from_file(str(folder / "mt.tokenizer.json"))
    sources, targets = mt.sources.split(), mt.targets.split()
    assert len(sources) == 150
    for i in (0, 7, 449):
        assert tokenizer.decode(sources[mt.source[i]]) == pairs[i]["source"]
        assert tokenizer.decode(targets[mt.target[i]]) == pairs[i]["target"]
        assert LANGUAGES[mt.language[i]] == pairs[i]["language"]


def test_the_papers_geometry():
    lm, mt = lm_config(16384), mt_config(16384)
    assert [lm.routes(i) for i in range(4)] == [False, True, False, True]
    assert (lm.decoder_layers, lm.num_experts, lm.top_k, lm.d_model) == (24, 512, 2, 1024)
    assert sum(map(lm.routes, range(lm.decoder_layers))) == 12
    assert (mt.encoder_layers, mt.decoder_layers, mt.num_experts) == (24, 24, 128)
    assert (mt.top_k, mt.d_model) == (2, 2048)
    assert sum(map(mt.routes, range(mt.encoder_layers))) == 6
    for config in (lm, mt):
        assert 128 <= config.expert_width <= 256
        assert config.attention_width % config.num_heads == 0


@pytest.mark.parametrize(("config", "size"), [(lm_config(16384), 1.709), (mt_config(16384), 2.101)])
def test_a_training_step_at_full_size_without_computing_it(config, size, monkeypatch):
    monkeypatch.setattr("analysis.gpu.twins.routing.can_group", lambda *_: True)
    monkeypatch.setattr(Twin, "_fill", lambda *_: None)
    with FakeTensorMode():
        model = Twin(config).train()
        assert model.num_params / 1e9 == pytest.approx(size, abs=1e-3)
        ids = torch.full((16, 64), 7)
        target = {}
        if config.is_encoder_decoder:
            target = {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
        loss = mean_loss(model, Batch(input_ids=ids, labels=ids, num_tokens=1024, **target), 0.1)
        balance, load = model.last_balance()
        assert (balance.shape, load.shape) == ((12,), (12, config.num_experts))
        (loss + balance.sum()).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_moe_layer_and_its_gradients_against_a_plain_sum(data):
    pack = packing.read_lm(data[0] / "lm.pack")
    model = Twin(tiny_lm(pack), seed=3).double()
    moe = model.routed[0].train()
    x = torch.randn(2, 9, 48, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 9)
    valid[1, 5:] = 0

    def plain(x):
        flat = x.reshape(-1, 48)
        logits = flat.float() @ moe.gate.weight.float().T
        probabilities = logits.softmax(-1)
        weight, chosen = probabilities.topk(2, -1)
        weight = (weight / weight.sum(-1, keepdim=True)).double()
        every = torch.einsum("td,ehd->teh", flat, moe.experts.w_in).relu()
        every = torch.einsum("teh,edh->ted", every, moe.experts.w_out)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, 48))
        out = (picked * weight[..., None]).sum(1) * valid.reshape(-1, 1)
        keep = valid.reshape(-1) > 0
        share = torch.bincount(chosen[keep, 0], minlength=16) / keep.sum()
        return out.view_as(x), 16 * (share * probabilities[keep].mean(0)).sum()

    results = []
    for function in (lambda x: (moe(x, valid.bool()), moe.balance), plain):
        model.zero_grad()
        x.grad = None
        out, balance = function(x)
        (out.square().sum() + balance).backward()
        grads = [x.grad, moe.gate.weight.grad, moe.experts.w_in.grad, moe.experts.w_out.grad]
        results.append([out, balance.double(), *(g.clone() for g in grads)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert int(moe.load.sum()) == 2 * 18
    assert moe.balance.item() > 0


def test_grouped_products_equal_the_loop(data, monkeypatch):
    pack = packing.read_lm(data[0] / "lm.pack")
    experts = Twin(tiny_lm(pack), seed=5).routed[0].experts
    # In half precision, as on a GPU: the weights that are multiplied are not the parameters.
    rows = torch.randn(24, 48).bfloat16()
    ends = torch.tensor([0, 0, 5, 5, *[9] * 6, 20, *[24] * 5], dtype=torch.int32)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr("analysis.gpu.twins.routing.can_group", lambda *_, g=grouped: g)
        own = rows.clone().requires_grad_()
        out = experts(own, rows[:, :2], rows[:, :2], ends)
        experts.zero_grad()
        (out.float() ** 2).sum().backward()
        results.append([out, own.grad, experts.w_in.grad, experts.w_out.grad])
    for loop, group in zip(*results, strict=True):
        assert (group - loop).float().norm() < 0.01 * loop.float().norm()
    has_rows = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
    assert torch.equal(experts.w_in.grad.flatten(1).any(1), has_rows)


def test_cached_decoding_equals_a_whole_pass(data):
    pack = packing.read_mt(data[0] / "mt.pack")
    model = Twin(tiny_mt(pack), seed=1).freeze()
    batches = MtBatches(pack, max_positions=64, batch_tokens=512, device=CPU, seed=0)
    batch = batches.batch(batches.training[:5])
    made = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=batch.decoder_input_ids[:, :1],
        max_new_tokens=6,
    )
    hidden = model(batch.input_ids, batch.attention_mask, made[:, :-1])
    assert torch.equal(model.logits(hidden).argmax(-1), made[:, 1:])
    # Padding of the source changes nothing.
    wider = torch.nn.functional.pad(batch.input_ids, (0, 8))
    same = model(wider, (wider != PAD).long(), made[:, :-1])
    torch.testing.assert_close(same, hidden, rtol=1e-4, atol=1e-5)


def test_batches_hold_what_was_packed(data):
    folder, _, pairs = data
    mt = packing.read_mt(folder / "mt.pack")
    batches = MtBatches(mt, max_positions=64, batch_tokens=600, device=CPU, seed=0)
    epoch = [batches.next() for _ in range(len(batches._epoch()))]
    assert sum(b.num_tokens for b in epoch) == batches.epoch_tokens
    training = [pair for pair in pairs if pair["split"] == "train"]
    assert sum(len(b.labels) for b in epoch) == len(training)
    for batch in epoch:
        assert batch.input_ids.numel() + batch.labels.numel() <= 2 * 600
        assert (batch.decoder_input_ids[:, 0] >= FIRST_LANGUAGE).all()
        assert torch.equal(batch.decoder_input_ids[:, 1:], batch.labels[:, :-1])
        assert ((batch.labels == END).sum(1) == 1).all()
        assert torch.equal(batch.decoder_mask.bool(), batch.labels != PAD)
    lm = packing.read_lm(folder / "lm.pack")
    windowed = LmBatches(lm, window=32, batch_tokens=128, device=CPU, seed=0)
    batch = windowed.next()
    assert batch.input_ids.shape == (4, 32)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    held = windows(lm, 0, 40)
    assert all(len(window) == 40 for window in held)
    assert sum(int(window[0]) == END for window in held) == int(
        ((lm.split == 1) & (lm.domain == 0)).sum()
    )


def test_languages_share_their_sources(data):
    mt = packing.read_mt(data[0] / "mt.pack")
    batches = MtBatches(mt, max_positions=64, batch_tokens=600, device=CPU, seed=0)
    plan = MtPlan(batch=5, batches=3, source_tokens=(2, 60))
    chosen = shared_sources(mt, batches, plan)
    assert [len(pairs) for pairs in chosen] == [15, 15, 15]
    sets = [set(mt.source[pairs].tolist()) for pairs in chosen]
    assert sets[0] == sets[1] == sets[2]
    assert [set(mt.language[pairs].tolist()) for pairs in chosen] == [{0}, {1}, {2}]
    assert all((mt.split[pairs] == 1).all() for pairs in chosen)


def test_learning_beats_word_frequencies(data):
    pack = packing.read_lm(data[0] / "lm.pack")
    torch.manual_seed(0)
    model = Twin(tiny_lm(pack), seed=0)
    batches = LmBatches(pack, window=64, batch_tokens=512, device=CPU, seed=0)
    options = LearningOptions(train_s=60, max_steps=45, peak_rate=5e-3, warmup_steps=10)
    learned = learn(model, batches, options)
    assert learned.steps == 45
    assert learned.num_tokens == 45 * 512
    assert learned.curve[-1].step == 45
    assert learned.curve[-1].loss < 0.6 * learned.curve[0].loss
    entries = held_out(model, pack, batches, rows=8)
    assert [entry.group for entry in entries] == ["code", "facts"]
    for entry in entries:
        assert entry.bits_per_byte < 0.8 * entry.unigram_bits_per_byte
    before = mean_loss(model, batch := batches.next(), 0.0)
    after = mean_loss(model.freeze(), batch, 0.0)
    torch.testing.assert_close(before.detach(), after.detach())


def test_a_batch_too_large_for_memory_is_halved(data, monkeypatch, capsys):
    pack = packing.read_lm(data[0] / "lm.pack")
    model = Twin(tiny_lm(pack), seed=0)
    batches = LmBatches(pack, window=16, batch_tokens=64, device=CPU, seed=0)
    forward = TwinMoe.forward

    def limited(self, hidden_states, valid=None):
        if hidden_states.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(self, hidden_states, valid)

    monkeypatch.setattr(TwinMoe, "forward", limited)
    options = LearningOptions(train_s=60, max_steps=2, peak_rate=1e-3)
    learned = learn(model, batches, options)
    assert (learned.num_shrinks, learned.batch_tokens, learned.steps) == (1, 32, 2)
    assert "out of memory" in capsys.readouterr().out
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(1.0))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(SystemExit, match="diverged"):
        learn(model, batches, options)


@pytest.mark.parametrize("task", ["lm", "mt"])
def test_end_to_end(task, data, tmp_path, capsys):
    words = [task, "--data", str(data[0]), "--out", str(tmp_path), "--tiny", "--max-steps", "6",
             "--minutes", "1", "--batch-tokens", "256"]  # fmt: skip
    assert program.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"twin-{task}.json", f"twin-{task}.moeprof.tar.gz",
    }  # fmt: skip
    found = json.loads((tmp_path / f"twin-{task}.json").read_text())
    assert found["tiny"] and found["learned"]["steps"] == 6
    assert found["command"].endswith(" ".join(words))
    assert found["hardware"]["device"] == "cpu" and found["versions"]["torch"]
    assert found["learned"]["curve"][-1]["step"] == 6
    assert all(entry["unigram_bits_per_byte"] > 0 for entry in found["held_out"])
    assert found["recorded"]["examples"][0]["given"]
    with tarfile.open(tmp_path / f"twin-{task}.moeprof.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    path = tmp_path / f"twin-{task}.moeprof"
    result = moeprof.check(path)
    assert result.ok, result.problems
    trace = moeprof.open(path)
    assert trace.complete and not trace.info.model.random_weights
    assert trace.info.model.task == task
    assert {site.num_experts for site in trace.sites} == {16}
    assert {site.top_k for site in trace.sites} == {2}
    assert len(trace.requests) == found["recorded"]["requests"]
    domains = trace.requests["domain"].value_counts().to_dict()
    if task == "lm":
        assert [(s.stack, s.layer) for s in trace.sites] == [("decoder", 1), ("decoder", 3)]
        assert domains == found["recorded"]["groups"] == {"code": 6, "facts": 6}
        scored = trace.steps[trace.steps["phase"] == "prefill"]
        assert (scored["num_tokens"] == 4 * 64).sum() == 2
        assert (trace.steps["phase"] == "decode").sum() == 5
    else:
        assert [(s.stack, s.layer) for s in trace.sites] == [("encoder", 3), ("decoder", 3)]
        assert trace.requests["language"].value_counts().to_dict() == found["recorded"]["groups"]
        encoded = trace.steps[trace.steps["stack"] == "encoder"]
        assert len(encoded) == 6 and encoded["num_tokens"].sum() > 0
    routing = found["routing"]
    assert routing["check"]["ok"] and routing["capture"]["num_requests"] == len(trace.requests)
    phases = {(row["stack"], row["phase"]) for row in routing["use"]}
    wanted = {("decoder", "prefill")} | ({("encoder", "encode")} if task == "mt" else set())
    assert wanted <= phases
    for row in routing["use"]:
        assert 0 < row["entropy_of_load"] <= 1
        assert row["share_never_used"] <= row["share_below_tenth_of_uniform"]
    names = set(routing["metrics"])
    place = "encoder/encode" if task == "mt" else "decoder/prefill"
    for name in ("activation/inactive_share", "activation/uniform_inactive_share",
                 "activation/usage_entropy"):  # fmt: skip
        assert f"{name}/{place}" in names
    assert any(name.startswith("locality/next_token_share") for name in names)
    # Computed again from the trace or its archive, the same comes out.
    target = tmp_path / f"twin-{task}.json"
    for given in (path, tmp_path / f"{path.name}.tar.gz"):
        target.write_text(json.dumps({key: found[key] for key in found if key != "routing"}))
        assert program.main(["evidence", str(given), str(target)]) == 0
        assert json.loads(target.read_text()) == found
    capsys.readouterr()


def test_evidence_counts_rare_experts(tmp_path):
    from analysis.gpu.twins.evidence import loads, use
    from moeprof.trace.synthetic import synthetic_trace

    trace = synthetic_trace(
        tmp_path / "skewed.moeprof", num_requests=8, num_sites=2, num_experts=32, top_k=2,
        batch=4, skew=1.5, seed=0,
    )  # fmt: skip
    rows = {(row["stack"], row["phase"]): row for row in use(trace)}
    frame = trace.routing()
    assert sum(row["num_decisions"] for row in rows.values()) == len(frame)
    counts = loads(trace)[("decoder", "decode", 1)]
    phase = frame[(frame["phase"] == "decode") & (frame["site"] == 1)]
    steps = trace.steps.set_index("step")["phase"]
    own = phase[phase["step"].map(steps) == "decode"]
    assert counts.tolist() == np.bincount(own["expert"], minlength=32).tolist()
    assert rows["decoder", "decode"]["entropy_of_load"] < 0.99


def test_idleness_is_that_of_each_size_of_dispatch(tmp_path):
    from analysis.gpu.twins.evidence import idleness
    from moeprof.trace.synthetic import synthetic_trace

    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=6, num_sites=2, num_experts=16, top_k=2,
        batch=3, prompt_tokens=9, output_tokens=5, skew=1.0, seed=0,
    )  # fmt: skip
    rows = idleness(trace)
    frame = trace.routing()
    groups = frame.groupby(["step", "site"])
    tokens = groups.size() / 2
    idle = 1 - groups["expert"].nunique() / 16
    phases = trace.steps.set_index("step")["phase"]
    for phase in ("prefill", "decode"):
        own = [row for row in rows if row["phase"] == phase]
        here = tokens.index.get_level_values("step").map(phases) == phase
        assert sum(row["num_dispatches"] for row in own) == here.sum()
        assert own[0]["least_tokens"] == own[0]["most_tokens"] == tokens[here].max()
        for row in own:
            fits = here & tokens.between(row["least_tokens"], row["most_tokens"])
            assert row["inactive_share"] == pytest.approx(idle[fits].mean())
            assert row["uniform_inactive_share"] == pytest.approx(
                ((1 - 2 / 16) ** tokens[fits]).mean()
            )


def test_the_translation_twin_that_is_kept(capsys):
    """The sample is the trace that its figures were made from, and its decoder is idle."""
    found = json.loads((ROOT / "analysis" / "results" / "twin_mt.json").read_text())
    trace = moeprof.open("sample:twin-mt")
    assert trace.info.command == found["command"]
    capture = found["routing"]["capture"]
    assert capture["num_requests"] == len(trace.requests) == found["recorded"]["requests"]
    assert capture["num_tokens"] == trace.steps["num_tokens"].sum()
    assert found["routing"]["check"]["ok"]
    assert "other GPU" in found["beside"] and any("other GPU" in note for note in trace.info.notes)
    config = found["config"]
    for stack in ("encoder", "decoder"):
        sites = trace.info.sites_of(stack)
        assert len(sites) == config[f"{stack}_layers"] // config["moe_every"]
        assert {(site.num_experts, site.top_k, site.d_model) for site in sites} == {
            (config["num_experts"], config["top_k"], config["d_model"])
        }
    texts = json.dumps(found) + (Path(trace.path) / "trace.json").read_text()
    assert "/root" not in texts
    capsys.readouterr()
