"""fairseq's dictionary: which symbol each row of the embedding stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from weightport.errors import VocabularyError

BOS, PAD, EOS, UNK = range(4)
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE_FLAG = "#fairseq:overwrite"


@dataclass(frozen=True)
class Dictionary:
    """The symbols of a model, one a row of its embedding, the four special ones first.

    A symbol may stand at two rows (fairseq's `#fairseq:overwrite`); the later row is then the symbol's, and the
    earlier one is never used.
    """

    symbols: tuple[str, ...] = SPECIAL_SYMBOLS

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each symbol."""
        return {symbol: row for row, symbol in enumerate(self.symbols)}

    def index(self, symbol: str) -> int:
        """Row of `symbol`; that of `<unk>` (3) when there is none."""
        return self.rows.get(symbol, UNK)

    def encode(self, line: str) -> list[int]:
        """Rows of the symbols that white space separates in `line`: the original's encoding with `use_bpe=False`."""
        return [self.index(symbol) for symbol in line.split()]

    def extended(self, symbols: Iterable[str]) -> Dictionary:
        """With `symbols` after the last row; a symbol that has a row already keeps it, as in fairseq's add_symbol."""
        return Dictionary((*self.symbols, *(s for s in dict.fromkeys(symbols) if s not in self.rows)))

    def row_names(self, is_taken: Callable[[str], bool]) -> list[str]:
        """A name of its own for every row, for vocabularies that are maps from name to row.

        It is the symbol, except where the symbol is empty, belongs to a later row, or `is_taken`: text would be
        encoded to it, which the original never does. Such a row is called `<row_N>`, which no text is encoded to.
        """
        return [
            symbol if symbol and self.rows[symbol] == row and not is_taken(symbol) else f"<row_{row}>"
            for row, symbol in enumerate(self.symbols)
        ]


def parse_dictionary(lines: Sequence[str], source: str) -> Dictionary:
    """The dictionary of a dict.txt: a line is `symbol count`, the symbol may hold spaces or be empty.

    Raises VocabularyError, with `source` and the line's number, where fairseq refuses the file too: no count, or a
    symbol that is there already and lacks the overwrite flag.
    """
    symbols = list(SPECIAL_SYMBOLS)
    seen = set(symbols)
    for number, line in enumerate(lines, start=1):
        symbol, space, count = line.rstrip().rpartition(" ")
        overwrite = count == OVERWRITE_FLAG
        if overwrite:
            symbol, space, count = symbol.rpartition(" ")
        if not space or not _is_count(count):
            raise VocabularyError(
                f"{source}, line {number}: expected `symbol count`, found {line!r}.\n"
                "This is not the dict.txt of a fairseq dictionary."
            )
        if symbol in seen and not overwrite:
            raise VocabularyError(
                f"{source}, line {number}: the symbol {symbol!r} is there already.\n"
                f"fairseq accepts that only with the flag {OVERWRITE_FLAG} at the line's end."
            )
        seen.add(symbol)
        symbols.append(symbol)
    return Dictionary(tuple(symbols))


def _is_count(field: str) -> bool:
    return field.removeprefix("-").isdecimal()
