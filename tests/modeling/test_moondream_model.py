"""The Moondream classes: loading, masks, caches, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from weightport import modeling  # noqa: F401 - registers the classes
from weightport.modeling.moondream.configuration_moondream import MoondreamConfig
from weightport.modeling.moondream.generation_moondream import bidirectional_prefix
from weightport.modeling.moondream.modeling_moondream import MoondreamForConditionalGeneration, MoondreamModel
from weightport.modeling.moondream.region_moondream import MoondreamBinRegionHead
from weightport.modeling.moondream.views_moondream import merge_views, stitch

IMAGE, ROWS, PATCHES, SIDE = 90, 96, 4, 28
NO_IMAGE = {"suppress_tokens": [IMAGE]}
"""As a converted directory's generation_config.json has it."""
REGION = {
    "kind": "bins", "coord_feat_dim": 8, "coord_out_dim": 16, "size_feat_dim": 8, "size_out_dim": 32, "inner_dim": 20,
}  # fmt: skip
PERIODS: dict[str, dict[str, Any]] = {
    "one_view": {},
    "crops": {"feature_merge": "grid", "region_config": {"kind": "points", "feature_dim": 8}},
    "tiles": {
        "feature_merge": "tiles", "overlap_margin": 0, "prefix_bidirectional": True, "region_config": REGION,
        "answer_token_id": 7, "reasoning_config": {"coord_token_id": 9, "size_token_id": 8, "answer_prefix": [7]},
    },
}  # fmt: skip


