"""What PTX says about how a kernel uses memory."""

import re
from collections import Counter


def accesses(ptx, kind):
    """How often global memory is read (``ld``) or written (``st``), by width."""
    hints = r"(?:\.\w+::\w+)*"
    return Counter(re.findall(rf"\b{kind}\.global{hints}\.((?:v\d\.)?[bufs]\d+)\b", ptx))
