"""Prints a header with its comments as Doxygen's: ``// text`` becomes ``/// text``.

Doxygen runs this on each file of csrc/rope. The first comment is that of the file, so it gets
``@file``.
"""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    source = Path(sys.argv[1]).read_text()
    sys.stdout.write("/// @file\n" + re.sub(r"^( *)//(?=[ \n])", r"\1///", source, flags=re.M))