def config_of(period: str = "one_view", **changes: Any) -> MoondreamConfig:
    text = {
        "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip
    settings = {**PERIODS[period], **changes}
    return MoondreamConfig(
        text_config=text, vision_config=vision, projector_hidden_size=40, image_token_id=IMAGE, **settings
    )


@pytest.fixture(params=PERIODS)
def period(request) -> str:
    return request.param


@pytest.fixture
def model(period: str) -> MoondreamForConditionalGeneration:
    torch.manual_seed(0)
    return MoondreamForConditionalGeneration(config_of(period)).eval()


def inputs_of(period: str, texts: tuple[int, ...] = (5, 3)) -> dict[str, torch.Tensor]:
    """A batch of texts of these lengths behind a picture each, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    length = 1 + PATCHES + max(texts)
    ids, mask = torch.full((len(texts), length), 1), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        start = length - (1 + PATCHES + text)
        mask[row, start:] = 1
        ids[row, start + 1 : start + 1 + PATCHES] = IMAGE
        ids[row, length - text :] = torch.randint(10, 80, (text,), generator=generator)
    views = () if period == "one_view" else (3,)
    pixels = torch.randn(len(texts), *views, 3, SIDE, SIDE, generator=generator)
    found = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if views:
        found["image_grids"] = torch.tensor([[1, 2], [2, 1]][: len(texts)])
    return found


def alone(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"][row].bool()
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    return one | {"input_ids": one["input_ids"][:, real], "attention_mask": one["attention_mask"][:, real]}


# Loading: transformers builds on the meta device, and what a constructor computed there is lost.


def test_every_buffer_survives_loading_on_the_meta_device(model, period: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded, info = MoondreamForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    buffers, own = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == own.keys() and any("inv_freq" in name for name in own)
    for name, buffer in own.items():
        assert not buffers[name].is_meta and torch.equal(buffers[name], buffer), name
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs_of(period)).logits, model(**inputs_of(period)).logits)


def test_a_model_built_on_the_meta_device_computes_nothing_there(period: str) -> None:
    with torch.device("meta"):
        model = MoondreamForConditionalGeneration(config_of(period))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_model_made_empty_and_initialised_has_every_buffer(model, period: str) -> None:
    """What `from_pretrained` does with what no file holds."""
    with torch.device("meta"):
        other = MoondreamForConditionalGeneration(config_of(period))
    other = other.to_empty(device="cpu")
    for tensor in other.buffers():
        tensor.fill_(77)
    other.init_weights()
    other.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name


def test_auto_classes_load_a_saved_model(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoondreamConfig
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MoondreamForConditionalGeneration
    assert type(AutoModel.from_pretrained(tmp_path)) is MoondreamModel


def test_base_model_loads_from_a_file_of_the_whole(model, period: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    base, info = MoondreamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        states = base.eval()(**inputs_of(period)).last_hidden_state
        assert torch.equal(model.lm_head(states), model(**inputs_of(period)).logits)


def test_configuration_keeps_everything_when_saved(period: str, tmp_path: Path) -> None:
    config = config_of(period)
    config.save_pretrained(tmp_path)
    assert MoondreamConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


# Masks and caches.


def test_padding_on_the_left_changes_no_sample(model, period: str) -> None:
    inputs = inputs_of(period)
    with torch.no_grad():
        whole = model(**inputs).logits
        for row in range(2):
            own = model(**alone(inputs, row)).logits[0]
            assert torch.allclose(whole[row, -len(own) :], own, atol=1e-5)


def test_attention_implementations_agree(model, period: str) -> None:
    inputs = inputs_of(period)
    found = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(**inputs).logits[:, -3:])
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled with g++")
def test_flex_attention_agrees(model, period: str) -> None:
    inputs = inputs_of(period)
    found = []
    for name in ("eager", "flex_attention"):
        model.set_attn_implementation(name)
        assert model.config.text_config._attn_implementation == name
        with torch.no_grad():
            found.append(model(**inputs).logits[:, -3:])
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation_with_any_cache_gives_the_same(model, period: str, cache: str | None) -> None:
    inputs = inputs_of(period)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **NO_IMAGE}
    plain = model.generate(**inputs, **settings, use_cache=False)
    chosen = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(model.generate(**inputs, **settings, **chosen), plain)
    # Step by step, as a whole forward pass chooses.
    length = inputs["input_ids"].shape[1]
    forced = inputs | {"input_ids": plain, "attention_mask": torch.ones_like(plain)}
    forced["attention_mask"][:, :length] = inputs["attention_mask"]
    with torch.no_grad():
        scores = model(**forced).logits[:, length - 1 : -1]
    scores[..., IMAGE] = -torch.inf
    if model.config.answer_token_id is not None:
        scores[:, 1:, model.config.answer_token_id] = -torch.inf
    assert torch.equal(scores.argmax(-1), plain[:, length:])


def test_beams_keep_each_its_own_picture(model, period: str) -> None:
    inputs = inputs_of(period)
    settings = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
        **NO_IMAGE,
    }
    both = model.generate(**inputs, **settings)
    for row in range(2):
        one = model.generate(**alone(inputs, row), **settings)
        assert torch.equal(both[row, -4:], one[0, -4:])


def test_image_sees_itself_in_both_directions_and_nothing_behind_it(model, period: str) -> None:
    inputs = inputs_of(period, (4,))
    states = []

    def look(changed: int) -> torch.Tensor:
        embeds, _ = model.model._embed(inputs["input_ids"], model.get_image_features(*picture).pooler_output)
        embeds[:, changed] += torch.linspace(-3, 3, 32)
        with torch.no_grad():
            return model.model(input_ids=inputs["input_ids"], inputs_embeds=embeds).last_hidden_state[0]

    picture = (inputs["pixel_values"], inputs.get("image_grids"))
    with torch.no_grad():
        states = [look(place) for place in (0, PATCHES, PATCHES + 1)]
    # A change of the last image vector reaches the start token only with prefix attention, one of the text never.
    bidirectional = model.config.prefix_bidirectional
    assert torch.allclose(states[1][0], states[2][0], atol=1e-6) != bidirectional
    assert not torch.allclose(states[1][-1], states[2][-1], atol=1e-6)


def test_prefix_ends_with_the_image_and_begins_behind_padding() -> None:
    is_image = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert bidirectional_prefix(is_image, mask).tolist() == [[0, 0, 0, -1, -1], [-1, 0, 0, 0, -1], [-1] * 5]


def test_text_without_a_picture_is_causal(model) -> None:
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        whole, part = model(input_ids=ids).logits, model(input_ids=ids[:, :2]).logits
    assert torch.allclose(whole[:, :2], part, atol=1e-5)


# Views.


def test_margins_of_neighbours_are_left_out_once() -> None:
    grid, margin = 5, 1
    field = torch.arange(11 * 8 * 2, dtype=torch.float).reshape(11, 8, 2)
    tiles = torch.stack([field[row : row + grid, column : column + grid] for row in (0, 3, 6) for column in (0, 3)])
    assert torch.equal(stitch(tiles, 3, 2, margin), field)


def test_picture_without_crops_has_its_whole_view_twice() -> None:
    features = torch.randn(1, 3, 4, 6)
    merged = merge_views(features, torch.tensor([[0, 0]]), 0)
    assert torch.equal(merged, torch.cat([features[:, 0], features[:, 0]], -1))


def test_crops_are_averaged_to_the_grid_of_one_view() -> None:
    features = torch.randn(1, 3, 4, 6)
    merged = merge_views(features, torch.tensor([[1, 2]]), 0)[0, :, 6:].unflatten(0, (2, 2))
    left, right = (features[0, view].unflatten(0, (2, 2)) for view in (1, 2))
    assert torch.allclose(merged[:, 0], left.mean(1)) and torch.allclose(merged[:, 1], right.mean(1))


def test_padding_of_views_is_not_looked_at(model, period: str) -> None:
    if period == "one_view":
        assert model.config.feature_merge == "none"
        return
    inputs = inputs_of(period)
    wider = torch.cat([inputs["pixel_values"], torch.full_like(inputs["pixel_values"], torch.nan)], 1)
    with torch.no_grad():
        assert torch.equal(model(**inputs | {"pixel_values": wider}).logits, model(**inputs).logits)


# Training.


def test_gradient_checkpointing_changes_no_gradient(model, period: str) -> None:
    inputs = inputs_of(period)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    found = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-7) for name in found[0])


def test_cached_image_features_stand_for_pixels(model, period: str) -> None:
    inputs = inputs_of(period)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs.get("image_grids")).pooler_output
        cached = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"image_features": features}
        assert torch.equal(model(**cached).logits, model(**inputs).logits)
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **NO_IMAGE}
        assert torch.equal(model.generate(**cached, **settings), model.generate(**inputs, **settings))


def test_half_precision_runs(model, period: str) -> None:
    inputs = inputs_of(period)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert model.bfloat16()(**inputs).logits.isfinite().all()


# What is refused.


def test_pictures_and_places_that_differ_in_number_are_refused(model, period: str) -> None:
    inputs = inputs_of(period)
    inputs["input_ids"][0, -1] = IMAGE
    with pytest.raises(ValueError, match="9 places for image vectors, the pictures give 8"):
        model(**inputs)


def test_pixels_of_another_period_are_refused(model, period: str) -> None:
    inputs = inputs_of("crops" if period == "one_view" else "one_view")
    with pytest.raises(ValueError, match="this revision takes"):
        model(**inputs)


def test_views_without_their_grid_are_refused(period: str, model) -> None:
    if period == "one_view":
        assert model.config.feature_merge == "none"
        return
    inputs = inputs_of(period)
    del inputs["image_grids"]
    with pytest.raises(ValueError, match="need image_grids"):
        model(**inputs)


def test_boxes_are_read_where_there_is_a_head_for_them(model, period: str) -> None:
    inputs = inputs_of(period, (3,))
    if period != "tiles":
        with pytest.raises(ValueError, match="has no head that reads boxes"):
            model.detect(**inputs)
        return
    boxes = model.detect(**inputs, max_objects=2)
    assert len(boxes) <= 2 and all(set(box) == {"x_min", "y_min", "x_max", "y_max"} for box in boxes)
    with pytest.raises(ValueError, match="one prompt at a time, found 2"):
        model.point(**inputs_of(period))


def test_attention_that_cannot_see_an_image_in_both_directions_is_refused(period: str, model) -> None:
    if period != "tiles":
        assert not model.config.prefix_bidirectional
        return
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="Flash attention takes no mask"):
        model(**inputs_of(period))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"feature_merge": "pool"}, "feature_merge is 'pool'"),
        ({"feature_merge": "tiles", "overlap_margin": 1}, "leaves nothing of a grid of 2"),
        ({"region_config": {"kind": "boxes"}}, "region_config.kind is 'boxes'"),
        ({"reasoning_config": {"coord_token_id": 5}}, "reasoning_config lacks answer_prefix, size_token_id"),
        (
            {"reasoning_config": {"coord_token_id": 9, "size_token_id": 8, "answer_prefix": [7]}},
            "needs answer_token_id beside it",
        ),
    ],
)
def test_configuration_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        config_of("one_view", **changes)


def test_answer_token_may_only_come_first(model, period: str) -> None:
    if period != "tiles":
        assert model.config.answer_token_id is None
        return
    with torch.no_grad():
        model.lm_head.bias[7] += 100
    found = model.generate(**inputs_of(period), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert (found[:, -4] == 7).all() and not (found[:, -3:] == 7).any()


@pytest.mark.parametrize("period", ["one_view"], indirect=True)
def test_repetition_penalty_is_of_start_and_answer_alone(model, period: str) -> None:
    """The original generates behind embeddings: no id of the prompt is penalised, but the start, which is the end."""
    inputs = inputs_of(period, (5,))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **NO_IMAGE}
    with torch.no_grad():
        model.lm_head.weight *= 20
        said, plain = [], [1]
        while len(said) < 8:
            ids = torch.cat([inputs["input_ids"], torch.tensor([said], dtype=torch.long)], 1)
            scores = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
            for seen in set(plain):
                scores[seen] = scores[seen] * 1.5 if scores[seen] < 0 else scores[seen] / 1.5
            scores[IMAGE] = -torch.inf
            said.append(int(scores.argmax()))
            plain.append(said[-1])
    found = model.generate(**inputs, **settings, repetition_penalty=1.5)[0, inputs["input_ids"].shape[1] :]
    assert found.tolist() == said
    assert model.generate(**inputs, **settings)[0, -8:].tolist() != said


# Regions and thoughts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bin_is_its_own_number_in_half_precision_too(dtype: torch.dtype) -> None:
    sizes = {"coord_feat_dim": 8, "coord_out_dim": 1024, "size_feat_dim": 8, "size_out_dim": 2048, "inner_dim": 4}
    head = MoondreamBinRegionHead(6, sizes)
    for each in (head.coord_decoder, head.size_decoder):
        torch.nn.init.zeros_(each.fc2.weight)
        torch.nn.init.zeros_(each.fc2.bias)
    head.coord_decoder.fc2.bias.data[733] = 1
    head.size_decoder.fc2.bias.data[[701, 1024 + 335]] = 1
    head, state = head.to(dtype), torch.zeros(1, 1, 6, dtype=dtype)
    with torch.no_grad():
        assert head.decode_coordinate(state).item() == 733 / 1024
        wanted = [2 ** (place / 1023 * 10 - 10) for place in (701, 335)]
        assert head.decode_size(state).flatten().tolist() == pytest.approx(wanted, rel=1e-6)
        assert head.encode_coordinate(head.decode_coordinate(state)[..., None]).dtype == dtype


POINTS_OFTEN = 5.5


def thinking(period: str, model: MoondreamForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A prompt, and a head that points now and then, never answers by itself, and would often say sizes and ends
    where it may."""
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.bias[[1, 8]] += 4.5
        model.lm_head.bias[9] += POINTS_OFTEN
        model.lm_head.bias[7] -= 50
    model.generation_config.suppress_tokens = [IMAGE]
    return inputs_of(period, (4,))


@pytest.mark.parametrize("period", ["tiles"], indirect=True)
def test_thoughts_are_those_of_whole_passes(model, period: str) -> None:
    """Without a cache: every token from a pass over all that stands before it, coordinates by their embeddings."""
    inputs = thinking(period, model)
    found = model.reason(**inputs, do_sample=False, max_new_tokens=12)
    head, table = model.region_head, model.get_input_embeddings()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grids"]).pooler_output
        embeds, ids = model.model._embed(inputs["input_ids"], features)[0], inputs["input_ids"]

        def following() -> tuple[torch.Tensor, torch.Tensor]:
            with model.states_before_last_norm() as states:
                last = model.model(input_ids=ids, inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
            scores = model.lm_head(last)[0]
            scores[IMAGE] = -torch.inf
            return scores, states[0][:, -1:]

        thoughts, numbers = [], []
        scores, state = following()
        while len(thoughts) < 12:
            token = int(scores.argmax())
            thoughts.append(token)
            embedding = table(torch.tensor([[token]]))
            if token == 9:
                numbers.append(float(head.decode_coordinate(state)))
                embedding = head.encode_coordinate(torch.tensor([[[numbers[-1]]]]))
            embeds, ids = torch.cat([embeds, embedding], 1), torch.cat([ids, torch.tensor([[token]])], 1)
            scores, state = following()
            scores[[1, 8]] = -torch.inf
        embeds, ids = torch.cat([embeds, table(torch.tensor([[7]]))], 1), torch.cat([ids, torch.tensor([[7]])], 1)
        answer: list[int] = []
        scores, _ = following()
        while (token := int(scores.argmax())) != 1 and len(answer) < 12:
            answer.append(token)
            embeds = torch.cat([embeds, table(torch.tensor([[token]]))], 1)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            scores, _ = following()
            scores[7] = -torch.inf
    assert found.reasoning_ids == thoughts and found.answer_ids == answer
    assert found.coordinates == pytest.approx(numbers) and 0 < len(numbers) < 12


@pytest.mark.parametrize("period", ["tiles"], indirect=True)
def test_thoughts_end_where_the_answer_begins_and_sampling_is_seeded(model, period: str) -> None:
    inputs = thinking(period, model)
    model.lm_head.bias.data[7] += 200
    assert model.reason(**inputs, do_sample=False, max_new_tokens=5).reasoning_ids == []
    model.lm_head.bias.data[7] -= 200
    seen = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        seen.append(model.reason(**inputs, do_sample=True, temperature=2.0, top_p=0.9, max_new_tokens=6))
    assert seen[0] == seen[1] and any(each != seen[0] for each in seen[2:])
    nearly_greedy = model.reason(**inputs, do_sample=True, temperature=2.0, top_p=1e-6, max_new_tokens=6)
    assert nearly_greedy == model.reason(**inputs, do_sample=False, max_new_tokens=6)


def test_revision_that_does_not_reason_is_asked_in_vain(model, period: str) -> None:
    if period == "tiles":
        model.config.reasoning_config = None
    with pytest.raises(ValueError, match="This revision does not reason"):
        model.reason(**inputs_of(period, (3,)))


@pytest.mark.slow
@pytest.mark.parametrize("period", ["one_view", "tiles"], indirect=True)
def test_traced_model_computes_the_same(model, period: str) -> None:
    """What torch.compile traces, run without a compiler."""
    inputs = inputs_of(period)
    with torch.no_grad():
        found = torch.compile(model.forward, backend="eager")(**inputs).logits
        assert torch.allclose(found, model(**inputs).logits, atol=1e-5)
