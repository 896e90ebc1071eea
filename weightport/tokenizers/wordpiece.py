"""The Chinese pipeline of OFA: BERT's lower-casing word pieces, each at the dictionary's row."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from weightport.errors import VocabularyError
from weightport.tokenizers.dictionary import SPECIAL_SYMBOLS, UNK, Dictionary
from weightport.tokenizers.sources import ChineseVocabulary

CONTINUATION = "##"
UNKNOWN_PIECE = "[UNK]"
# BertTokenizer's own special tokens: text that holds one yields it whole, wherever it stands.
NEVER_SPLIT = ("[PAD]", UNKNOWN_PIECE, "[CLS]", "[SEP]", "[MASK]")
# A longer word becomes [UNK] unread (WordpieceTokenizer.max_input_chars_per_word).
MAX_WORD_CHARACTERS = 100

# The blocks that BasicTokenizer._is_chinese_char names; each of their characters is a word of its own.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_ASCII_PUNCTUATION = r"!-/:-@\[-`{-~"
_WORD_OF_ITS_OWN = (
    "[" + _ASCII_PUNCTUATION + r"\p{P}" + "".join(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in _IDEOGRAPHS) + "]"
)

# BasicTokenizer's steps, spelled out: the library's BertNormalizer and BertPreTokenizer carry Unicode tables of
# another age, and keep 830,000 unassigned code points, hundreds of marks and signs that Python's unicodedata tells.
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.Replace(Regex(r"[\p{C}\x{FFFD}&&[^\t\n\r]]"), ""),
        normalizers.Replace(Regex(r"\p{Zs}"), " "),
        normalizers.Lowercase(),
        normalizers.NFD(),
        normalizers.Replace(Regex(r"\p{Mn}"), ""),
    ]
)
_PRE_TOKENIZER = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORD_OF_ITS_OWN), "isolated")]
)

# PreTrainedTokenizerBase.clean_up_tokenization of transformers 4.20, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def build_wordpiece(vocabulary: ChineseVocabulary, dictionary: Dictionary) -> Tokenizer:
    """The tokenizer of `vocabulary` with the rows of `dictionary` (its own, and the task's symbols after it).

    Raises VocabularyError when text can become a piece that the dictionary has no row for: vocab.txt and dict.txt are
    then of different models.
    """
    pieces = set(vocabulary.pieces)
    strangers = [p for p in vocabulary.pieces if p not in dictionary.rows and _is_reachable(p)]
    if strangers:
        raise VocabularyError(
            f"{len(strangers)} pieces of vocab.txt are missing in dict.txt of {vocabulary.source} "
            f"(the first is {strangers[0]!r}): the two files belong to different models.\n"
            "Take both from the folder that the checkpoint was trained with (bpe_dir)."
        )
    names = dictionary.row_names(is_taken=lambda symbol: symbol not in pieces and _is_reachable(symbol))
    rows = {name: row for row, name in enumerate(names)}
    unknown = UNKNOWN_PIECE if UNKNOWN_PIECE in rows else SPECIAL_SYMBOLS[UNK]
    tokenizer = Tokenizer(WordPiece(rows, unk_token=unknown, max_input_chars_per_word=MAX_WORD_CHARACTERS))
    tokenizer.normalizer = _NORMALIZER
    tokenizer.pre_tokenizer = _PRE_TOKENIZER
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=CONTINUATION, cleanup=False),
            decoders.Fuse(),
            *(decoders.Replace(spaced, joined) for spaced, joined in _CLEAN_UP),
        ]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in NEVER_SPLIT if token in rows])
    return tokenizer


def _is_reachable(piece: str) -> bool:
    """Whether some text is split into `piece`: it, less its prefix, is one word of the pre-tokenizer's making."""
    body = piece.removeprefix(CONTINUATION)
    words = _PRE_TOKENIZER.pre_tokenize_str(_NORMALIZER.normalize_str(body))
    return piece in NEVER_SPLIT or [word for word, _ in words] == [body]
