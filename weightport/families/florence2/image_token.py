"""Which id stands for an image in a prompt.

transformers writes 577 placeholders where the original puts image features before the prompt. Their embedding is never
used, but a row more in the head joins every softmax. So by default the placeholder is an id that the original has and
never uses (`reuse`): no number of the model changes. `append` gives the layout of transformers' own conversion, a new
row behind the last, with zeros instead of random values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightport.checkpoints import Checkpoint
from weightport.errors import VocabularyError
from weightport.families.florence2.companions import vocabulary_source
from weightport.families.florence2.options import Florence2Options

MULTIPLE = 64  # what transformers' own conversion pads the vocabulary to
# Without a tokenizer only the released vocabulary's filler is known: BART's madeupword0000.
RELEASED_ROWS, RELEASED_FILLER, FILLER_NAME = 51289, 50261, "madeupword0000"


@dataclass(frozen=True)
class ImageToken:
    """The placeholder's id, the token that it replaces (None: the row had none), the rows added, the tokens added."""

    id: int
    replaces: str | None
    appended: int
    added_tokens: tuple[str, ...]
    note: str

    @property
    def record(self) -> dict[str, Any]:
        """For conversion.json: what an export needs to undo it."""
        return {"id": self.id, "replaces": self.replaces, "appended": self.appended, "added": list(self.added_tokens)}


def choose(checkpoint: Checkpoint, options: Florence2Options, rows: int) -> ImageToken:
    """The placeholder of a checkpoint whose embedding has `rows` rows. Raises VocabularyError when none is free."""
    from weightport.families.florence2.tokenizer import check_fit, read_florence2_vocabulary, reusable_token

    if options.image_token == "none":
        return ImageToken(0, None, 0, (), "No id stands for images.")
    source = vocabulary_source(checkpoint, options)
    vocabulary = read_florence2_vocabulary(source) if source is not None else None
    if vocabulary is not None:
        check_fit(vocabulary, rows)
    added = vocabulary.added if vocabulary is not None else ()
    if options.image_token == "append":
        appended = MULTIPLE - rows % MULTIPLE
        note = (
            f"<image> is the new id {rows}; {appended} rows of zeros were appended to the embedding and the head, "
            "which join every softmax (see docs/florence2.md for the size of the difference)."
        )
        return ImageToken(rows, None, appended, added, note)
    if vocabulary is not None:
        index, replaced = reusable_token(vocabulary, rows)
        called = "an id without token" if replaced is None else f"the id of {replaced!r}, which no text gives"
        return ImageToken(index, replaced, 0, added, f"<image> is {index}, {called}: no logit changes.")
    beside = "No tokenizer was asked for" if options.vocabulary else f"{checkpoint.folder} holds no tokenizer.json"
    if rows < RELEASED_ROWS:
        raise VocabularyError(
            f"{beside}, and without one an unused id is known of the released vocabulary only ({RELEASED_ROWS} "
            f"tokens; this embedding has {rows} rows).\n"
            "  Pass --vocab with the folder of the fork's tokenizer or a Hub id such as microsoft/Florence-2-base, or "
            "--image-token append to convert without a processor."
        )
    note = (
        f"{beside}: the directory has no processor. Pass --vocab microsoft/Florence-2-base (a fork with added tokens: "
        f"its own) to write one. <image> is {RELEASED_FILLER}, {FILLER_NAME} in the released vocabulary."
    )
    return ImageToken(RELEASED_FILLER, FILLER_NAME, 0, added, note)
