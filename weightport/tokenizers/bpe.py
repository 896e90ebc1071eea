"""The English pipeline of OFA: GPT-2's byte-level BPE, each token at the dictionary's row."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from weightport.errors import VocabularyError
from weightport.tokenizers.dictionary import SPECIAL_SYMBOLS, UNK, Dictionary
from weightport.tokenizers.sources import EnglishVocabulary


def build_bpe(vocabulary: EnglishVocabulary, dictionary: Dictionary) -> Tokenizer:
    """The tokenizer of `vocabulary` with the rows of `dictionary` (its own, and the task's symbols after it).

    The dictionary names a token by its GPT-2 id, as a decimal string; here the row has the token's own name. Raises
    VocabularyError when a merge needs a token that encoder.json or dict.txt lacks.
    """
    token_of_symbol = {str(i): token for token, i in vocabulary.encoder.items()}
    # A word of the dictionary's own that reads like a token must not shadow the token.
    names = dictionary.row_names(is_taken=lambda s: s in vocabulary.encoder and s not in token_of_symbol)
    rows = {token_of_symbol.get(name, name): row for row, name in enumerate(names)}

    needed = {token for left, right in vocabulary.merges for token in (left, right, left + right)}
    if missing := sorted(needed - rows.keys()):
        file = "encoder.json" if missing[0] not in vocabulary.encoder else "dict.txt"
        raise VocabularyError(
            f"vocab.bpe of {vocabulary.source} merges {len(missing)} tokens that have no row "
            f"(the first is {missing[0]!r}, missing in {file}): the files belong to different models.\n"
            "Take all three from the folder that the checkpoint was trained with (bpe_dir)."
        )
    # A byte without a row becomes <unk>, as in fairseq.
    tokenizer = Tokenizer(BPE(rows, list(vocabulary.merges), unk_token=SPECIAL_SYMBOLS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
