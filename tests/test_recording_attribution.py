"""Every recorded token belongs to the request, sequence and position it was fed for.

The ground truth is what `generate` returned and what the model was fed; neither comes from the
recorder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from recording_runs import Run, padded_batch, record_run, tokens_of  # noqa: E402

from moeprof.recording.tokens import Episode, RequestLabel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny_models.qwen3_moe()


@pytest.fixture(scope="module")
def nllb() -> Any:
    from moeprof.zoo.dispatch import fix_nllb_dispatch

    model = tiny_models.nllb_moe()
    fix_nllb_dispatch(model)
    return model


@pytest.fixture(scope="module")
def switch() -> Any:
    return tiny_models.switch()


def _prompts(batch: dict[str, Any]) -> list[list[int]]:
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask != 0].tolist() for ids, mask in pairs]


def _check_prompts(run: Run, prompts: list[list[int]]) -> None:
    requests = run.trace.requests
    assert requests["num_prompt_tokens"].tolist() == [len(prompt) for prompt in prompts]
    table = run.tokens
    for request, prompt in enumerate(prompts):
        mine = table[(table["request"] == request) & (table["sequence"] == 0)]
        assert mine[mine["phase"] != "decode"]["token"].tolist() == prompt


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_counted(lm: Any, side: str, tmp_path: Path) -> None:
    batch = padded_batch([7, 3, 5], side=side)
    run = record_run(
        lm, tmp_path / "t.moeprof", lambda: lm.generate(**batch, max_new_tokens=4, **GREEDY)
    )
    prompts = _prompts(batch)
    _check_prompts(run, prompts)
    for request, prompt in enumerate(prompts):
        # The last token that was generated is never fed.
        assert tokens_of(run, request) == prompt + run.result[request, 7:-1].tolist()
    assert run.phases == ["prefill", "decode", "decode", "decode"]
    assert run.trace.steps["num_padded_tokens"].tolist() == [6, 0, 0, 0]
    assert run.trace.requests["num_output_tokens"].tolist() == [4, 4, 4]


def test_a_row_of_padding_alone(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 0, 5])
    run = record_run(
        lm, tmp_path / "t.moeprof", lambda: lm.generate(**batch, max_new_tokens=3, **GREEDY)
    )
    _check_prompts(run, _prompts(batch))
    assert tokens_of(run, 1) == run.result[1, 7:-1].tolist()


@pytest.mark.parametrize(
    "how",
    [
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "attention_mask": None},
    ],
    ids=["chunked prefill", "static cache", "static cache, mask inferred"],
)
def test_padding_where_passes_show_no_mask(lm: Any, how: dict[str, Any], tmp_path: Path) -> None:
    batch = padded_batch([7, 3, 5])
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(**{**batch, "max_new_tokens": 4, "pad_token_id": 0, **GREEDY, **how}),
    )
    _check_prompts(run, _prompts(batch))
    for request, prompt in enumerate(_prompts(batch)):
        assert tokens_of(run, request) == prompt + run.result[request, 7:-1].tolist()
    assert run.trace.requests["num_output_tokens"].tolist() == [4, 4, 4]


def test_finished_rows_are_left_out_and_counted(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3, 5])
    free = lm.generate(**batch, max_new_tokens=8, **GREEDY)
    eos = int(free[1, 9])
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            **batch, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0
        ),
    )
    lengths = []
    for request, prompt in enumerate(_prompts(batch)):
        output = run.result[request, 7:].tolist()
        output = output[: output.index(eos) + 1] if eos in output else output
        lengths.append(len(output))
        assert tokens_of(run, request) == prompt + output[:-1]
    assert lengths[1] < 8
    assert run.trace.requests["num_output_tokens"].tolist() == lengths
    assert run.trace.steps["num_padded_tokens"].sum() > 6


def test_rows_that_end_with_a_stop_string_are_left_out(lm: Any, tmp_path: Path) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    batch = padded_batch([7, 3, 5])
    free = lm.generate(**batch, max_new_tokens=6, **GREEDY)

    class Stop(StoppingCriteria):
        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            done = torch.zeros(ids.shape[0], dtype=torch.bool)
            done[1] = ids.shape[1] >= 9
            return done

    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=98,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Stop()]),
        ),
    )
    assert 98 not in free[:, 7:] and 0 not in free[:, 7:]
    assert tokens_of(run, 1) == [*_prompts(batch)[1], *free[1, 7:9].tolist()]
    assert run.trace.requests["num_output_tokens"].tolist() == [6, 2, 6]


def test_generation_without_a_cache_starts_over(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    free = lm.generate(**batch, max_new_tokens=5, **GREEDY)
    eos = int(free[1, 8])
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            **batch,
            max_new_tokens=5,
            do_sample=False,
            use_cache=False,
            eos_token_id=eos,
            pad_token_id=0,
        ),
    )
    table = run.tokens
    for step in range(len(run.calls)):
        mine = table[(table["step"] == step) & (table["request"] == 0)]
        assert mine["token"].tolist() == [*_prompts(batch)[0], *run.result[0, 7 : 7 + step]]
        assert mine["position"].tolist() == list(range(7 + step))
    ended = run.result[1, 7:].tolist().index(eos) + 1
    other = table[table["request"] == 1]
    assert other["step"].max() == ended - 1
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3]
    assert run.trace.requests["num_output_tokens"].tolist()[1] == ended


def test_samples_are_sequences_of_a_request(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    torch.manual_seed(0)
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            **batch, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None
        ),
    )
    assert run.trace.requests["num_sequences"].tolist() == [3, 3]
    for request, prompt in enumerate(_prompts(batch)):
        for sequence in range(3):
            output = run.result[request * 3 + sequence, 7:-1].tolist()
            assert tokens_of(run, request, sequence) == prompt + output
    table = run.tokens
    assert (table["sequence"] == table["parent_sequence"]).all()


def _check_ancestry(run: Run, *, num_beams: int, start: int) -> int:
    """Follows each returned hypothesis back through the trace; returns the links followed.

    The i-th generated token continued row ``beam_indices[i]`` of the pass before it, so that row
    was fed token i - 1, and its parent is row ``beam_indices[i - 1]``.
    """
    table = run.tokens
    decoder = table[table["stack"] == "decoder"]
    links = 0
    beams, sequences = run.result.beam_indices, run.result.sequences
    num_returned = beams.shape[0] // len(run.trace.requests)
    for hypothesis in range(beams.shape[0]):
        request = hypothesis // num_returned
        for i in range(1, int((beams[hypothesis] >= 0).sum())):
            row, parent = int(beams[hypothesis, i]), int(beams[hypothesis, i - 1])
            assert row // num_beams == request
            step = decoder["step"].min() + i
            cell = decoder[(decoder["step"] == step) & (decoder["row"] == row)].iloc[0]
            assert cell["request"] == request
            assert cell["sequence"] == row % num_beams
            assert cell["parent_sequence"] == parent % num_beams
            assert cell["token"] == int(sequences[hypothesis, start + i - 1])
            links += 1
    return links


def test_beams_of_a_language_model(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3, 5])
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            **batch,
            max_new_tokens=6,
            num_beams=4,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        ),
    )
    assert _check_ancestry(run, num_beams=4, start=7) > 20
    assert run.trace.requests["num_sequences"].tolist() == [4, 4, 4]
    table = run.tokens
    assert (table["sequence"] != table["parent_sequence"]).any()


@pytest.mark.parametrize("name", ["nllb", "switch"])
def test_beams_of_a_translation_model(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    batch = padded_batch([6, 2, 4], side="right", pad=1 if name == "nllb" else 0)
    run = record_run(
        model,
        tmp_path / "t.moeprof",
        lambda: model.generate(
            **batch,
            max_new_tokens=6,
            num_beams=4,
            num_return_sequences=2,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=98,
            do_sample=False,
        ),
    )
    assert _check_ancestry(run, num_beams=4, start=1) > 10
    assert run.trace.requests["num_prompt_tokens"].tolist() == [6, 2, 4]
    assert run.trace.requests["num_sequences"].tolist() == [4, 4, 4]


def test_a_beam_search_leaves_nothing_to_the_next_call(lm: Any, tmp_path: Path) -> None:
    """It reorders its cache once more than it runs."""
    batch = padded_batch([7, 3])

    def twice() -> None:
        for _ in range(2):
            lm.generate(**batch, max_new_tokens=4, num_beams=3, **GREEDY)

    run = record_run(lm, tmp_path / "t.moeprof", twice)
    table = run.tokens
    prefill = table[table["phase"] == "prefill"]
    assert (prefill["sequence"] == prefill["parent_sequence"]).all()
    assert run.trace.requests["request"].tolist() == [0, 1, 2, 3]
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3, 7, 3]


@pytest.mark.parametrize("forced", [None, 7], ids=["start token", "start and language token"])
def test_the_start_tokens_of_a_translation_are_prompt(
    nllb: Any, forced: int | None, tmp_path: Path
) -> None:
    batch = padded_batch([6, 2, 4], side="right", pad=1)
    run = record_run(
        nllb,
        tmp_path / "t.moeprof",
        lambda: nllb.generate(
            **batch, max_new_tokens=5, forced_bos_token_id=forced, do_sample=False, eos_token_id=98
        ),
    )
    start = 1 if forced is None else 2
    table = run.tokens
    decoder = table[table["stack"] == "decoder"]
    assert (decoder["phase"] == "prefill").equals(decoder["position"] < start)
    for request, prompt in enumerate(_prompts(batch)):
        assert tokens_of(run, request, stack="encoder") == prompt
        assert tokens_of(run, request) == run.result[request, :-1].tolist()
    assert run.trace.requests["num_prompt_tokens"].tolist() == [6, 2, 4]
    assert run.trace.requests["num_output_tokens"].tolist() == [run.result.shape[1] - start] * 3


def test_translation_with_a_decoder_prompt(nllb: Any, tmp_path: Path) -> None:
    batch = padded_batch([6, 2], side="right", pad=1)
    given = torch.tensor([[2, 9, 11], [2, 8, 12]])
    run = record_run(
        nllb,
        tmp_path / "t.moeprof",
        lambda: nllb.generate(
            **batch, decoder_input_ids=given, max_new_tokens=3, do_sample=False, eos_token_id=98
        ),
    )
    assert run.phases == ["encode", "prefill", "decode", "decode"]
    assert run.trace.requests["num_output_tokens"].tolist() == [3, 3]


def test_translation_through_forward(nllb: Any, tmp_path: Path) -> None:
    batch = padded_batch([6, 2], side="right", pad=1)
    mask = batch["attention_mask"]

    def by_hand() -> None:
        with torch.no_grad():
            nllb(**batch, labels=torch.tensor([[5, 6, 7], [8, 9, 2]]))
            encoded = nllb.get_encoder()(**batch)
            start = torch.tensor([[2], [2]])
            out = nllb(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start)
            for _ in range(2):
                out = nllb(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=out.logits[:, -1:].argmax(-1),
                    past_key_values=out.past_key_values,
                )
            for _ in range(2):
                nllb.generate(
                    encoder_outputs=encoded, attention_mask=mask, max_new_tokens=2, do_sample=False
                )

    run = record_run(nllb, tmp_path / "t.moeprof", by_hand)
    decoder = run.tokens[run.tokens["stack"] == "decoder"]
    by_step = decoder.groupby("step")["request"].unique().map(list).tolist()
    # The second `generate` from the same encoder output is a request of its own.
    assert by_step[:6] == [[0, 1], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]
    assert by_step[6:] == [[4, 5], [4, 5]]
    assert run.phases[:6] == ["encode", "prefill", "encode", "prefill", "decode", "decode"]


@pytest.mark.parametrize("guess", ["prompt lookup", "assistant"])
def test_speculation_says_what_it_took_back(lm: Any, guess: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if guess == "assistant":
        how = {"assistant_model": tiny_models.qwen2_moe()}
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **GREEDY}
    plain = lm.generate(ids, **settings)
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(ids, **how, **settings),
    )
    assert torch.equal(run.result, plain)
    table = run.tokens
    kept = table[table["accepted"].astype(bool)]
    assert len(kept) < len(table)
    assert kept["token"].tolist() == plain[0, :-1].tolist()
    assert kept["position"].tolist() == list(range(plain.shape[1] - 1))
    assert run.trace.requests["num_output_tokens"].tolist() == [8]


def test_an_end_token_that_speculation_took_back_ends_nothing() -> None:
    episode = Episode(
        stack="decoder",
        first_request=0,
        num_requests=1,
        num_rows=1,
        generating=True,
        num_prompt_columns=3,
        end_ids=frozenset({9}),
    )

    def positions(past: int, tokens: list[int]) -> list[int]:
        table = episode.attribute(
            (1, len(tokens)),
            past_length=past,
            mask=None,
            token_ids=np.array([tokens]),
            beam_index=None,
            score=False,
        )
        return list(table.position)

    assert positions(0, [9, 5, 6]) == [0, 1, 2]  # An end token in the prompt ends nothing either.
    assert positions(3, [7, 9, 8]) == [3]
    assert positions(4, [5, 6]) == [4, 5]
    assert positions(6, [9]) == []
    assert positions(7, [5]) == []


def test_embeddings_instead_of_tokens(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    embeddings = lm.get_input_embeddings()(batch["input_ids"]).detach()
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(
            inputs_embeds=embeddings,
            attention_mask=batch["attention_mask"],
            max_new_tokens=4,
            **GREEDY,
        ),
    )
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3]
    assert run.trace.requests["num_output_tokens"].tolist() == [4, 4]
    assert run.phases == ["prefill", "decode", "decode", "decode"]


def test_a_conversation_goes_on_from_its_cache(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])

    def twice() -> Any:
        first = lm.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12], [13, 14]])], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
        return lm.generate(
            ids,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=2,
            **GREEDY,
        )

    run = record_run(lm, tmp_path / "t.moeprof", twice)
    table = run.tokens
    second = table[table["request"] == 3]
    # Position 3 + 2 is the first token the cache did not hold.
    assert second["position"].tolist() == [5, 6, 7, 8]
    assert second["token"].tolist()[1:3] == [13, 14]
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3, 12, 8]
    assert run.trace.requests["num_output_tokens"].tolist() == [3, 3, 2, 2]


def test_two_decode_loops_by_hand_in_turns(lm: Any, tmp_path: Path) -> None:
    batches = [padded_batch([7, 3]), padded_batch([4, 7, 2], seed=5)]

    def loops() -> None:
        with torch.no_grad():
            masks = [batch["attention_mask"] for batch in batches]
            outs = [lm(**batch) for batch in batches]
            for _ in range(3):
                for i, out in enumerate(outs):
                    token = out.logits[:, -1:].argmax(-1)
                    masks[i] = torch.cat([masks[i], torch.ones_like(token)], dim=1)
                    # By position, as a caller may.
                    outs[i] = lm(token, masks[i], None, out.past_key_values)

    run = record_run(lm, tmp_path / "t.moeprof", loops)
    assert run.phases == ["prefill"] * 2 + ["decode"] * 6
    for request, prompt in enumerate(_prompts(batches[0]) + _prompts(batches[1])):
        assert len(tokens_of(run, request)) == len(prompt) + 3
        assert tokens_of(run, request)[: len(prompt)] == prompt
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3, 4, 7, 2]
    assert run.trace.requests["num_output_tokens"].tolist() == [3] * 5
    assert run.trace.requests["end_s"].notna().all()


def test_a_static_cache_used_again_starts_new_requests(lm: Any, tmp_path: Path) -> None:
    from transformers import StaticCache

    ids = padded_batch([7, 7])["input_ids"]

    def reuse() -> None:
        cache: Any = StaticCache(lm.config, max_cache_len=32)
        with torch.no_grad():
            for _ in range(2):
                cache.reset()
                lm(ids, past_key_values=cache)
                lm(ids[:, :1], past_key_values=cache)

    run = record_run(lm, tmp_path / "t.moeprof", reuse)
    assert run.phases == ["prefill", "decode", "prefill", "decode"]
    for request in range(4):
        row = ids[request % 2].tolist()
        assert tokens_of(run, request) == [*row, row[0]]


def test_the_inner_model_called_by_itself(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])

    def inner() -> None:
        with torch.no_grad():
            lm.model(batch["input_ids"], batch["attention_mask"])
            lm.model(inputs_embeds=lm.get_input_embeddings()(padded_batch([7, 7])["input_ids"]))

    run = record_run(lm, tmp_path / "t.moeprof", inner)
    assert run.phases == ["prefill", "prefill"]
    assert run.trace.steps["num_padded_tokens"].tolist() == [4, 0]


def test_training_with_checkpointing_records_each_pass_once(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    lm.train()
    lm.gradient_checkpointing_enable()

    def train() -> None:
        for _ in range(2):
            lm(**batch, labels=batch["input_ids"]).loss.backward()

    try:
        run = record_run(lm, tmp_path / "t.moeprof", train)
    finally:
        lm.gradient_checkpointing_disable()
        lm.eval()
        lm.zero_grad()
    assert run.phases == ["prefill", "prefill"]


def test_scoring_is_prefill(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    run = record_run(lm, tmp_path / "t.moeprof", lambda: lm(**batch, use_cache=False), mode="score")
    assert run.trace.info.mode == "score"
    assert run.phases == ["prefill"]
    assert run.trace.requests["num_output_tokens"].tolist() == [0, 0]


def test_labels_follow_the_order_of_requests(lm: Any, tmp_path: Path) -> None:
    import moeprof

    labels = [
        RequestLabel(prompt_id=f"p{i}", domain=domain, slo_ms=50.0 + i)
        for i, domain in enumerate(["news", "code", "news"])
    ]
    with moeprof.record(lm, tmp_path / "t.moeprof") as recorder:
        recorder.announce(labels[:2])
        lm.generate(**padded_batch([7, 3]), max_new_tokens=2, **GREEDY)
        recorder.announce(labels[2:])
        lm.generate(**padded_batch([4]), max_new_tokens=2, **GREEDY)
        lm.generate(**padded_batch([5]), max_new_tokens=2, **GREEDY)
    requests: Any = moeprof.open(recorder.path).requests.sort_values("request")
    assert requests["domain"].tolist()[:3] == ["news", "code", "news"]
    assert requests["prompt_id"].tolist()[:3] == ["p0", "p1", "p2"]
    assert requests["slo_ms"].tolist()[:3] == [50.0, 51.0, 52.0]
    assert requests["domain"].isna().tolist() == [False, False, False, True]
    assert recorder.num_requests == 4
