"""What OFA's model has to do whatever its weights: masks, caches, dtypes, batch norms, saving, and clear errors."""

from __future__ import annotations

import pytest
import torch

from weightport.modeling.ofa.configuration_ofa import OFAConfig
from weightport.modeling.ofa.layers_ofa import OFADropPath
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration, OFAModel
from weightport.modeling.ofa.positions_ofa import image_relative_buckets, patch_position_ids, text_relative_buckets


def logits_of(model, inputs, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**inputs, **changes}).logits


def test_patch_masks_hide_every_patch_of_a_sample(make_model, inputs):
    model = make_model()
    masks = torch.tensor([True, False])
    other_image = inputs["pixel_values"].clone()
    other_image[1] = 7.0
    masked = logits_of(model, inputs, patch_masks=masks)
    assert torch.equal(masked, logits_of(model, inputs, patch_masks=masks, pixel_values=other_image))
    assert not torch.allclose(masked[1], logits_of(model, inputs)[1])


def test_masking_all_images_is_not_the_same_as_having_none(make_model, inputs):
    model = make_model()
    without = logits_of(model, inputs, pixel_values=None, patch_masks=None)
    masked = logits_of(model, inputs, patch_masks=torch.tensor([False, False]))
    assert torch.allclose(without, masked, atol=1e-5)


def test_padding_of_the_source_does_not_reach_the_logits(make_model, inputs):
    model = make_model()
    short = {name: value[1:] for name, value in inputs.items()}
    alone = logits_of(model, {**short, "input_ids": short["input_ids"][:, :3]})
    assert torch.allclose(logits_of(model, inputs)[1:], alone, atol=1e-5)


def test_a_given_attention_mask_decides_instead_of_the_padding_id(make_model, inputs):
    model = make_model()
    visible = torch.ones_like(inputs["input_ids"])
    assert not torch.allclose(logits_of(model, inputs)[1], logits_of(model, inputs, attention_mask=visible)[1])
    hidden = visible.clone()
    hidden[0, 2] = 0
    other_word = inputs["input_ids"].clone()
    other_word[0, 2] = 40
    masked = logits_of(model, inputs, attention_mask=hidden)
    assert torch.equal(masked, logits_of(model, inputs, attention_mask=hidden, input_ids=other_word))


def test_a_target_does_not_see_what_follows(make_model, inputs):
    model = make_model()
    changed = inputs["decoder_input_ids"].clone()
    changed[:, -1] = 50
    assert torch.allclose(logits_of(model, inputs)[:, :3], logits_of(model, inputs, decoder_input_ids=changed)[:, :3])


def test_a_wider_image_has_other_positions_for_its_rows(make_model, inputs):
    model = make_model()
    tall = inputs["pixel_values"].transpose(2, 3)
    assert not torch.allclose(logits_of(model, inputs), logits_of(model, inputs, pixel_values=tall), atol=1e-4)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 2), (4, 4)])
def test_the_bias_of_a_grid_of_patches_is_that_of_every_pair(make_model, grid):
    encoder = make_model().model.encoder
    ids = patch_position_ids(*grid, 4)
    by_pair = encoder.image_relative_bias(1, image_relative_buckets(ids, ids, 4))
    assert torch.equal(torch.cat(encoder.patch_relative_bias(1, *grid), dim=1)[None], by_pair)


@pytest.mark.parametrize("left_out", [(), ("pixel_values",)])
def test_encoding_without_gradients_gives_the_same_states(make_model, inputs, left_out):
    encoder = make_model().model.encoder
    source = {name: inputs[name] for name in ("input_ids", "pixel_values") if name not in left_out}
    with torch.enable_grad():
        with_gradients = encoder(**source).last_hidden_state
    with torch.no_grad():
        without = encoder(**source).last_hidden_state
    assert with_gradients.requires_grad and torch.equal(without, with_gradients)


