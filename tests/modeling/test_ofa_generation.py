"""Generation with OFA: fairseq's end of a sequence, its constraint, and the settings that switch them."""

from __future__ import annotations

import logging

import pytest
import torch

from weightport.modeling.ofa.generation_ofa import (
    ConstraintRangeLogitsProcessor,
    EosAtMaxLengthLogitsProcessor,
    OFAGenerationMixin,
)
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

END = torch.tensor([2])


@pytest.fixture
def source(inputs):
    del inputs["decoder_input_ids"]
    return inputs


@pytest.fixture
def endless(make_model):
    """A model that hardly ever ends a sequence by itself."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[2] *= 0.01
    return model


def test_the_end_token_keeps_its_score_at_the_maximum_length():
    scores = torch.tensor([[-1.0, -2.0, -3.0, -0.5]])
    processor = EosAtMaxLengthLogitsProcessor(max_length=4, eos_token_ids=END)
    assert torch.equal(processor(torch.zeros(1, 2), scores), scores)
    assert processor(torch.zeros(1, 3), scores).tolist() == [[-float("inf"), -float("inf"), -3.0, -float("inf")]]


def test_one_choice_is_left_where_another_processor_removed_the_end_token():
    scores = torch.tensor([[-1.0, -2.0, -float("inf"), -0.5]])
    last = EosAtMaxLengthLogitsProcessor(max_length=2, eos_token_ids=END)(torch.zeros(1, 1), scores)
    assert torch.multinomial(last.softmax(-1), 1).item() == 2


def test_a_constraint_shares_the_probability_among_what_it_allows():
    scores = torch.zeros(1, 10)
    probabilities = ConstraintRangeLogitsProcessor(6, 8)(torch.zeros(1, 1), scores).exp()
    assert probabilities[0, [0, 1, 2, 3, 6, 7]].tolist() == pytest.approx([1 / 6] * 6)
    assert probabilities[0, [4, 5, 8, 9]].tolist() == [0.0] * 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 2}])
def test_every_sequence_ends_with_the_end_token(endless, source, options):
    sequences = endless.generate(**source, max_new_tokens=6, **options)
    assert sequences.shape == (2, 7)
    assert sequences[:, -1].tolist() == [2, 2]


def test_beam_scores_contain_the_end_tokens_real_probability(endless, source):
    output = endless.generate(
        **source, max_new_tokens=5, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    for sample, sequence in enumerate(output.sequences):
        single = {name: value[sample : sample + 1] for name, value in source.items()}
        with torch.no_grad():
            logits = endless(**single, decoder_input_ids=sequence[None, :-1]).logits
        total = logits.log_softmax(-1)[0].gather(-1, sequence[1:, None]).sum()
        assert output.sequences_scores[sample].item() == pytest.approx(total.item(), abs=1e-4)


def test_the_switch_leaves_sequences_open(endless, source):
    sequences = endless.generate(**source, max_new_tokens=6, ofa_eos_at_max_length=False)
    assert (sequences != 2).all()


def test_the_settings_survive_saving(endless, source, tmp_path):
    endless.generation_config.ofa_eos_at_max_length = False
    endless.generation_config.ofa_constraint_range = [30, 40]
    endless.save_pretrained(tmp_path)
    loaded = OFAForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.ofa_eos_at_max_length is False
    sequences = loaded.generate(**source, max_new_tokens=6)
    assert set(sequences[:, 1:].flatten().tolist()) <= {0, 2, 3, *range(30, 40)}


def test_padding_is_never_generated(make_model, source):
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight.sum(dim=0) * 100
        model.lm_head.weight[3] = -model.lm_head.weight[1]
    assert (model.generate(**source, max_new_tokens=6, min_new_tokens=5)[:, :6] != 1).all()


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_caches_do_not_change_what_is_generated(make_model, source, options, num_beams):
    model = make_model()
    expected = model.generate(**source, max_new_tokens=8, num_beams=num_beams)
    assert torch.equal(model.generate(**source, max_new_tokens=8, num_beams=num_beams, **options), expected)


def test_generation_from_encoder_outputs_equals_generation_from_inputs(make_model, source):
    model = make_model()
    with torch.no_grad():
        encoded = model.model.encoder(**source)
    expected = model.generate(**source, max_new_tokens=8, num_beams=2)
    assert torch.equal(model.generate(encoder_outputs=encoded, max_new_tokens=8, num_beams=2), expected)


def test_assisted_generation_equals_greedy_generation(make_model, source):
    model = make_model()
    single = {name: value[:1] for name, value in source.items()}
    expected = model.generate(**single, max_new_tokens=8)
    assert torch.equal(model.generate(**single, max_new_tokens=8, prompt_lookup_num_tokens=2), expected)


def test_a_prefix_is_continued(make_model, source):
    model = make_model()
    full = model.generate(**source, max_new_tokens=8)
    continued = model.generate(**source, decoder_input_ids=full[:, :4], max_new_tokens=5)
    assert torch.equal(continued, full)


def test_codes_are_generated_at_code_positions(make_model, source):
    model = make_model()
    options = {"max_new_tokens": 4, "ofa_eos_at_max_length": False, "suppress_tokens": [1, 2]}
    codes = model.generate(**source, code_masks=torch.tensor([True, True]), **options)
    with torch.no_grad():
        logits = model(**source, decoder_input_ids=codes[:, :-1], code_masks=torch.tensor([True, True])).logits
    logits[..., [1, 2]] = -float("inf")
    assert torch.equal(logits.argmax(-1), codes[:, 1:])


def test_prompts_padded_on_the_left_are_refused(make_model, source):
    with pytest.raises(ValueError, match="padded on the left"):
        make_model().generate(**source, decoder_input_ids=torch.tensor([[0, 5], [1, 0]]), max_new_tokens=3)


def test_the_models_own_limit_gives_way_to_any_that_is_given(endless, source, tmp_path, caplog, recwarn):
    endless.generation_config.ofa_max_length = 9
    endless.save_pretrained(tmp_path)
    model = OFAForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.max_length is None
    logging.getLogger("transformers").propagate = True
    try:
        for given, length in (
            ({}, 9),
            ({"max_new_tokens": 5}, 6),
            ({"max_length": 5}, 5),
            ({"max_new_tokens": 20}, 21),
        ):
            sequences = model.generate(**source, num_beams=2, **given)
            assert sequences.shape[1] == length, given
            assert (sequences[:, -1] == 2).all()
        # A prefix counts as fairseq's does: the limit is that of the whole sequence.
        prefix = sequences[:, :4]
        assert model.generate(**source, decoder_input_ids=prefix).shape[1] == 9
    finally:
        logging.getLogger("transformers").propagate = False
    said = [record.getMessage() for record in caplog.records] + [str(each.message) for each in recwarn]
    assert not [line for line in said if "max_length" in line or "max_new_tokens" in line], said


def test_beams_of_a_sample_share_its_encoded_source(make_model, source, monkeypatch):
    """Against beams that each have a copy of the source: the same ids and scores, and rows of the cache by sample."""
    model = make_model()
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    shared = model.generate(**source, **options, output_scores=True, output_attentions=True)
    cache = shared.past_key_values
    assert {layer.keys.shape[0] for layer in cache.cross_attention_cache.layers} == {2}
    assert {layer.keys.shape[0] for layer in cache.self_attention_cache.layers} == {6}
    monkeypatch.delattr(OFAGenerationMixin, "_expand_inputs_for_generation")
    monkeypatch.delattr(OFAGenerationMixin, "_reorder_cache")
    copied = model.generate(**source, **options, output_scores=True, output_attentions=True)
    assert {layer.keys.shape[0] for layer in copied.past_key_values.cross_attention_cache.layers} == {6}
    assert torch.equal(shared.sequences, copied.sequences)
    assert torch.allclose(shared.sequences_scores, copied.sequences_scores, atol=1e-5)
    for ours, theirs in zip(shared.cross_attentions, copied.cross_attentions):
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, theirs))


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_targets_that_share_a_source_get_the_logits_of_copies(make_model, inputs, attn_implementation, code):
    model = make_model(attn_implementation)
    targets = inputs.pop("decoder_input_ids").repeat_interleave(2, dim=0)
    targets[1::2] += 1
    codes = torch.tensor([True, True, False, False]) if code else None
    with torch.no_grad():
        encoded = model.model.encoder(**inputs)
        shared = model(encoder_outputs=encoded, decoder_input_ids=targets, code_masks=codes).logits
        copies = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
        copied = model(**copies, decoder_input_ids=targets, code_masks=codes).logits
    assert torch.allclose(shared, copied, atol=1e-5)


def test_targets_that_no_source_goes_with_are_refused(make_model, inputs):
    model = make_model()
    with torch.no_grad():
        encoded = model.model.encoder(**{key: inputs[key] for key in ("input_ids", "pixel_values", "patch_masks")})
    with pytest.raises(ValueError, match="3 targets cannot share 2 encoded sources"):
        model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[0], [0], [0]]))


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_return_sequences": 2, "num_beams": 4}])
def test_sampled_sequences_share_their_source(make_model, source, options, monkeypatch):
    model = make_model()
    torch.manual_seed(1)
    shared = model.generate(**source, max_new_tokens=8, do_sample=True, **options)
    monkeypatch.delattr(OFAGenerationMixin, "_expand_inputs_for_generation")
    monkeypatch.delattr(OFAGenerationMixin, "_reorder_cache")
    torch.manual_seed(1)
    assert torch.equal(model.generate(**source, max_new_tokens=8, do_sample=True, **options), shared)
