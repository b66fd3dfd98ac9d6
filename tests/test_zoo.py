"""The built-in models, loading of others, prompts, batches and the NLLB-MoE dispatch."""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import math
import pkgutil
import sys
from pathlib import Path

import pytest

from moeprof import zoo
from moeprof.errors import MissingExtraError, MoeprofError, UsageError
from moeprof.zoo.catalog import BUILTINS, builtin
from moeprof.zoo.loader import load
from moeprof.zoo.prompts import Prompt, read_prompts

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

RESULTS = Path(__file__).resolve().parents[1] / "analysis" / "results"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lm():
    return load("zoo:lm", device="cpu")


@pytest.fixture(scope="module")
def mt():
    return load("zoo:mt", device="cpu")


@pytest.fixture(scope="module")
def broken_mt():
    return load("zoo:mt", device="cpu", fixes=())


def sparse_blocks(model):
    return [m for m in model.modules() if type(m).__name__ == "NllbMoeSparseMLP"]


# ---------------------------------------------------------------- package
def test_no_public_name_is_a_submodule():
    modules = {info.name for info in pkgutil.iter_modules(zoo.__path__)}
    for name in modules:
        importlib.import_module(f"moeprof.zoo.{name}")
    assert not modules & set(zoo.__all__)
    assert set(zoo.__all__) <= set(dir(zoo))
    assert zoo.load is load
    assert zoo.BUILTINS is BUILTINS
    with pytest.raises(AttributeError):
        zoo.nothing_of_that_name  # noqa: B018


def test_unknown_builtin_lists_the_choices():
    assert builtin("zoo:lm").task == "lm"
    with pytest.raises(MoeprofError) as caught:
        builtin("zoo:vision")
    assert "zoo:lm" in caught.value.hint
    assert "zoo:mt" in caught.value.hint


# ---------------------------------------------------------------- prompts
def test_shipped_language_model_prompts():
    prompts = read_prompts(builtin("zoo:lm").prompts_path)
    domains = [prompt.domain for prompt in prompts]
    assert len(prompts) >= 64
    assert len(set(domains)) >= 4
    assert all(domains.count(domain) >= 16 for domain in set(domains))
    assert all(a != b for a, b in itertools.pairwise(domains)), "interleaved"
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_shipped_translation_prompts():
    prompts = read_prompts(builtin("zoo:mt").prompts_path)
    languages = [prompt.language for prompt in prompts]
    assert set(languages) == {"deu_Latn", "fra_Latn", "spa_Latn"}
    assert all(languages.count(language) >= 32 for language in set(languages))
    assert len(set(languages[:3])) == 3, "interleaved"
    assert all(prompt.reference and prompt.domain for prompt in prompts)
    assert {prompt.source_language for prompt in prompts} == {"eng_Latn"}


def test_plain_text_prompts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbffirst line\r\n\n  second line\n")
    assert read_prompts(path) == [
        Prompt(id="mine-1", text="first line"),
        Prompt(id="mine-3", text="  second line"),
    ]