@pytest.mark.parametrize("code_masks", [None, [True, True], [False, True]])
@pytest.mark.parametrize("options", [{}, {"disable_entangle": False, "entangle_position_embedding": True}])
def test_sdpa_and_eager_give_the_same_logits(make_model, inputs, code_masks, options):
    inputs["code_masks"] = None if code_masks is None else torch.tensor(code_masks)
    eager = logits_of(make_model("eager", **options), inputs)
    assert torch.allclose(eager, logits_of(make_model("sdpa", **options), inputs), atol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("code_masks", [None, [True, True], [False, True]])
def test_decoding_with_a_cache_equals_decoding_at_once(make_model, inputs, attn_implementation, code_masks):
    model = make_model(attn_implementation, disable_entangle=False)
    inputs["code_masks"] = None if code_masks is None else torch.tensor(code_masks)
    at_once = logits_of(model, inputs)
    target = inputs.pop("decoder_input_ids")
    cache, steps = None, []
    with torch.no_grad():
        for position in range(target.shape[1]):
            output = model(
                **inputs,
                decoder_input_ids=target[:, position : position + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, dim=1), at_once, atol=1e-5)


def test_encoder_outputs_replace_the_source(make_model, inputs):
    model = make_model()
    target = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        encoded = model.model.encoder(**inputs)
        expected = model(**inputs, decoder_input_ids=target).logits
        assert torch.equal(model(encoder_outputs=encoded, decoder_input_ids=target).logits, expected)
        assert torch.equal(model(encoder_outputs=encoded.to_tuple(), decoder_input_ids=target).logits, expected)


def test_position_keys_kept_by_generation_do_not_cut_off_gradients(make_model, inputs):
    model = make_model()
    target = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        encoded = model.model.encoder(**inputs)
    model.generate(encoder_outputs=encoded, max_new_tokens=3)
    assert encoded.position_keys is not None
    model(encoder_outputs=encoded, decoder_input_ids=target).logits.sum().backward()
    assert model.model.decoder.cross_pos_k_linear.weight.grad.abs().sum() > 0


def test_encoder_outputs_of_another_kind_are_refused(make_model, inputs):
    model = make_model()
    hidden = torch.zeros(2, 5, 16)
    with pytest.raises(ValueError, match="position_embeddings are needed"):
        model(encoder_outputs=(hidden,), decoder_input_ids=inputs["decoder_input_ids"])


def test_labels_are_shifted_behind_the_start_token(make_model, inputs):
    model = make_model()
    labels = torch.tensor([[20, 21, 2, -100], [23, 2, -100, -100]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[0, 20, 21, 2], [0, 23, 2, 1]]
    assert labels[0, 3] == -100
    explicit = model(**{**inputs, "decoder_input_ids": shifted}, labels=labels).loss
    del inputs["decoder_input_ids"]
    assert torch.equal(model(**inputs, labels=labels).loss, explicit)


def test_decoder_inputs_may_hold_a_prompt_that_is_no_target(make_model, inputs):
    model = make_model()
    labels = torch.tensor([[1, 1, 30, 2], [1, 1, 31, 2]])
    logits = logits_of(model, inputs)[:, 2:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 2:].flatten())
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_label_smoothing_comes_from_the_configuration_unless_given(make_model, inputs):
    labels = torch.tensor([[20, 21, 22, 2], [23, 24, 25, 2]])
    configured = make_model(label_smoothing=0.1)(**inputs, labels=labels).loss
    model = make_model()
    assert torch.equal(model(**inputs, labels=labels, label_smoothing=0.1).loss, configured)
    assert not torch.equal(model(**inputs, labels=labels).loss, configured)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_everything_is_masked(make_model, inputs, dtype, attn_implementation):
    model = make_model(attn_implementation).to(dtype)
    inputs["input_ids"][1] = 1
    inputs["patch_masks"][1] = False
    inputs["decoder_input_ids"][1, 0] = 1
    assert logits_of(model, inputs).isfinite().all()


def test_hidden_states_and_attentions_are_those_of_every_layer(make_model, inputs):
    output = make_model()(**inputs, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.encoder_hidden_states] == [(2, 11, 16)] * 3
    assert [state.shape for state in output.decoder_hidden_states] == [(2, 4, 16)] * 3
    assert [weights.shape for weights in output.cross_attentions] == [(2, 2, 4, 11)] * 2
    assert [weights.shape for weights in output.encoder_attentions] == [(2, 4, 11, 11)] * 2


class TestBatchNorm:
    @staticmethod
    def tower(model):
        return model.model.encoder.vision_tower

    @classmethod
    def statistics(cls, model):
        return cls.tower(model).embedder.embedder.normalization.running_mean.clone()

    def test_training_updates_the_statistics_of_a_trained_tower(self, make_model, inputs):
        model = make_model().train()
        before = self.statistics(model)
        model(**inputs)
        assert not torch.equal(self.statistics(model), before)

    def test_a_frozen_tower_keeps_its_statistics(self, make_model, inputs):
        model = make_model()
        model.model.encoder.requires_grad_(False)
        model.train()
        before = self.statistics(model)
        model(**inputs)
        assert torch.equal(self.statistics(model), before)

    def test_a_tower_frozen_after_train_keeps_its_statistics_too(self, make_model, inputs):
        model = make_model().train()
        self.tower(model).requires_grad_(False)
        before = self.statistics(model)
        model(**inputs)
        assert torch.equal(self.statistics(model), before)

    def test_an_unfrozen_tower_learns_statistics_again(self, make_model, inputs):
        model = make_model()
        self.tower(model).requires_grad_(False)
        model.train()
        self.tower(model).requires_grad_(True)
        model.train()
        before = self.statistics(model)
        model(**inputs)
        assert not torch.equal(self.statistics(model), before)

    def test_frozen_batch_norms_are_constants(self, make_model, inputs):
        model = make_model(freeze_batch_norm=True).train()
        model.requires_grad_(True)
        assert not [name for name, _ in self.tower(model).named_parameters() if "normalization" in name]
        before = self.statistics(model)
        model(**inputs).logits.sum().backward()
        assert torch.equal(self.statistics(model), before)
        assert self.tower(model).embedder.embedder.convolution.weight.grad is not None

    def test_frozen_batch_norms_compute_what_others_do_in_evaluation(self, make_model, inputs):
        model, frozen = make_model(), make_model(freeze_batch_norm=True)
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        frozen.load_state_dict({name: state[name] for name in frozen.state_dict()})
        assert torch.allclose(logits_of(model, inputs), logits_of(frozen, inputs), atol=1e-5)

    def test_epsilon_is_the_configured_one(self, make_model):
        for freeze in (False, True):
            tower = self.tower(make_model(batch_norm_eps=1e-3, freeze_batch_norm=freeze))
            norms = [module for name, module in tower.named_modules() if name.endswith("normalization")]
            assert norms
            assert all(norm.eps == 1e-3 for norm in norms)


def test_drop_path_rises_inside_each_stage_and_over_the_layers(make_model):
    vision = {"depths": [2, 3, 2], "embedding_size": 4, "hidden_sizes": [4, 8, 12]}
    model = make_model(resnet_drop_path_rate=0.2, encoder_drop_path_rate=0.4, vision_config=vision)
    stages = model.model.encoder.vision_tower.encoder.stages
    rates = [[layer.layer[-1].rate for layer in stage.layers] for stage in stages]
    assert [pytest.approx(stage) for stage in rates] == [[0.0, 0.2], [0.0, 0.1, 0.2], [0.0, 0.2]]
    assert [layer.drop_path.rate for layer in model.model.encoder.layers] == pytest.approx([0.0, 0.4])


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    dropped = OFADropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped.amin(dim=(1, 2)), dropped.amax(dim=(1, 2)))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_drop_path_adds_no_tensor_to_a_checkpoint(make_model):
    assert set(make_model(resnet_drop_path_rate=0.2).state_dict()) == set(make_model().state_dict())


