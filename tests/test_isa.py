"""The extension has to load and run where the best instruction sets are missing."""

import re
import shutil
import subprocess

import pytest

from pcm_fast import _native


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_vector_code_stays_in_its_namespace():
    # An initialiser, or a template of the standard library that the linker took from the wrong file, would run on every
    # machine.
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _native.__file__], capture_output=True, text=True, check=True
    )
    function, strays, seen = "", set(), set()
    for line in listing.stdout.splitlines():
        name = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if name:
            function = name.group(1)
        for register, homes in (("%zmm", ("avx512",)), ("%ymm", ("avx2", "avx512"))):
            if register in line:
                seen.add(register)
                if not any(f"pcm::{home}::" in function for home in homes):
                    strays.add((register, function))
    if "avx2" in _native.isas():
        assert seen == {"%zmm", "%ymm"}
    assert not strays