def test_json_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        {"id": 7, "prompt": "Hello", "language": "deu_Latn", "other": 1},
        {"text": "Bye", "domain": "x", "source_language": "eng_Latn", "reference": "Ade"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    first, second = read_prompts(path)
    assert (first.id, first.text, first.language) == ("7", "Hello", "deu_Latn")
    assert second == Prompt("p-2", "Bye", "x", None, "eng_Latn", "Ade")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.jsonl", b"\n  \n\n", "holds no prompts"),
        ("binary.txt", b"fine\nalso\nnot\0fine", "line 3: a NUL byte"),
        ("latin.txt", "fine\nnaïve".encode("latin-1"), "line 2: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("list.jsonl", b'["a"]', "line 1: not a JSON object"),
        ("none.jsonl", b'{"text": "a"}\n{"domain": "a"}', "line 2: no field 'text'"),
        ("blank-text.jsonl", b'{"text": "  "}', "line 1: no field 'text'"),
        ("label.jsonl", b'{"text": "a", "domain": 3}', "line 1: the field 'domain'"),
        ("twice.jsonl", b'{"text":"a","id":"x"}\n{"text":"b","id":"x"}', "line 2: the id 'x'"),
    ],
)
def test_bad_prompts_name_the_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MoeprofError) as caught:
        read_prompts(path)
    assert says in caught.value.message
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_missing_prompts_file(tmp_path):
    with pytest.raises(MoeprofError, match="there is no prompts file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(MoeprofError, match="cannot read"):
        read_prompts(tmp_path)


# ---------------------------------------------------------------- loading
@pytest.mark.parametrize("name", list(BUILTINS))
def test_shipped_files(name):
    folder = builtin(name).folder
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    assert [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}] == []
    result = json.loads((RESULTS / f"zoo_{builtin(name).task}.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == result["weight_hash"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    if name == "zoo:lm":
        figures = [f"{row['bits_per_byte']:.3f}" for row in result["held_out"].values()]
    else:
        groups = [*result["held_out"].values(), result["help_without_dispatch_fix"]]
        figures = [f"{row['chrf2']:.1f}" for group in groups for row in group.values()]
    assert [figure for figure in figures if figure not in card] == [], "the card's figures"


@pytest.mark.parametrize("name", list(BUILTINS))
def test_held_out_bars(name):
    result = json.loads((RESULTS / f"zoo_{builtin(name).task}.json").read_text(encoding="utf-8"))
    num_experts = {"zoo:lm": 32, "zoo:mt": 16}[name]
    for layer in result["usage"].values():
        assert layer["experts_under_a_tenth"] <= num_experts / 4
    if name == "zoo:lm":
        assert len(result["held_out"]) >= 4
        for row in result["held_out"].values():
            assert row["share_of_hardest_unigram"] <= 0.6
    else:
        for row in result["held_out"]["help"].values():
            assert row["sentences"] >= 500
            assert row["chrf2"] >= 35


def test_language_model_as_loaded(lm):
    config = lm.model.config
    assert lm.architecture == "Qwen3MoeForCausalLM"
    assert (lm.task, lm.name, lm.fixes) == ("lm", "zoo:lm", ())
    assert (config.num_experts, config.num_experts_per_tok, config.head_dim) == (32, 4, 64)
    assert config.num_hidden_layers >= 4
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert len(lm.prompts) >= 64
    weights = (builtin("zoo:lm").folder / "model.safetensors").read_bytes()
    assert lm.weight_hash == hashlib.sha256(weights).hexdigest()


def test_translation_model_as_loaded(mt):
    config = mt.model.config
    assert mt.architecture == "NllbMoeForConditionalGeneration"
    assert (mt.task, mt.fixes) == ("mt", ("nllb-dispatch",))
    assert config.num_experts == 16
    assert config.second_expert_policy == "all"
    assert config.moe_eval_capacity_token_fraction == 1.0
    blocks = sparse_blocks(mt.model)
    encoder = sparse_blocks(mt.model.get_encoder())
    assert len(encoder) >= 2
    assert len(blocks) - len(encoder) >= 2


def test_folder_is_not_repaired_unless_asked():
    folder = str(builtin("zoo:mt").folder)
    plain = load(folder, device="cpu")
    assert plain.fixes == ()
    assert plain.prompts == []
    assert plain.task == "mt"
    assert plain.name == folder
    fixed = load(folder, device="cpu", fixes=("nllb-dispatch",), dtype="bfloat16")
    assert fixed.fixes == ("nllb-dispatch",)
    assert fixed.model.dtype == torch.bfloat16


def test_fix_that_does_not_apply():
    with pytest.raises(MoeprofError, match="no NLLB-MoE layers"):
        load("zoo:lm", device="cpu", fixes=("nllb-dispatch",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "asr"}, "no task 'asr'"),
        ({"task": "mt"}, "decoder-only"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"fixes": ("everything",)}, "no fix 'everything'"),
    ],
)
def test_senseless_arguments(arguments, says):
    with pytest.raises(UsageError) as caught:
        load("zoo:lm", **arguments)
    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MoeprofError, match="no GPU"):
        load("zoo:lm", device="cuda")


def test_places_that_hold_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    for name, says in (
        (str(tmp_path / "empty"), "no config.json"),
        (str(tmp_path / "file.bin"), "is a file"),
        (str(tmp_path / "nowhere"), "there is no folder"),
        ("owner/model/more", "there is no folder"),
        ("zoo:none", "no built-in model"),
    ):
        with pytest.raises(MoeprofError, match=says) as caught:
            load(name)
        assert caught.value.hint
        assert "\n" not in caught.value.message


def test_unreachable_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MoeprofError, match="cannot reach the hub") as caught:
        load("nobody-at-all/no-such-model")
    assert "zoo:lm" in caught.value.hint