def test_an_image_with_more_patches_than_positions_is_refused(make_model, inputs):
    with pytest.raises(ValueError, match="32 x 80 pixels gives 2 x 5 patches; the position tables hold 4 x 4"):
        make_model()(**{**inputs, "pixel_values": torch.zeros(2, 3, 32, 80)})


def test_a_text_longer_than_the_positions_is_refused(make_model, inputs):
    with pytest.raises(ValueError, match="OFAEncoder got a text of 43 tokens; its positions end at 42"):
        make_model()(**{**inputs, "input_ids": torch.full((2, 43), 5)})


def test_a_mask_of_patches_and_text_together_is_refused(make_model, inputs):
    with pytest.raises(ValueError, match="masks the text only"):
        make_model()(**inputs, attention_mask=torch.ones(2, 11))


def test_codes_beyond_the_window_are_refused_where_the_table_is_too_small(make_model, inputs):
    model = make_model()
    inputs["decoder_input_ids"] = torch.full((2, 6), 5)
    logits_of(model, inputs, code_masks=torch.tensor([False, False]))
    with pytest.raises(ValueError, match="2 x 2 codes"):
        model(**inputs, code_masks=torch.tensor([False, True]))


def test_large_images_use_resized_positions_only_if_asked(make_model, inputs):
    plain = logits_of(make_model(), inputs)
    assert torch.equal(logits_of(make_model(interpolate_position=True, orig_patch_image_size=64), inputs), plain)
    assert not torch.allclose(
        logits_of(make_model(interpolate_position=True, orig_patch_image_size=32), inputs), plain, atol=1e-4
    )


