"""Image-text retrieval: every text of a data set looked for by its picture, and every picture by its texts.

Pictures and texts are first compared by their vectors, all with all; of the nearest ones, the matching head's logit is
added to the similarity, as in LAVIS. Pictures are read twice and none is kept: what stays in memory are vectors, the
similarities of all pairs [pictures, texts] in float32, and one picture's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from weightport.devices import usable_device
from weightport.errors import DataError, UsageError
from weightport.finetuning.data import local_places
from weightport.finetuning.data.samples import Picture, Samples, left_to_skip
from weightport.finetuning.evaluation.answering import chosen
from weightport.finetuning.evaluation.evaluate import Evaluation, measured_samples, write_evaluation
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics.ranking import NAME, recall
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.model_loading import load_model, load_processor
from weightport.finetuning.training.saving import base_dtype
from weightport.model_directory import check_processor
from weightport.writing import require_directory

TEXTS = 64
"""Texts that are computed at once."""
MISSED = 1 << 30
"""The rank of what was not among those looked at."""


class RetrievalStage(Protocol):
    """What the evaluation of retrieval needs of a family. `name` is its own; `auto_class` loads its models."""

    name: str
    auto_class: str

    def texts(self, processor: Any, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The model's inputs, each [texts, …], padded."""

    def pictures(self, processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels [pictures, …]."""

    def text_vectors(self, model: Any, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unit vectors [texts, width]."""

    def states(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What `image_vectors` and `matches` take of pictures: [pictures, …]."""

    def image_vectors(self, model: Any, states: torch.Tensor) -> torch.Tensor:
        """Unit vectors [pictures, vectors, width]: of a picture's several the nearest one to a text counts."""

    def matches(self, model: Any, states: torch.Tensor, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How well one picture, states [1, …], matches each text: [texts]."""


@dataclass(frozen=True)
class Gallery:
    """The pictures and texts of a data set. `owner`: the picture of each text."""

    pictures: tuple[Picture, ...]
    texts: tuple[str, ...]
    owner: tuple[int, ...]

    def texts_of(self, picture: int) -> tuple[str, ...]:
        """The texts that belong to a picture."""
        return tuple(text for text, owner in zip(self.texts, self.owner) if owner == picture)


@dataclass(frozen=True)
class Ranks:
    """How many others stand before what belongs: of each picture the first of its texts, of each text its picture.
    `best`: the text that stands first for each picture."""

    texts: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)


def evaluate_retrieval(
    directory: Path,
    stage: RetrievalStage,
    data: str | Sequence[str],
    recipe: Recipe,
    *,
    output: Path | None = None,
    held_out: float | None = None,
    device: str | None = None,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Recall of the retrieval model in `directory` on the data set `data`, by vectors alone (`…-contrast`) and with
    the matching head's word on the `evaluation.rerank` nearest. The model runs in its own dtype. `held_out`: on that
    share of the data alone. Raises a WeightportError for a model, data or settings that cannot be."""
    if set(recipe.evaluation.metrics) - {NAME}:
        raise UsageError(
            f"{directory} is a model for image-text retrieval: it answers nothing, and what can be measured is "
            f"--metric {NAME}."
        )
    if output is not None:
        require_directory(output, overwrite=overwrite, inputs=[directory], beside=local_places(data))
    check_processor(directory)
    samples = measured_samples(data, recipe, held_out, say)
    gallery = gallery_of(samples, chosen(len(samples), recipe.evaluation.samples), recipe.data.skip_bad)
    processor = load_processor(directory, None, recipe.batch)
    place = usable_device(device)
    settings = replace(recipe.model, method="full")
    dtype = base_dtype(directory) or torch.float32
    model = load_model(directory, None, settings, device=place, dtype=dtype, auto_class=stage.auto_class)
    model = model.to(place).eval()
    announce(2 * len(gallery.pictures))
    with torch.no_grad():
        similarity, encoded = _compare(model, processor, stage, gallery, advance)
        contrast = ranked(similarity, gallery)
        reranked = _rerank(model, processor, stage, gallery, similarity, encoded, recipe.evaluation.rerank, advance)
    found = recall(reranked.texts, reranked.pictures)
    alone = recall(contrast.texts, contrast.pictures, "-contrast")
    figures = {NAME: found.value, **found.details, f"{NAME}-contrast": alone.value, **alone.details}
    predictions = [
        Prediction(index, picture.place, picture.key, "", gallery.texts[best], gallery.texts_of(index))
        for index, (picture, best) in enumerate(zip(gallery.pictures, reranked.best))
    ]
    result = Evaluation(figures, predictions)
    if output is not None:
        write_evaluation(result, output, directory, data, samples.name, recipe, overwrite=overwrite)
    return result


def gallery_of(samples: Samples, indices: Sequence[int], skip_bad: int) -> Gallery:
    """Each picture once, with all its texts. Raises DataError for samples without either, beyond `skip_bad`."""
    pictures: dict[str, tuple[int, Picture]] = {}
    texts: list[str] = []
    owner: list[int] = []
    skipped, allowed = 0, left_to_skip(samples, skip_bad)
    for index in indices:
        try:
            sample = samples[index]
            if sample.picture is None or not any(text.strip() for text in sample.references):
                raise DataError(f"{sample.place}: retrieval needs a picture with a text.")
            if skip_bad:
                sample.picture.read()
        except DataError as error:
            skipped += 1
            if skipped > allowed:
                raise error
            continue
        number, _ = pictures.setdefault(sample.picture.key, (len(pictures), sample.picture))
        found = [text for text in sample.references if text.strip()]
        texts += found
        owner += [number] * len(found)
    if len(pictures) < 2:
        raise DataError(f"{samples.name} has {len(pictures)} picture with texts: nothing can be confused with it.")
    return Gallery(tuple(picture for _, picture in pictures.values()), tuple(texts), tuple(owner))


def ranked(scores: torch.Tensor, gallery: Gallery) -> Ranks:
    """Ranks by scores [pictures, texts]. What scores the same stands before what belongs."""
    owner = torch.tensor(gallery.owner)
    found = Ranks()
    for picture, row in enumerate(scores):
        found.texts.append(_rank(row, owner == picture))
        found.best.append(int(row.argmax()))
    for text, column in enumerate(scores.t()):
        own = torch.zeros(len(column), dtype=torch.bool)
        own[gallery.owner[text]] = True
        found.pictures.append(_rank(column, own))
    return found


def _rank(scores: torch.Tensor, own: torch.Tensor) -> int:
    """How many of the others score as high as the best of one's own; -inf is what was not looked at."""
    best = scores[own].max() if bool(own.any()) else torch.tensor(-torch.inf)
    return MISSED if torch.isinf(best) else int((scores[~own] >= best).sum())


def _compare(
    model: Any,
    processor: Any,
    stage: RetrievalStage,
    gallery: Gallery,
    advance: Callable[[int], None],
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """(similarities [pictures, texts], float32; the texts as the model takes them, one by one without padding)."""
    vectors, encoded = [], []
    for start in range(0, len(gallery.texts), TEXTS):
        given = stage.texts(processor, gallery.texts[start : start + TEXTS])
        vectors.append(stage.text_vectors(model, _placed(given, model)).float().cpu())
        encoded += [{name: value[row] for name, value in given.items()} for row in range(len(vectors[-1]))]
    texts = torch.cat(vectors)
    similarity = torch.empty(len(gallery.pictures), len(texts))
    for number, states in _states(model, processor, stage, gallery):
        own = stage.image_vectors(model, states)[0].float().cpu()
        similarity[number] = (own @ texts.t()).amax(0)
        advance(1)
    return similarity, encoded


def _rerank(
    model: Any,
    processor: Any,
    stage: RetrievalStage,
    gallery: Gallery,
    similarity: torch.Tensor,
    encoded: Sequence[Mapping[str, torch.Tensor]],
    nearest: int,
    advance: Callable[[int], None],
) -> Ranks:
    """Ranks with the matching head's logit added to the similarity of each picture's `nearest` texts and each text's
    `nearest` pictures; 0: by the similarity alone."""
    if not nearest:
        advance(len(gallery.pictures))
        return ranked(similarity, gallery)
    texts_near = similarity.topk(min(nearest, similarity.shape[1]), dim=1).indices
    pictures_near = similarity.topk(min(nearest, similarity.shape[0]), dim=0).indices
    by_picture = torch.zeros(similarity.shape, dtype=torch.bool).scatter_(1, texts_near, True)
    by_text = torch.zeros(similarity.shape, dtype=torch.bool).scatter_(0, pictures_near, True)
    # Where a pair is looked at from both sides, it is computed once. Each side ranks the pairs that it looked at.
    scores = torch.full(similarity.shape, -torch.inf)
    for number, states in _states(model, processor, stage, gallery):
        wanted = (by_picture[number] | by_text[number]).nonzero()[:, 0].tolist()
        for start in range(0, len(wanted), TEXTS):
            chosen_texts = wanted[start : start + TEXTS]
            given = _placed(_padded([encoded[each] for each in chosen_texts]), model)
            logits = stage.matches(model, states, given).float().cpu()
            scores[number, chosen_texts] = logits + similarity[number, chosen_texts]
        advance(1)
    from_pictures = ranked(scores.masked_fill(~by_picture, -torch.inf), gallery)
    from_texts = ranked(scores.masked_fill(~by_text, -torch.inf), gallery)
    return Ranks(from_pictures.texts, from_texts.pictures, from_pictures.best)


def _states(model: Any, processor: Any, stage: RetrievalStage, gallery: Gallery) -> Iterator[tuple[int, torch.Tensor]]:
    """Each picture's number and what the vision encoder makes of it, one at a time."""
    for number, picture in enumerate(gallery.pictures):
        pixels = stage.pictures(processor, [picture.read()])
        yield number, stage.states(model, pixels.to(model.device, model.dtype))


def _padded(texts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Texts of one batch or several as one batch; what is behind a shorter one is masked."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([each[name] for each in texts], batch_first=True) for name in texts[0]
    }


def _placed(inputs: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in inputs.items()}
