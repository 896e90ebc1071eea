"""OFA's tokenizer: one token a row of the embedding, ids equal to the original's."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from weightport.errors import VocabularyError
from weightport.tokenizers.bpe import build_bpe
from weightport.tokenizers.dictionary import BOS, EOS, PAD, SPECIAL_SYMBOLS, UNK
from weightport.tokenizers.sources import ChineseVocabulary, EnglishVocabulary, read_ofa_vocabulary
from weightport.tokenizers.wordpiece import build_wordpiece

MASK = "<mask>"
CODES = "<code_{}>"
BINS = "<bin_{}>"
# Options of the original's tasks: image codes of the VQGAN and coordinate bins (OFAConfig in tasks/ofa_task.py).
CODE_DICT_SIZE = 8192
NUM_BINS = 1000
# The released checkpoints: rows of the embedding, what they are, and the folder of the original with their vocabulary.
RELEASED = {
    59457: ("English", "the utils/BPE folder (encoder.json, vocab.bpe, dict.txt)"),
    30325: ("Chinese (OFA-CN)", "the BERT_CN_dict folder (vocab.txt, dict.txt)"),
}
LANGUAGE_OF_BPE = {"gpt2": 59457, "bert": 30325}


def build_ofa_tokenizer(
    vocabulary: Path | str | ChineseVocabulary | EnglishVocabulary,
    rows: int,
    *,
    bpe: str | None = None,
    num_bins: int | None = None,
    code_dict_size: int | None = None,
    parse_symbols: bool = False,
    model_max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer of exactly `rows` tokens whose ids are the rows of a checkpoint's embedding.

    Args:
        vocabulary: what `read_ofa_vocabulary` takes or returned.
        rows: rows of `encoder.embed_tokens.weight`.
        bpe: the checkpoint's task option of that name ("bert" or "gpt2"), only to tell what went wrong: the files
            decide, since the original's own OCR scripts name the wrong folder.
        num_bins, code_dict_size: the checkpoint's task options. Where None, they follow from `rows` when only one
            reading is possible: none of them, the given one alone, or the original's 8192 codes and 1000 bins.
        parse_symbols: read `<mask>`, `<code_i>`, `<bin_i>` in text as these symbols, as OFA-Chinese does. The original
            never does: in its text they are ordinary characters, and so they are by default.
        model_max_length: positions of the encoder (max_source_positions).

    Text is encoded as `<s>` text `</s>`. Raises VocabularyError when vocabulary and `rows` do not belong together.
    """
    if not isinstance(vocabulary, (ChineseVocabulary, EnglishVocabulary)):
        vocabulary = read_ofa_vocabulary(vocabulary)
    with_mask = vocabulary.dictionary.extended([MASK])
    codes, bins = _sizes(vocabulary, len(with_mask), rows, bpe, code_dict_size, num_bins)
    symbols = [*(CODES.format(i) for i in range(codes)), *(BINS.format(i) for i in range(bins))]
    dictionary = with_mask.extended(symbols)
    if len(dictionary) != rows:
        raise _wrong_size(vocabulary, len(dictionary), rows, bpe, f"{codes} codes and {bins} bins")
    if isinstance(vocabulary, ChineseVocabulary):
        backend = build_wordpiece(vocabulary, dictionary)
    else:
        backend = build_bpe(vocabulary, dictionary)

    if parse_symbols:
        # Space before a symbol is none of the text: the original encodes what stands between symbols on its own.
        backend.add_tokens([AddedToken(symbol, lstrip=True, normalized=False) for symbol in (MASK, *symbols)])
    bos, pad, eos, unk = (SPECIAL_SYMBOLS[row] for row in (BOS, PAD, EOS, UNK))
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A $B {eos}", special_tokens=[(bos, BOS), (eos, EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        # Text that spells a special token stays text.
        split_special_tokens=True,
    )
    if len(tokenizer) != rows:
        raise _wrong_size(vocabulary, len(tokenizer), rows, bpe, "tokens that share a name")
    return tokenizer


def _sizes(
    vocabulary: ChineseVocabulary | EnglishVocabulary,
    base: int,
    rows: int,
    bpe: str | None,
    code_dict_size: int | None,
    num_bins: int | None,
) -> tuple[int, int]:
    """Numbers of image codes and of bins, of which the dictionary up to `<mask>` has `base` rows."""
    held = vocabulary.dictionary.rows
    if code_dict_size is not None and num_bins is not None:
        return code_dict_size, num_bins
    if CODES.format(0) in held or BINS.format(0) in held:
        return code_dict_size or 0, num_bins or 0
    rest = rows - base
    if code_dict_size is not None and rest >= code_dict_size:
        return code_dict_size, rest - code_dict_size
    if num_bins is not None and rest >= num_bins:
        return rest - num_bins, num_bins
    readings = {0: (0, 0), NUM_BINS: (0, NUM_BINS), CODE_DICT_SIZE + NUM_BINS: (CODE_DICT_SIZE, NUM_BINS)}
    if code_dict_size is None and num_bins is None and rest in readings:
        return readings[rest]
    raise _wrong_size(vocabulary, base, rows, bpe, "no codes and no bins")


def _wrong_size(
    vocabulary: ChineseVocabulary | EnglishVocabulary, tokens: int, rows: int, bpe: str | None, counted: str
) -> VocabularyError:
    other = RELEASED.get(rows) or RELEASED.get(LANGUAGE_OF_BPE.get(bpe or "", 0))
    if other and not other[0].startswith(vocabulary.language):
        advice = f"This checkpoint is {other[0]}: give {other[1]} as the vocabulary (--vocab)."
    else:
        advice = (
            "Give the folder that the checkpoint was trained with (its bpe_dir) as the vocabulary (--vocab).\n"
            "For a fine-tune with further symbols, or other numbers of codes and bins where the file no longer holds "
            "the training's options, let dict.txt list every symbol in the embedding's order."
        )
    return VocabularyError(
        f"encoder.embed_tokens.weight has {rows} rows, but the {vocabulary.language} vocabulary in "
        f"{vocabulary.source} gives {tokens} tokens ({counted}).\n{advice}"
    )