def test_pickled_weights_are_refused(tmp_path):
    folder = builtin("zoo:lm").folder
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoeprofError, match="cannot load the weights"):
        load(str(tmp_path), device="cpu")


def test_damaged_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(MoeprofError, match="cannot load the configuration"):
        load(str(tmp_path))


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        load("zoo:lm")
    assert package in caught.value.message
    assert "moeprof[record]" in caught.value.hint


# ---------------------------------------------------------------- batches
def test_language_model_batches_pad_left(lm):
    prompts = [Prompt("a", "In the beginning"), Prompt("b", "In")]
    (batch,) = zoo.batches(lm, prompts, 8)
    mask = batch.inputs["attention_mask"]
    assert mask[:, -1].tolist() == [1, 1]
    assert mask[1, 0] == 0
    assert batch.num_tokens == mask.sum() < mask.numel()
    assert batch.targets == {}
    assert [len(b.prompts) for b in zoo.batches(lm, lm.prompts[:5], 2)] == [2, 2, 1]


def test_long_prompts_lose_their_beginning(lm):
    (batch,) = zoo.batches(lm, [Prompt("a", "word " * 2000 + "the end")], 1)
    width = batch.inputs["input_ids"].shape[1]
    assert width == lm.model.config.max_position_embeddings - 64
    assert lm.tokenizer.decode(batch.inputs["input_ids"][0]).endswith("the end")


def test_translation_batches_mix_languages(mt):
    prompts = mt.prompts[:6]
    (batch,) = zoo.batches(mt, prompts, 6)
    assert batch.inputs["attention_mask"][:, 0].tolist() == [1] * 6
    tags = mt.tokenizer.convert_ids_to_tokens(batch.generate_kwargs["decoder_input_ids"][:, 1])
    assert tags == [prompt.language for prompt in prompts]
    targets = batch.targets["decoder_input_ids"]
    assert targets.shape == batch.targets["decoder_attention_mask"].shape
    with torch.inference_mode():
        together = mt.model.generate(**batch.inputs, max_new_tokens=24, **batch.generate_kwargs)
        for row, alone in enumerate(zoo.batches(mt, prompts, 1)):
            ids = mt.model.generate(**alone.inputs, max_new_tokens=24, **alone.generate_kwargs)[0]
            assert together[row, : len(ids)].tolist() == ids.tolist(), prompts[row]


def test_unknown_language(mt):
    with pytest.raises(MoeprofError, match="klingon") as caught:
        list(zoo.batches(mt, [Prompt("a", "Hello", language="klingon")], 1))
    assert "deu_Latn" in caught.value.hint
    with pytest.raises(MoeprofError, match="with and without"):
        list(zoo.batches(mt, [Prompt("a", "x", language="deu_Latn"), Prompt("b", "y")], 2))


# ---------------------------------------------------------------- dispatch
class Captured:
    """Inputs, combine weights, output and rows executed per expert of one block's last call."""

    def __init__(self, block):
        self.rows = {}
        self.handles = [
            block.register_forward_hook(self._block, with_kwargs=False),
            block.router.register_forward_hook(self._router),
        ]
        for name, expert in block.experts.items():
            self.handles.append(expert.register_forward_hook(self._expert(name)))

    def _block(self, module, inputs, output):
        self.inputs, self.output = inputs, output.flatten(0, 1).clone()

    def _router(self, module, inputs, output):
        self.combine = output[1].clone()

    def _expert(self, name):
        def hook(module, inputs, output):
            self.rows[int(name.removeprefix("expert_"))] = inputs[0].shape[0]

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


def run_scored(loaded, count=6):
    (batch,) = zoo.batches(loaded, loaded.prompts[:count], count)
    with torch.inference_mode():
        loaded.model(**batch.inputs, **batch.targets, use_cache=False)
    return batch


@pytest.mark.parametrize("site", range(4))
def test_executed_rows_are_the_routed_ones(mt, site):
    captured = Captured(sparse_blocks(mt.model)[site])
    batch = run_scored(mt)
    captured.remove()
    routed = (captured.combine > 0).sum(0)
    assert {e: n for e, n in enumerate(routed.tolist()) if n} == captured.rows
    name = "attention_mask" if site < 2 else "decoder_attention_mask"
    mask = {**batch.inputs, **batch.targets}[name].flatten().bool()
    assert not mask.all(), "the batch has padding"
    assert (captured.combine[mask] > 0).sum(1).tolist() == [2] * int(mask.sum())
    assert not captured.combine[~mask].any(), "padding is routed nowhere"
    torch.testing.assert_close(captured.combine[mask].sum(1), torch.ones(int(mask.sum())))


