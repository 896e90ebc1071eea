"""What leaves the program: outputs that appear whole or not at all, and files hashed while they are written."""

from __future__ import annotations

from weightport.writing.hashed_file import HashedFile
from weightport.writing.whole_output import check_absent, whole_directory, whole_file

__all__ = ["HashedFile", "check_absent", "whole_directory", "whole_file"]
