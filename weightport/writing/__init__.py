"""What leaves the program: outputs that appear whole or not at all, and files hashed while they are written."""

from __future__ import annotations

from weightport.writing.hashed_file import HashedFile
from weightport.writing.permission import require_directory, require_file
from weightport.writing.replaced_run import replaced_directory
from weightport.writing.text_output import require_text_output, write_text
from weightport.writing.whole_output import own_file, whole_directory, whole_file
from weightport.writing.working_places import remove_abandoned

__all__ = [
    "HashedFile",
    "own_file",
    "remove_abandoned",
    "replaced_directory",
    "require_directory",
    "require_file",
    "require_text_output",
    "whole_directory",
    "whole_file",
    "write_text",
]