@pytest.mark.parametrize("site", range(4))
@pytest.mark.parametrize("rows", ["prefill", "decode"])
def test_dispatch_by_intervention(mt, site, rows):
    block = sparse_blocks(mt.model)[site]
    captured = Captured(block)
    run_scored(mt)
    captured.remove()
    hidden = captured.inputs[0].clone()
    mask = captured.inputs[1].clone()
    if rows == "decode":  # one row a sentence, as in a decoding step; nothing is padded
        hidden, mask = hidden[:, 1:2].clone(), None
    with torch.inference_mode():
        _, combine, _ = block.router(hidden.flatten(0, 1), mask)
        before = block(hidden, mask).flatten(0, 1)
        for expert in range(16):
            module = block.experts[f"expert_{expert}"]
            original = module.fc2.bias.detach().clone()
            module.fc2.bias += 1.0
            after = block(hidden, mask).flatten(0, 1)
            module.fc2.bias.copy_(original)
            changed = (after != before).any(1)
            assert changed.tolist() == (combine[:, expert] > 0).tolist(), expert
            shift = combine[:, expert, None] * (1 - mt.model.config.moe_token_dropout)
            torch.testing.assert_close(
                after - before, shift.expand_as(before), atol=2e-5, rtol=1e-4
            )


def test_stock_dispatch_runs_two_experts(broken_mt):
    if not zoo.needs_nllb_dispatch_fix(broken_mt.model):
        pytest.skip("this transformers dispatches correctly")
    captured = Captured(sparse_blocks(broken_mt.model)[0])
    run_scored(broken_mt)
    captured.remove()
    assert set(captured.rows) == {0, 1}
    assert (captured.combine > 0).any(0).sum() > 2


def test_fix_is_applied_to_instances_once(broken_mt):
    model = copy.deepcopy(broken_mt.model)
    kind = type(sparse_blocks(model)[0])
    before = kind.forward
    assert zoo.needs_nllb_dispatch_fix(model)
    assert zoo.fix_nllb_dispatch(model) == 4
    assert not zoo.needs_nllb_dispatch_fix(model)
    assert zoo.fix_nllb_dispatch(model) == 0
    assert kind.forward is before
    assert zoo.needs_nllb_dispatch_fix(broken_mt.model)


def test_fix_in_training_mode(mt):
    block = copy.deepcopy(sparse_blocks(mt.model)[0]).train()
    block.router.expert_capacity = 64
    hidden = torch.randn(2, 5, mt.model.config.d_model, generator=torch.manual_seed(0))
    assert block(hidden).shape == hidden.shape


def test_other_models_need_no_fix(lm):
    assert not zoo.needs_nllb_dispatch_fix(lm.model)
    assert zoo.fix_nllb_dispatch(lm.model) == 0


# ---------------------------------------------------------------- quality
def test_language_model_was_trained(lm):
    bits = {}
    with torch.inference_mode():
        for batch in zoo.batches(lm, lm.prompts[:12], 1):
            ids = batch.inputs["input_ids"]
            loss = lm.model(input_ids=ids, labels=ids).loss
            domain = batch.prompts[0].domain
            total = float(loss) * (ids.shape[1] - 1) / math.log(2)
            bits.setdefault(domain, []).append(total / len(batch.prompts[0].text.encode()))
    mean = {domain: sum(values) / len(values) for domain, values in bits.items()}
    assert len(mean) >= 4
    # short prompts without context: more than in the model card, far less than a unigram's
    assert all(value < 2.4 for value in mean.values()), mean
    assert sum(mean.values()) / len(mean) < 1.8, mean


def test_translation_model_was_trained(mt, broken_mt):
    from sacrebleu.metrics import CHRF

    prompts = [prompt for prompt in mt.prompts if prompt.domain == "help"][:24]
    scores = []
    for loaded in (mt, broken_mt):
        outputs = []
        with torch.inference_mode():
            for batch in zoo.batches(loaded, prompts, 12):
                ids = loaded.model.generate(
                    **batch.inputs, max_new_tokens=60, **batch.generate_kwargs
                )
                outputs += loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)
        references = [prompt.reference for prompt in prompts]
        scores.append(CHRF().corpus_score(outputs, [references]).score)
    assert scores[0] > 50
    assert scores[1] < scores[0] - 10, "wrong dispatch costs quality"