@pytest.mark.parametrize(
    "vision_config",
    [
        {"model_type": "resnet", "depths": [1, 2, 1], "embedding_size": 4, "hidden_sizes": [4, 8, 12]},
        {
            "model_type": "ofa_vit",
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
        },
    ],
)
@pytest.mark.parametrize("share_all_embeddings", [True, False])
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_saved_model_loads_to_the_same_logits(
    make_model, inputs, tmp_path, vision_config, share_all_embeddings, tie_word_embeddings
):
    model = make_model(
        vision_config=vision_config,
        share_all_embeddings=share_all_embeddings,
        tie_word_embeddings=tie_word_embeddings,
    )
    model.save_pretrained(tmp_path)
    loaded, report = OFAForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    tables = {
        loaded.model.encoder.embed_tokens.weight,
        loaded.model.decoder.embed_tokens.weight,
        loaded.lm_head.weight,
    }
    assert len(tables) == (3 if not tie_word_embeddings else 1 if share_all_embeddings else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bucket_tables_are_right_after_loading_in_any_dtype(make_model, tmp_path, dtype):
    make_model().save_pretrained(tmp_path)
    loaded = OFAModel.from_pretrained(tmp_path, dtype=dtype)
    for stack in (loaded.encoder, loaded.decoder):
        assert torch.equal(stack.text_buckets, text_relative_buckets(8))
    assert "encoder.text_buckets" not in loaded.state_dict()


@pytest.mark.parametrize("share_all_embeddings", [True, False])
def test_resizing_the_vocabulary_resizes_every_table(make_model, inputs, share_all_embeddings):
    model = make_model(share_all_embeddings=share_all_embeddings)
    before = logits_of(model, inputs)
    model.resize_token_embeddings(70)
    assert model.model.decoder.embed_tokens.num_embeddings == 70
    assert model.model.encoder.embed_tokens.num_embeddings == 70
    assert torch.allclose(logits_of(model, inputs)[..., :60], before, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu_fast", "gelu_accurate", "tanh", "linear"])
def test_fairseqs_activations_are_known(make_model, activation):
    inputs = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = {
        "relu": inputs.clamp(min=0),
        "tanh": inputs.tanh(),
        "linear": inputs,
    }.get(activation, torch.nn.functional.gelu(inputs, approximate="tanh"))
    layer = make_model(activation_function=activation).model.encoder.layers[0]
    assert torch.allclose(layer.activation_fn(inputs), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 768, "decoder_attention_heads": 5}, "not a multiple of decoder_attention_heads"),
        ({"vision_config": {"model_type": "bert"}}, "an OFA image tower is 'resnet' or 'ofa_vit'"),
        ({"d_model": "large"}, "d_model"),
    ],
)
def test_a_configuration_that_fits_no_model_is_refused(options, message):
    with pytest.raises(Exception, match=message):
        OFAConfig(**options)
