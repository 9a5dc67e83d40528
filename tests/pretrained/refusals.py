"""How a file that is not read must end, for the reader and for the command line."""

import numpy as np
import pytest

from trm_jax.pretrained import command, files
from trm_jax.types import UserError


def refused(path, capsys):
    """The one line that both the reader and the command line end with."""
    with pytest.raises(UserError) as error:
        weights = files.read(path)
        for array in weights.tensors.values():
            np.asarray(array)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    out = path.with_suffix(".safetensors")
    assert command.main([str(path), f"--out={out}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert not printed.out and not out.exists()
    return message
