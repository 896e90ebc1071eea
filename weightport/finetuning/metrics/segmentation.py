"""The words of a sentence, as caption metrics count them: lower case, punctuation removed, Chinese by character.

English follows Stanford's PTBTokenizer as COCO's caption evaluation uses it: "n't", "'s" and the like are words of
their own, "cannot" is two, hyphenated words, numbers, "u.s." and "mr." are one, symbols ($ % & # @) stand alone,
brackets, quotes and punctuation disappear. Unlike it, there is no list of abbreviations beyond a few titles, no rule
for mail and web addresses or for markup, and punctuation that COCO's list forgets ("[", "。") is removed as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from weightport.finetuning.metrics.scores import library

Segmenter = Callable[[str], list[str]]

BY_CHARACTER = r"\p{Han}\p{Hiragana}\p{Katakana}"
LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{BY_CHARACTER}]]"
SPLIT = r"(?<=\p{L})n't\b|(?<=\bcan)not\b|(?<=\bgon)na\b"
TOKEN = rf"""
    [{BY_CHARACTER}]
  | n't | '(?:s|m|d|re|ve|ll)(?!\p{{L}})
  | \b(?:mr|mrs|ms|dr|st|jr|sr|prof|vs)\.(?=\s+\p{{L}})
  | \b(?:[a-z]\.){{2,}}
  | {LETTERS}+ (?: (?: [-/.] | (?<=\p{{N}})[,:](?=\p{{N}}) ) {LETTERS}+ )*
  | [\p{{S}}%\#&@*--[`´]]
"""


def words_and_characters(sentence: str) -> list[str]:
    """Words of scripts that put spaces between them, single characters of those that do not (Han, kana)."""
    token, split = _patterns()
    return list(token.findall(split.sub(r" \g<0>", sentence.lower().replace("’", "'"))))


def words(sentence: str) -> list[str]:
    """As `words_and_characters`, but a sentence with Chinese in it is cut into words by jieba's precise mode."""
    if not has_chinese(sentence):
        return words_and_characters(sentence)
    return [word.lower() for word in _jieba().lcut(sentence) if words_and_characters(word)]


def has_chinese(text: str) -> bool:
    """Whether a Han character occurs."""
    return library("regex").search(r"\p{Han}", text) is not None


@cache
def _patterns() -> tuple[Any, Any]:
    regex = library("regex")
    return regex.compile(TOKEN, regex.VERBOSE | regex.V1), regex.compile(SPLIT, regex.V1)


@cache
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42's regular expressions are no raw strings
        jieba = library("jieba")
    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    # Read from the dictionary, not from jieba's cache: that is a file anyone can have put into the temporary folder.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
